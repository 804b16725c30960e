// Plain C++ for every machine: the same walk over masks and values, one weight at a time. A compiler turns the inner
// loops over the 16 rows into whatever vectors the baseline has (SSE2, NEON).
#include <cmath>
#include <cstring>

#include "block.h"
#include "kernels.h"

namespace losa {
namespace {

inline uint64_t mask_word(const uint8_t* p, int64_t bytes) {  // little endian on any machine
  uint64_t m = 0;
  for (int64_t i = 0; i < bytes; ++i) m |= uint64_t(p[i]) << (8 * i);
  return m;
}

// Calls visit(bit, value index) for every stored weight of a word.
template <typename Visit>
inline void visit_word(uint64_t m, Cursor& cursor, int64_t count, Visit visit) {
  if (count - cursor.value < __builtin_popcountll(m)) {
    cursor.ok = false;
    return;
  }
  for (; m != 0; m &= m - 1) visit(__builtin_ctzll(m), cursor.value++);
}

// The value at `at`, in `row` of a strip and the `word` of that row.
template <ValueType V>
inline float load(const Packed& p, int64_t strip, int64_t word, int64_t row, int64_t at) {
  if constexpr (!is_integer(V))
    return to_float(static_cast<const bf16*>(p.values)[at]);
  else if constexpr (!row_of(V).grouped)
    return float(number<V>(p.values, at));
  else
    return float(number<V>(p.values, at)) * level_of(p.groups_of(strip, word / kBlock)[row]);
}

template <ValueType V>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out) {
  constexpr int64_t kColumns = row_of(V).columns;
  Cursor cursor{p.offsets[strip], true};
  for (int64_t i = 0; i < in.tokens * kStrip; ++i) out[i] = 0;
  for (int64_t w = 0; w < p.words; ++w)
    visit_word(mask_word(p.mask_of(strip, w), 2 * kColumns), cursor, p.count, [&](int bit, int64_t at) {
      const float value = load<V>(p, strip, w, bit / kColumns, at);
      for (int64_t t = 0; t < in.tokens; ++t)
        out[t * kStrip + bit / kColumns] +=
            value * to_float(in.pairs[((w * kColumns + bit % kColumns) / 2 * in.tokens + t) * 2 + bit % 2]);
    });
  return cursor.ok && cursor.value == p.offsets[strip + 1];
}

template <ValueType V>
void decode_as(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  constexpr int64_t kColumns = row_of(V).columns, kPairs = kColumns / 2;  // column pairs of a word
  std::memset(tile, 0, size_t(pairs * kWordBits16) * sizeof(bf16));
  for (int64_t i = 0; i < pairs / kPairs; ++i) {
    const int64_t w = first / kPairs + i;
    visit_word(mask_word(p.mask_of(strip, w), 2 * kColumns), cursor, p.count, [&](int bit, int64_t at) {
      const int64_t row = bit / kColumns, column = bit % kColumns;
      bf16& out = tile[((i * kPairs + column / 2) * kStrip + row) * 2 + column % 2];
      if constexpr (is_integer(V))
        out = to_bf16(load<V>(p, strip, w, row, at));
      else
        out = static_cast<const bf16*>(p.values)[at];
    });
  }
}

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return with_type<ValueType::kBFloat16>(p.type, [&](auto type) { return stream_as<type>(p, in, strip, out); });
}

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  with_type<ValueType::kBFloat16>(p.type, [&](auto type) { decode_as<type>(p, cursor, strip, first, pairs, tile); });
}

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate,
              float* sum) {
  for (int64_t t = 0; t < tokens; ++t, sum += 32) {
    float a[32] = {};
    if (accumulate) std::memcpy(a, sum, sizeof a);
    for (int64_t i = 0; i < pairs; ++i) {
      const float x_0 = to_float(x[t * 2 * kTilePairs + 2 * i]), x_1 = to_float(x[t * 2 * kTilePairs + 2 * i + 1]);
      const bf16 *w_0 = tile_0 + i * kWordBits16, *w_1 = tile_1 + i * kWordBits16;
      for (int r = 0; r < 16; ++r) a[r] += to_float(w_0[2 * r]) * x_0 + to_float(w_0[2 * r + 1]) * x_1;
      for (int r = 0; r < 16; ++r) a[16 + r] += to_float(w_1[2 * r]) * x_0 + to_float(w_1[2 * r + 1]) * x_1;
    }
    std::memcpy(sum, a, sizeof a);
  }
}

void round(const float* sum, const float* scale, const float* shift, bf16* y) {
  for (int r = 0; r < kStrip; ++r) y[r] = to_bf16(sum[r] * scale[r] + shift[r]);
}

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels{
      "portable",         2,      2,        16,      false, 1,          true,
      each_strip<stream>, decode, multiply, nullptr, round, gate_block, each_head<attend_block>,
      dots_block};
  return kernels;
}

}  // namespace losa
