// Plain C++ for every machine: the same walk over masks and values, one weight at a time. A compiler turns the inner loops over
// the 16 rows into whatever vectors the baseline has (SSE2, NEON).
#include <cstring>

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

template <int kGroup, typename Load>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out, Load load) {
  Cursor cursor{p.offsets[strip], true};
  const int64_t bytes = 2 * kGroup;
  for (int64_t i = 0; i < in.tokens * kStrip; ++i) out[i] = 0;
  for (int64_t w = 0; w < p.words; ++w)
    visit_word(mask_word(p.mask + (strip * p.words + w) * bytes, bytes), cursor, p.count, [&](int bit, int64_t at) {
      const float value = load(at);
      for (int64_t t = 0; t < in.tokens; ++t)
        out[t * kStrip + bit / kGroup] += value * to_float(in.pairs[((w * kGroup + bit % kGroup) / 2 * in.tokens + t) * 2 + bit % 2]);
    });
  return cursor.ok && cursor.value == p.offsets[strip + 1];
}

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  const auto* v8 = static_cast<const int8_t*>(p.values);
  const auto* v16 = static_cast<const bf16*>(p.values);
  if (p.is_int8()) return stream_as<4>(p, in, strip, out, [&](int64_t i) { return float(v8[i]); });
  return stream_as<2>(p, in, strip, out, [&](int64_t i) { return to_float(v16[i]); });
}

template <int kGroup, typename Load>
void decode_as(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile, Load load) {
  constexpr int kPairs = kGroup / 2;  // column pairs of a word
  const int64_t bytes = 2 * kGroup;
  std::memset(tile, 0, size_t(pairs * kWordBits16) * sizeof(bf16));
  for (int64_t w = 0; w < pairs / kPairs; ++w)
    visit_word(mask_word(p.mask + (strip * p.words + first / kPairs + w) * bytes, bytes), cursor, p.count, [&](int bit, int64_t at) {
      const int row = bit / kGroup, column = bit % kGroup;
      tile[((w * kPairs + column / 2) * kStrip + row) * 2 + column % 2] = load(at);
    });
}

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  const auto* v8 = static_cast<const int8_t*>(p.values);
  const auto* v16 = static_cast<const bf16*>(p.values);
  if (p.is_int8()) return decode_as<4>(p, cursor, strip, first, pairs, tile, [&](int64_t i) { return to_bf16(v8[i]); });
  decode_as<2>(p, cursor, strip, first, pairs, tile, [&](int64_t i) { return v16[i]; });
}

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate, float* sum) {
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
  static constexpr Kernels kernels{"portable", 2, 2, 16, false, false, stream, decode, multiply, round};
  return kernels;
}

}  // namespace losa
