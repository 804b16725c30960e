// AMX; tested on an emulator, and since 2026-11-25 also run and timed on a processor that has it (docs/LOG.md).
//
// The streaming and decoding of avx512.cpp, and a matrix unit for the tiles: one instruction multiplies 16 tokens x 32
// columns by 32 columns x 16 rows of bfloat16. Sapphire Rapids and later.
//
// A decoded tile, [pairs, 16 rows, 2 columns], is already what the unit wants of its second factor: 16 pairs are one
// tile register of 16 rows of 64 bytes. Its state is 8 KiB a thread that Linux hands out on request only
// (amx_permitted), and what shape each register has is up to us: oneDNN, which torch also calls, has shapes of its own,
// so every `multiply` sets and releases them.
//
// The tests run this file on any x86-64 by defining the _tile_ intrinsics in plain C++ first:
// tests/csrc/amx_emulator.h.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512.h"
LOSA_TARGET_BEGIN("amx-tile,amx-bf16,amx-int8")

namespace losa {
namespace {

constexpr int64_t kStep = 16;                               // column pairs of a tile register
constexpr int64_t kStride = 2 * kTilePairs * sizeof(bf16);  // bytes between tokens of x
constexpr int64_t kSumStride = 2 * kStrip * sizeof(float);  // and between tokens of the sums

// gcc 12 does not know that loading a configuration or a tile reads memory (beyond the first 8 bytes of a
// configuration), and drops the stores that filled it. Handing out the address before the load keeps them.
inline void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64, "what ldtilecfg reads");

// Registers 0 to 3 are sums, of two blocks of tokens by two strips; 4 and 5 are the blocks of tokens, 6 and 7 the
// strips. Four sums hide the latency of the multiplication, 52 cycles for one that starts every 16. Also zeros all of
// them.
void configure(int64_t tokens_0, int64_t tokens_1) {
  Shapes s;
  const int64_t rows[8] = {tokens_0, tokens_0, tokens_1, tokens_1, tokens_0, tokens_1, kStep, kStep};
  for (int i = 0; i < 8; ++i) {
    s.rows[i] = uint8_t(rows[i]);
    s.row_bytes[i] = rows[i] > 0 ? 64 : 0;
  }
  written(&s);
  _tile_loadconfig(&s);
}

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate,
              float* sum) {
  // The pairs past the last whole step, filled up with zeros. They meet whatever follows in x, which is zeros too.
  alignas(64) bf16 rest[2][kStep * kWordBits16];
  const int64_t whole = pairs / kStep * kStep;
  if (whole < pairs) {
    const size_t filled = size_t(pairs - whole) * kWordBits16;
    for (int j = 0; j < 2; ++j) {
      std::memcpy(rest[j], (j == 0 ? tile_0 : tile_1) + whole * kWordBits16, filled * sizeof(bf16));
      std::memset(rest[j] + filled, 0, sizeof rest[j] - filled * sizeof(bf16));
    }
    written(rest);
  }
  for (int64_t from = 0; from < tokens; from += 32) {
    const int64_t n_0 = std::min<int64_t>(16, tokens - from), n_1 = std::min<int64_t>(16, tokens - from - n_0);
    const bf16* x_0 = x + from * 2 * kTilePairs;
    const bf16* x_1 = x_0 + 16 * 2 * kTilePairs;
    float* sum_0 = sum + from * 2 * kStrip;
    float* sum_1 = sum_0 + 16 * 2 * kStrip;
    configure(n_0, n_1);
    if (accumulate) {
      _tile_loadd(0, sum_0, kSumStride);
      _tile_loadd(1, sum_0 + kStrip, kSumStride);
      if (n_1 > 0) {
        _tile_loadd(2, sum_1, kSumStride);
        _tile_loadd(3, sum_1 + kStrip, kSumStride);
      }
    }
    for (int64_t i = 0; i < pairs; i += kStep) {
      _tile_loadd(4, x_0 + 2 * i, kStride);
      _tile_loadd(6, i < whole ? tile_0 + i * kWordBits16 : rest[0], kWordBits16 * sizeof(bf16));
      _tile_loadd(7, i < whole ? tile_1 + i * kWordBits16 : rest[1], kWordBits16 * sizeof(bf16));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (n_1 > 0) {
        _tile_loadd(5, x_1 + 2 * i, kStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sum_0, kSumStride);
    _tile_stored(1, sum_0 + kStrip, kSumStride);
    if (n_1 > 0) {
      _tile_stored(2, sum_1, kSumStride);
      _tile_stored(3, sum_1 + kStrip, kSumStride);
    }
  }
  _tile_release();
}

// ---- int8 and int4 values, a few tokens --------------------------------------------------------------------------

constexpr int64_t kFew = 3;  // tokens up to which multiplying in registers is faster than filling the unit

// 0 to 2 are sums, one for each digit of the activations; 3 to 5 are those digits, tokens x 64 columns; 6 is 16 words.
void configure_bytes(int64_t tokens) {
  Shapes s;
  for (int i = 0; i < 7; ++i) {
    s.rows[i] = uint8_t(i < 6 ? tokens : kBlock);
    s.row_bytes[i] = 64;
  }
  written(&s);
  _tile_loadconfig(&s);
}

// Expanded words of integers are what the unit wants of its second factor: 16 of them are 64 columns.
bool stream_strip(const Packed& p, const Activations& in, int64_t strip, float* out) {
  const int64_t drain = span_of(p.type, in.digits) * kBlock, digit = in.tokens * kGroup;
  alignas(64) int8_t bytes[kFeed * kWordBits8];
  alignas(64) int32_t sums[3][kIntegerTokens * kStrip];
  Cursor cursor{p.offsets[strip], true};
  std::fill(out, out + in.tokens * kStrip, 0.0f);
  configure_bytes(in.tokens);
  for (int64_t first = 0; first < p.words; first += kFeed) {
    const int64_t fed = std::min(kFeed, p.words - first);
    expand_integers(p, cursor, p.mask_of(strip, first), fed, bytes);
    written(bytes);  // words past the last one meet digits that are zero
    for (int64_t w = 0; w < fed; w += drain) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int64_t b = w; b < std::min(fed, w + drain); b += kBlock) {
        const int8_t* x = in.bytes + (first + b) / kBlock * in.digits * digit;
        _tile_loadd(6, bytes + b * kWordBits8, 64);
        _tile_loadd(3, x, 64);
        _tile_dpbssd(0, 3, 6);
        _tile_loadd(4, x + digit, 64);
        _tile_dpbssd(1, 4, 6);
        if (in.digits == 3) {
          _tile_loadd(5, x + 2 * digit, 64);
          _tile_dpbssd(2, 5, 6);
        }
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      add_sums(p, in, strip, first + w, sums[0], out);
    }
  }
  _tile_release();
  times_units(in, out);
  return cursor.ok && cursor.value == p.offsets[strip + 1];
}

bool stream(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out) {
  const bool unit = is_integer(p.type) && in.tokens > kFew;
  return (unit ? each_strip<stream_strip> : avx512_kernels().stream)(p, in, strip, n, out);
}

}  // namespace
}  // namespace losa
LOSA_TARGET_END

namespace losa {

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.tile_tokens = kTileTokens;  // past that, torch's own GEMM uses the same unit, and reads each decoded weight once
    k.stream = stream;
    k.bf16_tokens = 5;  // past that, tiles and the matrix unit are faster (docs/LOG.md)
    k.multiply = multiply;
    return k;
  }();
  return kernels;
}

const Kernels& amx_a8_kernels() {
  static const Kernels kernels = [] {
    Kernels k = amx_kernels();
    k.name = "amx-a8";
    k.bytes = avx512_a8_kernels().bytes;
    return k;
  }();
  return kernels;
}

bool amx_permitted() {
  static const bool permitted = [] {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: there is an xgetbv
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1))
      return false;  // AMX-BF16, -TILE, -INT8
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;  // the system saves tile shapes and tile data
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return permitted;
}

}  // namespace losa
#endif
