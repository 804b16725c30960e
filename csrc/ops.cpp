// The operator losa::sparse_linear on the CPU, through LibTorch's stable ABI: one build serves every torch from 2.10 on.
//
// y_TO = x_TI W_OI^T + b_O, W packed. Three ways, by the number of tokens (Kernels::stream_tokens, tile_tokens):
// a few tokens are multiplied while the weight streams by; more share tiles decoded into the L1 cache; past that, panels of rows
// are decoded to a dense matrix that stays in the L2 cache and go through torch's own GEMM. Threads are torch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace losa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Kernel : int64_t { kPortable, kAvx2, kAvx512, kAmx };

bool runs_here(int64_t kernel) {
  if (kernel == kPortable) return true;
#if defined(__x86_64__)
  if (kernel == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && runs_here(kAvx2);
  if (kernel == kAvx512) return avx512;
  if (kernel == kAmx) return avx512 && amx_permitted();
#endif
  return false;
}

const Kernels& kernels_of(int64_t kernel) {
  STD_TORCH_CHECK(runs_here(kernel), "losa::sparse_linear: this CPU does not run kernel ", kernel,
                  " (0 portable, 1 avx2, 2 avx512, 3 amx); see losa::cpu_kernels");
#if defined(__x86_64__)
  if (kernel == kAvx2) return avx2_kernels();
  if (kernel == kAvx512) return avx512_kernels();
  if (kernel == kAmx) return amx_kernels();
#endif
  return portable_kernels();
}

int64_t cpu_kernels() {  // bit k set: kernel k runs here
  int64_t bits = 0;
  for (int64_t k = kPortable; k <= kAmx; ++k) bits |= int64_t(runs_here(k)) << k;
  return bits;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
Packed view(const Tensor& mask, const Tensor& values, const Tensor& offsets, const std::optional<Tensor>& scale, int64_t rows, int64_t columns) {
  const bool int8 = values.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(int8 || values.scalar_type() == ScalarType::BFloat16, "losa::sparse_linear: values are neither bfloat16 nor int8");
  STD_TORCH_CHECK(int8 == scale.has_value(), "losa::sparse_linear: int8 values come with a scale per row, bfloat16 values with none");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "losa::sparse_linear: negative shape");
  const int64_t strips = divide_up(rows, kStrip), words = divide_up(columns, int8 ? 4 : 2);
  for (const Tensor* t : {&mask, &values, &offsets})
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous(), "losa::sparse_linear: packed tensors must be contiguous, on the CPU");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.numel() == strips * words * (int8 ? 8 : 4),
                  "losa::sparse_linear: a [", rows, ", ", columns, "] weight has ", strips * words * (int8 ? 8 : 4), " mask bytes, found ", mask.numel());
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.numel() == strips + 1, "losa::sparse_linear: expected ", strips + 1,
                  " int64 offsets, found ", offsets.numel());
  Packed p{rows, columns, words, static_cast<const uint8_t*>(mask.const_data_ptr()), values.const_data_ptr(), values.numel(),
           static_cast<const int64_t*>(offsets.const_data_ptr()), nullptr};
  for (int64_t s = 0; s <= strips; ++s)
    STD_TORCH_CHECK(p.offsets[s] >= 0 && p.offsets[s] <= p.count, "losa::sparse_linear: offset ", p.offsets[s], " outside the ", p.count, " values");
  if (int8) {
    STD_TORCH_CHECK(scale->is_cpu() && scale->is_contiguous() && scale->scalar_type() == ScalarType::Float && scale->numel() == rows,
                    "losa::sparse_linear: expected ", rows, " float32 scales");
    p.scale = static_cast<const float*>(scale->const_data_ptr());
  }
  return p;
}

// Activations as integers: x = unit * q, |q| < 2^22, q in three signed base-256 digits. A number down to 2^-14 of its row's largest
// keeps all eight bits of a bfloat16; smaller ones lose what float32 sums beside the largest would lose too. A row that is not
// finite gets the unit NaN, and NaN for every output.
struct FixedPoint {
  std::vector<int8_t> digits;
  std::vector<int32_t> sums;
  std::vector<float> unit;

