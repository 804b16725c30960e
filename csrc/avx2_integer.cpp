// int8 and int4 values on AVX2. Sixteen weights at a time, four rows of a word: a shuffle spreads the stored values by
// two bytes of the mask, they are widened to 16 bits, and an integer dot product of pairs multiplies them by
// activations in fixed point. Sums are exact, and no weight is converted to float; int4 values become int8 by a look-up
// of 16 levels, *stored* values only, and their sums are scaled once for each 64 columns.
//
// For sixteen weights: two bytes of the mask, the shuffle's control as the sum of two table rows, where their values
// begin (two instructions), the shuffle of them, widening, dot product, sum: 59 instructions for a word of
// 64, which bind, not memory (docs/LOG.md).
#include "kernels.h"

#if defined(__x86_64__)
#include <algorithm>

#include "avx2.h"
LOSA_TARGET_BEGIN(LOSA_AVX2)

namespace losa {
namespace {

constexpr int kQuarters = 4;  // of a word: 4 rows x 4 columns, 16 bits of the mask

// Shuffle controls that send the next values, in order, to the bytes whose bit of the mask is set, and zero to the
// others: the sum of a row for bits 0 to 7 and one for bits 8 to 15, whose values begin where the first ones end. The
// high bit of a control means zero.
struct Controls {
  alignas(16) uint8_t low[256][16], high[256][16];
  constexpr Controls() : low(), high() {
    for (int m = 0; m < 256; ++m) {
      int from = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool stored = (m >> bit) & 1;
        low[m][bit] = high[m][8 + bit] = stored ? uint8_t(from) : 0x80;
        from += stored;
      }
      for (int bit = 0; bit < 8; ++bit) low[m][8 + bit] = uint8_t(from);
    }
  }
};
constexpr Controls kControls;

// A quarter of a word, by its two bytes of the mask.
inline __m128i expanded(const int8_t* v, const uint8_t* mask) {
  const __m128i control = _mm_add_epi8(load128(kControls.low[mask[0]]), load128(kControls.high[mask[1]]));
  return _mm_shuffle_epi8(load128(v), control);
}

// Values before quarter q of a word.
inline int64_t before(uint64_t mask, int q) { return __builtin_popcountll(_bzhi_u64(mask, unsigned(16 * q))); }

// Reads codes for Feed, in order; up to 15 bytes and 31 numbers too many.
struct Unpack {
  inline void operator()(Bits<4>, const uint8_t* codes, int64_t n, int8_t* out) const {
    const __m128i table = load128(kNumbers<4>.of), low = _mm_set1_epi8(15);
    for (int64_t i = 0; i < n; i += 16) {
      const __m128i both = load128(codes + i);
      const __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(both, low));
      const __m128i second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi8(first, second));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i + 16), _mm_unpackhi_epi8(first, second));
    }
  }
};

// level_of of a quarter's four rows, twice each, as its sums are.
inline __m256 levels_of(const uint8_t* groups, int q) {
  const __m128i four = _mm_cvtsi32_si128(load<int32_t>(groups + 4 * q));
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(four, four));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bytes, 19), _mm256_set1_epi32((127 - 15) << 23)));
}

// ---- one to four tokens ------------------------------------------------------------------------------------------

constexpr float kSecond = 32768.0f;  // a step of a number's second digit

// T tokens of D digits, 16 bits each. A quarter has eight sums, two for a row.
template <ValueType V, int T, int D>
bool stream_as(const Packed& p, const Activations& in, int64_t strip, float* out) {
  constexpr int kSums = T * D;
  constexpr int kPart = kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1;      // quarters of a walk, so that sums stay in registers
  constexpr int64_t kDrain = row_of(V).grouped ? kBlock : kFeed;  // words whose sums an int32 holds, of one scale
  alignas(32) float total[T][kQuarters][8] = {};
  Feed feed(p, p.offsets[strip]);
  for (int64_t first = 0; first < p.words; first += kDrain) {
    const int64_t n = std::min(kDrain, p.words - first);
    const uint8_t* next = p.mask_of(strip, first);
    const char* values = static_cast<const char*>(p.values) + feed.value * row_of(V).bits / 8;
    const int64_t bytes = feed.next<V>(next, n, Unpack()) * row_of(V).bits / 8;
    for (int q_0 = 0; q_0 < kQuarters; q_0 += kPart) {
      __m256i a[kPart][kSums];
      for (auto& quarter : a)
        for (__m256i& sum : quarter) sum = _mm256_setzero_si256();
      const uint8_t* mask = feed.mask;
      const int8_t* v = feed.values;
      for (int64_t block = 0; block < n; block += kBlock) {
        const int8_t* x = in.bytes + (first + block) / kBlock * kSums * 2 * kGroup;
        const uint8_t* end = feed.mask + 8 * std::min(n, block + kBlock);
        if (q_0 == 0) {
          ask_for(next + 8 * block + 1024);
          ask_for(next + 8 * block + 1088);
          for (int64_t b = bytes * block / n; b < bytes * (block + kBlock) / n; b += 64) ask_for(values + kAhead + b);
        }
        for (; mask < end; mask += 8, x += 8) {
          const uint64_t m = load<uint64_t>(mask);
#pragma GCC unroll 4
          for (int q = 0; q < kPart; ++q) {
            const __m256i w = _mm256_cvtepi8_epi16(expanded(v + before(m, q_0 + q), mask + 2 * (q_0 + q)));
#pragma GCC unroll 8
            for (int s = 0; s < kSums; ++s) {
              const __m256i x_s = _mm256_set1_epi64x(load<int64_t>(x + s * 2 * kGroup));
              a[q][s] = _mm256_add_epi32(a[q][s], _mm256_madd_epi16(w, x_s));
            }
          }
          v += __builtin_popcountll(m);
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < kPart; ++q) {
        __m256 level = _mm256_set1_ps(1.0f);
        if constexpr (row_of(V).grouped) level = levels_of(p.groups_of(strip, first / kBlock), q_0 + q);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          __m256 sum = _mm256_cvtepi32_ps(a[q][t]);
          if constexpr (D == 2) sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a[q][T + t]), _mm256_set1_ps(kSecond), sum);
          float* to = total[t][q_0 + q];
          _mm256_store_ps(to, _mm256_fmadd_ps(sum, level, _mm256_load_ps(to)));
        }
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kStrip; ++r) {
      const float* both = total[t][r / 4] + r % 4 * 2;
      out[t * kStrip + r] = (both[0] + both[1]) * in.unit[t];
    }
  return feed.ok && feed.value == p.offsets[strip + 1];
}