  FixedPoint(const bf16* x, int64_t tokens, int64_t columns, int64_t words) : digits(size_t(12 * tokens * words)), sums(size_t(3 * tokens)), unit(size_t(tokens)) {
    for (int64_t t = 0; t < tokens; ++t, x += columns) {
      uint32_t largest = 0;  // bits of a non-negative float order like the float
      for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, uint32_t(x[i] & 0x7fff));
      const bool finite = largest < 0x7f80;
      int exponent = 0;
      std::frexp(finite ? to_float(bf16(largest)) : 0.0f, &exponent);  // |x| < 2^exponent
      exponent = std::max(exponent, -100);                              // keeps the unit and its inverse normal floats
      const float steps = std::ldexp(1.0f, 22 - exponent);
      unit[size_t(t)] = finite ? std::ldexp(1.0f, exponent - 22) : NAN;
      for (int64_t i = 0; finite && i < columns; ++i) {
        int32_t q = int32_t(to_float(x[i]) * steps);
        int8_t* out = digits.data() + (i / 4 * tokens + t) * 12 + i % 4;
        for (int64_t d = 0; d < 3; ++d) {
          const int8_t digit = int8_t(q);
          out[4 * d] = digit;
          sums[size_t(3 * t + d)] += digit;
          q = (q - digit) >> 8;
        }
      }
    }
  }
};

struct Job {
  const Packed& p;
  const Kernels& k;
  int64_t tokens;
  Activations in;    // for streaming
  const bf16* x;     // [tokens, columns]
  const bf16* bias;  // [rows] or null
  bf16* y;           // [tokens, rows]
  std::atomic<bool> ok{true};

  // y of 16 rows from their float32 sums [tokens, sum_stride].
  void store(int64_t strip, const float* sums, int64_t sum_stride) const {
    const int64_t from = strip * kStrip, n = std::min(kStrip, p.rows - from);
    float scale[kStrip], shift[kStrip];
    for (int64_t r = 0; r < kStrip; ++r) {
      scale[r] = p.scale && r < n ? p.scale[from + r] : 1.0f;
      shift[r] = bias && r < n ? to_float(bias[from + r]) : 0.0f;
    }
    bf16 rounded[kStrip];
    for (int64_t t = 0; t < tokens; ++t, sums += sum_stride) {
      bf16* out = y + t * p.rows + from;
      k.round(sums, scale, shift, n == kStrip ? out : rounded);
      if (n < kStrip) std::memcpy(out, rounded, size_t(n) * sizeof(bf16));
    }
  }

  void stream(int64_t begin, int64_t end) {
    std::vector<float> out(size_t(tokens * kStrip));
    for (int64_t s = begin; s < end; ++s) {
      if (!k.stream(p, in, s, out.data())) ok = false;
      store(s, out.data(), kStrip);
    }
  }

  // `x` is by blocks of columns: [blocks, tokens, 2 * kTilePairs], see by_tiles.
  void tiles(int64_t begin, int64_t end) {  // in pairs of strips
    alignas(64) bf16 tile[2][kTilePairs * kWordBits16];
    alignas(64) float sums[kTileTokens * 2 * kStrip] = {};  // what a weight of no columns sums to
    const int64_t strips = divide_up(p.rows, kStrip), pairs = padded_pairs();
    for (int64_t s = 2 * begin; s < std::min(2 * end, strips); s += 2) {
      const int64_t n_strips = std::min<int64_t>(2, strips - s);
      Cursor cursor[2] = {{p.offsets[s], true}, {p.offsets[s + n_strips - 1], true}};
      for (int64_t first = 0; first < pairs; first += kTilePairs) {
        const int64_t n = std::min(kTilePairs, pairs - first);
        for (int64_t j = 0; j < n_strips; ++j) k.decode(p, cursor[j], s + j, first, n, tile[j]);
        for (int64_t j = 0; j < n_strips; ++j) p.prefetch(cursor[j].value, n);  // memory works on the next tile meanwhile
        k.multiply(tile[0], tile[n_strips - 1], n, x + 2 * first * tokens, tokens, first > 0, sums);
      }
      for (int64_t j = 0; j < n_strips; ++j) {
        if (!cursor[j].ok || cursor[j].value != p.offsets[s + j + 1]) ok = false;
        store(s + j, sums + j * kStrip, 2 * kStrip);
      }
    }
  }

  int64_t padded_pairs() const { return p.is_int8() ? 2 * p.words : p.words; }

  // Strips [begin, end) as rows of the dense panel [rows, columns] that begins with strip `first_strip`.
  template <typename T>
  void expand(int64_t first_strip, int64_t begin, int64_t end, T* panel) {
    alignas(64) bf16 tile[kTilePairs * kWordBits16];
    for (int64_t s = begin; s < end; ++s) {
      Cursor cursor{p.offsets[s], true};
      const int64_t rows = std::min(kStrip, p.rows - s * kStrip);
      for (int64_t first = 0; first < padded_pairs(); first += kTilePairs) {
        const int64_t n = std::min(kTilePairs, padded_pairs() - first), columns = std::min(2 * n, p.columns - 2 * first);
        k.decode(p, cursor, s, first, n, tile);
        for (int64_t r = 0; r < rows; ++r) {
          T* out = panel + ((s - first_strip) * kStrip + r) * p.columns + 2 * first;
          const float scale = p.scale ? p.scale[s * kStrip + r] : 1.0f;
          for (int64_t c = 0; c < columns; ++c) {
            const bf16 w = tile[(c / 2 * kStrip + r) * 2 + c % 2];
            if constexpr (sizeof(T) == sizeof(float))
              out[c] = to_float(w) * scale;
            else
              out[c] = p.scale ? to_bf16(to_float(w) * scale) : w;
          }
        }
      }
      if (!cursor.ok || cursor.value != p.offsets[s + 1]) ok = false;
    }
  }
};

// Strips a thread gets at least: below some 64 thousand weights, waking a thread costs more than it does.
int64_t grain(const Packed& p, int64_t rows) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, rows * p.columns)); }

constexpr int64_t kPanelBytes = 2 << 20;  // a panel stays in the L2 cache, or at worst the L3

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x W^T for panels of rows, by torch's GEMM; in float32 where it has no fast one for bfloat16.
void by_panels(Job& job, const Tensor& x_in, const std::optional<Tensor>& bias) {
  const Packed& p = job.p;
  const ScalarType dtype = job.k.bf16_gemm ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t strips = divide_up(p.rows, kStrip), row_bytes = std::max<int64_t>(1, p.columns * (job.k.bf16_gemm ? 2 : 4));
  const int64_t step = std::max<int64_t>(1, kPanelBytes / (row_bytes * kStrip));
  const Tensor x = torch::stable::to(x_in, dtype);
  for (int64_t s = 0; s < strips; s += step) {
    const int64_t last = std::min(strips, s + step), from = s * kStrip, rows = std::min(p.rows, last * kStrip) - from;
    Tensor panel = torch::stable::new_empty(x, {rows, p.columns});
    void* out = panel.mutable_data_ptr();
    torch::stable::parallel_for(s, last, grain(p, kStrip), [&](int64_t begin, int64_t end) {
      if (job.k.bf16_gemm)
        job.expand(s, begin, end, static_cast<bf16*>(out));
      else
        job.expand(s, begin, end, static_cast<float*>(out));
    });
    std::optional<Tensor> shift;
    if (bias) shift = torch::stable::to(torch::stable::narrow(const_cast<Tensor&>(*bias), 0, from, rows), dtype);
    const Tensor product = torch::stable::to(linear(x, panel, shift), ScalarType::BFloat16);
    const bf16* y = static_cast<const bf16*>(product.const_data_ptr());
    for (int64_t t = 0; t < job.tokens; ++t) std::memcpy(job.y + t * p.rows + from, y + t * rows, size_t(rows) * sizeof(bf16));
  }
}

void by_streaming(Job& job) {
  const Packed& p = job.p;
  const int64_t pairs = job.padded_pairs();
  std::vector<bf16> interleaved;
  std::optional<FixedPoint> fixed;
  job.in = {job.tokens, job.x, nullptr, nullptr, nullptr};
  if (p.is_int8() && job.k.fixed_point) {
    fixed.emplace(job.x, job.tokens, p.columns, p.words);
    job.in = {job.tokens, nullptr, fixed->digits.data(), fixed->sums.data(), fixed->unit.data()};
  } else if (job.tokens > 1 || p.columns != 2 * pairs) {
    interleaved.assign(size_t(2 * pairs * job.tokens), 0);
    torch::stable::parallel_for(0, divide_up(p.columns, 2), std::max<int64_t>(1, 8192 / job.tokens), [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < job.tokens; ++t) {
        const bf16* row = job.x + t * p.columns;
        for (int64_t i = begin; i < std::min(end, p.columns / 2); ++i) std::memcpy(&interleaved[size_t((i * job.tokens + t) * 2)], row + 2 * i, 2 * sizeof(bf16));
        if (end > p.columns / 2) interleaved[size_t((p.columns / 2 * job.tokens + t) * 2)] = row[p.columns - 1];  // an odd last column
      }
    });
    job.in.pairs = interleaved.data();
  }
  torch::stable::parallel_for(0, divide_up(p.rows, kStrip), grain(p, kStrip), [&](int64_t begin, int64_t end) { job.stream(begin, end); });
}