// ---- tiles of bfloat16 -------------------------------------------------------------------------------------------

// Eight weights, two rows of four columns, as 32-bit lanes of bfloat16, times the scales of their rows. Exact: an
// integer of 8 bits is a bfloat16, and so is one of five significant bits times one of three.
template <ValueType V>
inline __m256i half_floats(__m128i weights, const float* level) {
  __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(weights));
  if constexpr (row_of(V).grouped) w = _mm256_mul_ps(w, _mm256_load_ps(level));
  return _mm256_srli_epi32(_mm256_castps_si256(w), 16);
}

// One word as two tiles, of its first and its last two columns.
template <ValueType V>
inline void put(const int8_t* v, const uint8_t* mask, const float (*level)[8], bf16* tile) {
  const uint64_t m = load<uint64_t>(mask);
#pragma GCC unroll 4
  for (int q = 0; q < kQuarters; ++q) {
    const __m128i w = expanded(v + before(m, q), mask + 2 * q);
    const __m256i rows_01 = half_floats<V>(w, level[2 * q]);
    const __m256i rows_23 = half_floats<V>(_mm_unpackhi_epi64(w, w), level[2 * q + 1]);
    // Packing leaves 32-bit lanes, two columns each, of rows 0 0 2 2 1 1 3 3: even lanes first columns, odd lanes last
    // columns.
    const __m256i both =
        _mm256_permutevar8x32_epi32(_mm256_packus_epi32(rows_01, rows_23), _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + 8 * q), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + kWordBits16 + 8 * q), _mm256_extracti128_si256(both, 1));
  }
}

template <ValueType V>
void decode_as(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  alignas(32) float level[kStrip / 2][8] = {};  // of two rows, for each of their four columns
  Feed feed(p, cursor.value);
  for (int64_t i = 0; i < pairs / 2; i += kBlock) {
    const int64_t word = first / 2 + i, n = std::min(kBlock, pairs / 2 - i);
    feed.next<V>(p.mask_of(strip, word), n, Unpack());
    if constexpr (row_of(V).grouped)
      for (int64_t r = 0; r < kStrip; ++r)
        std::fill_n(level[r / 2] + r % 2 * 4, 4, level_of(p.groups_of(strip, word / kBlock)[r]));
    const int8_t* v = feed.values;
    for (int64_t j = 0; j < n; ++j) {
      const uint8_t* mask = feed.mask + 8 * j;
      put<V>(v, mask, level, tile + (i + j) * kWordBits8);
      v += __builtin_popcountll(load<uint64_t>(mask));
    }
  }
  cursor = {feed.value, cursor.ok && feed.ok};
}

template <ValueType V, int D>
constexpr StripStream kStream[kAvx2IntegerTokens] = {stream_as<V, 1, D>, stream_as<V, 2, D>, stream_as<V, 3, D>,
                                                     stream_as<V, 4, D>};

}  // namespace

bool avx2_stream_integers(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return with_type<ValueType::kInt8>(p.type, [&](auto type) {
    return (in.digits == 1 ? kStream<type, 1> : kStream<type, 2>)[in.tokens - 1](p, in, strip, out);
  });
}

void avx2_decode_integers(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  with_type<ValueType::kInt8>(p.type, [&](auto type) { decode_as<type>(p, cursor, strip, first, pairs, tile); });
}

// Digits of 15 bits, signed as the weights are, so that nobody needs the sums.
void avx2_digits(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int64_t, int8_t* bytes,
                 int32_t*) {
  const __m256 times = _mm256_set1_ps(steps);
  for (int64_t from = 0; from < columns; from += kGroup) {
    alignas(32) bf16 block[kGroup] = {};
    std::memcpy(block, x + from, size_t(std::min(kGroup, columns - from)) * sizeof(bf16));
    for (int64_t i = 0; i < kGroup; i += 16) {
      __m256i q[2];
      for (int h = 0; h < 2; ++h) q[h] = _mm256_cvtps_epi32(_mm256_mul_ps(floats(block + i + 8 * h), times));
      for (int64_t d = 0; d < digits; ++d) {
        __m256i digit[2] = {q[0], q[1]};
        if (d + 1 < digits)
          for (__m256i& half : digit) half = _mm256_srai_epi32(_mm256_slli_epi32(half, 17), 17);
        const __m256i packed = _mm256_packs_epi32(digit[0], digit[1]);
        int8_t* to = bytes + ((from / kGroup * digits + d) * tokens * kGroup + i) * 2;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
        for (__m256i& half : q) half = _mm256_srai_epi32(_mm256_add_epi32(half, _mm256_set1_epi32(1 << 14)), 15);
      }
    }
  }
}

}  // namespace losa
LOSA_TARGET_END
#endif