// x by blocks of columns, [blocks, tokens, 2 * kTilePairs], zeros past the last column: rows of a block are neighbours in memory.
// Rows 2^n bytes apart would fall on the same few cache sets.
void by_tiles(Job& job) {
  const Packed& p = job.p;
  const bf16* x = job.x;
  bf16* y = job.y;
  const int64_t width = 2 * kTilePairs, blocks = divide_up(p.columns, width), tokens = job.tokens, chunks = divide_up(tokens, kTileTokens);
  const std::unique_ptr<bf16[]> blocked(new bf16[size_t(blocks * width * divide_up(tokens, chunks))]);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t from = tokens * c / chunks, n = tokens * (c + 1) / chunks - from;
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, 64 / n), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t filled = std::min(width, p.columns - b * width);
        for (int64_t t = 0; t < n; ++t) {
          bf16* row = blocked.get() + (b * n + t) * width;
          std::memcpy(row, x + (from + t) * p.columns + b * width, size_t(filled) * sizeof(bf16));
          std::memset(row + filled, 0, size_t(width - filled) * sizeof(bf16));
        }
      }
    });
    job.x = blocked.get();
    job.tokens = n;
    job.y = y + from * p.rows;
    torch::stable::parallel_for(0, divide_up(p.rows, 2 * kStrip), grain(p, 2 * kStrip), [&](int64_t begin, int64_t end) { job.tiles(begin, end); });
  }
}

Tensor sparse_linear(const Tensor& x_in, const Tensor& mask, const Tensor& values, const Tensor& offsets, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& bias, int64_t rows, int64_t kernel) {
  const Kernels& k = kernels_of(kernel);
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == ScalarType::BFloat16 && x_in.dim() == 2,
                  "losa::sparse_linear: x must be a bfloat16 [tokens, columns] tensor on the CPU");
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const int64_t tokens = x.size(0), columns = x.size(1);
  const Packed p = view(mask, values, offsets, scale, rows, columns);
  if (bias)
    STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16 && bias->numel() == rows,
                    "losa::sparse_linear: expected ", rows, " bfloat16 biases");
  Tensor y = torch::stable::new_empty(x, {tokens, rows});
  if (tokens == 0 || rows == 0) return y;

  Job job{p, k, tokens, {}, static_cast<const bf16*>(x.const_data_ptr()),
          bias ? static_cast<const bf16*>(bias->const_data_ptr()) : nullptr, static_cast<bf16*>(y.mutable_data_ptr())};
  // 255 * 128 * kExactColumns fits the 32 bits in which the digits of fixed-point activations are summed.
  constexpr int64_t kExactColumns = 65536;
  const int64_t streamed = !p.is_int8() ? k.stream_tokens : columns <= kExactColumns ? k.stream_tokens_int8 : 0;
  if (tokens <= streamed)
    by_streaming(job);
  else if (tokens <= k.tile_tokens)
    by_tiles(job);
  else
    by_panels(job, x, bias);
  STD_TORCH_CHECK(job.ok, "losa::sparse_linear: the masks and offsets of this packed weight disagree; the file is corrupt");
  return y;
}

}  // namespace
}  // namespace losa

STABLE_TORCH_LIBRARY(losa, m) {
  m.def("sparse_linear(Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor? scale, Tensor? bias, int rows, int kernel) -> Tensor");
  m.def("cpu_kernels() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(losa, CPU, m) { m.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear)); }
STABLE_TORCH_LIBRARY_IMPL(losa, CompositeExplicitAutograd, m) { m.impl("cpu_kernels", TORCH_BOX(&losa::cpu_kernels)); }
