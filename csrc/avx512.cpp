// AVX-512: VBMI2 expands one word into one register, the bfloat16 (or VNNI byte) dot product multiplies it by a
// broadcast of the matching activations. Needs F, BW, VL, VBMI, VBMI2, VNNI, VPOPCNTDQ and BF16: Zen 4 and later,
// Sapphire Rapids and later.
//
// Cost of a word of 32 bfloat16 weights and one token: mask load, population count, value load, expand, broadcast, dot
// product, about 4 cycles, while memory delivers the word's 23 bytes (70 % zeros) in 4 to 8. Integers:
// avx512_integer.cpp.
#include "kernels.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cmath>

#include "avx512.h"
LOSA_TARGET_BEGIN(LOSA_AVX512)
#include "block.h"

namespace losa {
namespace {

// The next word of a strip, expanded. `kSafe` checks every word against the end of the values.
template <bool kSafe>
struct Reader16 {
  const bf16* v;
  const bf16* end;
  bool ok = true;
  inline __m512i next(const uint8_t* mask) {
    const uint32_t m = load32(mask);
    const int64_t n = __builtin_popcount(m);
    if constexpr (kSafe) {
      if (end - v < n) {
        ok = false;
        return _mm512_setzero_si512();
      }
      const __m512i packed = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, unsigned(n)), v);
      v += n;
      return expand16(m, packed);
    }
    const __m512i packed = _mm512_loadu_si512(v);
    v += n;
    return expand16(m, packed);
  }
  inline void ahead() const {
    _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead + 64, _MM_HINT_T0);
  }
};
inline uint32_t pair_of(const bf16* x, int64_t i) { return load32(x + 2 * i); }

// ---- one to sixteen tokens, bfloat16 -----------------------------------------------------------------------------

template <int T>
struct Sums16 {
  static constexpr int kChains = T <= 4   ? 4
                                 : T <= 8 ? 2
                                          : 1;  // enough independent sums to hide the dot product's latency, 6 cycles
  __m512 a[T][kChains];
};

template <int T, bool kSafe>
inline void words16(Reader16<kSafe>& reader, const uint8_t* mask, int64_t first, int64_t n, const Activations& in,
                    Sums16<T>& sums) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    reader.ahead();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i w = reader.next(mask + 4 * (i + j));
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        __m512& a = sums.a[t][j % Sums16<T>::kChains];
        a = _mm512_dpbf16_ps(a, (__m512bh)w,
                             (__m512bh)_mm512_set1_epi32(int(pair_of(in.pairs, (first + i + j) * T + t))));
      }
    }
  }
  if constexpr (kSafe) {  // the last words of a strip; a block is a multiple of four
    for (; i < n; ++i) {
      const __m512i w = reader.next(mask + 4 * i);
      for (int t = 0; t < T; ++t)
        sums.a[t][0] = _mm512_dpbf16_ps(sums.a[t][0], (__m512bh)w,
                                        (__m512bh)_mm512_set1_epi32(int(pair_of(in.pairs, (first + i) * T + t))));
    }
  }
}

template <int T>
bool stream16(const Packed& p, const Activations& in, int64_t strip, float* out) {
  Sums16<T> sums;
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < Sums16<T>::kChains; ++c) sums.a[t][c] = _mm512_setzero_ps();
  const Cursor end = by_blocks<Reader16>(p, {p.offsets[strip], true}, p.words, [&](auto& reader, int64_t i, int64_t n) {
    const uint8_t* mask = p.mask_of(strip, i);
    _mm_prefetch(reinterpret_cast<const char*>(mask) + 1024, _MM_HINT_T0);
    words16<T>(reader, mask, i, n, in, sums);
  });
  for (int t = 0; t < T; ++t) {
    __m512 a = sums.a[t][0];
    for (int c = 1; c < Sums16<T>::kChains; ++c) a = _mm512_add_ps(a, sums.a[t][c]);
    _mm512_storeu_ps(out + t * kStrip, a);
  }
  return end.ok && end.value == p.offsets[strip + 1];
}

constexpr StripStream kStream16[16] = {
    stream16<1>, stream16<2>,  stream16<3>,  stream16<4>,  stream16<5>,  stream16<6>,  stream16<7>,  stream16<8>,
    stream16<9>, stream16<10>, stream16<11>, stream16<12>, stream16<13>, stream16<14>, stream16<15>, stream16<16>};

bool stream_pairs(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return kStream16[in.tokens - 1](p, in, strip, out);
}

bool stream(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out) {
  return (is_integer(p.type) ? stream_integers : each_strip<stream_pairs>)(p, in, strip, n, out);
}

// ---- more tokens: decode a tile, then multiply -------------------------------------------------------------------

template <bool kSafe>
inline void decode16(Reader16<kSafe>& reader, const uint8_t* mask, int64_t n, bf16* tile) {
  for (int64_t i = 0; i < n; ++i) {
    if (i % 4 == 0) reader.ahead();
    _mm512_storeu_si512(tile + i * kWordBits16, reader.next(mask + 4 * i));
  }
}

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  if (is_integer(p.type)) return decode_integers(p, cursor, strip, first, pairs, tile);
  cursor = by_blocks<Reader16>(p, cursor, pairs, [&](auto& reader, int64_t i, int64_t n) {
    decode16(reader, p.mask_of(strip, first + i), n, tile + i * kWordBits16);
  });
}

// N tokens by 32 rows: 2 N sums in registers, every weight register used N times, every broadcast twice.
template <int N>
void multiply_tokens(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, bool accumulate,
                     float* sum) {
  __m512 a[N][2];
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t) {
    a[t][0] = accumulate ? _mm512_loadu_ps(sum + t * 32) : _mm512_setzero_ps();
    a[t][1] = accumulate ? _mm512_loadu_ps(sum + t * 32 + 16) : _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const __m512bh w_0 = (__m512bh)_mm512_loadu_si512(tile_0 + i * kWordBits16);
    const __m512bh w_1 = (__m512bh)_mm512_loadu_si512(tile_1 + i * kWordBits16);
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t) {
      const __m512bh b = (__m512bh)_mm512_set1_epi32(int(pair_of(x + t * 2 * kTilePairs, i)));
      a[t][0] = _mm512_dpbf16_ps(a[t][0], w_0, b);
      a[t][1] = _mm512_dpbf16_ps(a[t][1], w_1, b);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t) {
    _mm512_storeu_ps(sum + t * 32, a[t][0]);
    _mm512_storeu_ps(sum + t * 32 + 16, a[t][1]);
  }
}

using Multiply = void (*)(const bf16*, const bf16*, int64_t, const bf16*, bool, float*);
constexpr Multiply kMultiply[12] = {multiply_tokens<1>, multiply_tokens<2>,  multiply_tokens<3>,  multiply_tokens<4>,
                                    multiply_tokens<5>, multiply_tokens<6>,  multiply_tokens<7>,  multiply_tokens<8>,
                                    multiply_tokens<9>, multiply_tokens<10>, multiply_tokens<11>, multiply_tokens<12>};

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate,
              float* sum) {
  const int64_t blocks = (tokens + 11) / 12;
  for (int64_t b = 0; b < blocks; ++b) {  // even blocks: 16 tokens are 8 + 8
    const int64_t from = tokens * b / blocks, to = tokens * (b + 1) / blocks;
    kMultiply[to - from - 1](tile_0, tile_1, pairs, x + from * 2 * kTilePairs, accumulate, sum + from * 32);
  }
}

void round(const float* sum, const float* scale, const float* shift, bf16* y) {
  const __m512 v = _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(scale), _mm512_loadu_ps(shift));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v));
}

// ---- attention of one token --------------------------------------------------------------------------------------

constexpr int64_t kAttended = 16;  // cached tokens at a time: their scores fill a register

inline __mmask32 up_to(int64_t n) { return n >= 32 ? ~0u : _bzhi_u32(~0u, unsigned(n)); }

// Neighbouring quarters of two registers, added.
inline __m512 across(__m512 one, __m512 other) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xdd));
}

// The sums of sixteen registers, in one.
inline __m512 sums_of(const __m512 (&a)[16]) {
  __m512 fours[4], halves[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // within 128 bits: four registers' sums side by side
    __m512d twos[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 &one = a[4 * i + 2 * j], &other = a[4 * i + 2 * j + 1];
      twos[j] = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
    }
    fours[i] =
        _mm512_add_ps((__m512)_mm512_unpacklo_pd(twos[0], twos[1]), (__m512)_mm512_unpackhi_pd(twos[0], twos[1]));
  }
  for (int i = 0; i < 2; ++i) halves[i] = across(fours[2 * i], fours[2 * i + 1]);
  return across(halves[0], halves[1]);
}

// scores [G, room] = scaling q K^T, q [G, width], and the largest of each head. Sixteen tokens' keys are multiplied by
// one head after the other while they are in the L1 cache.
template <int G>
inline void scores_of(const bf16* q, const bf16* keys, int64_t n, int64_t width, float scaling, float* scores,
                      int64_t room, float* most) {
  __m512 largest[G];
  for (__m512& some : largest) some = _mm512_set1_ps(-INFINITY);
  for (int64_t t = 0; t < n; t += kAttended) {
    const bf16* key[kAttended];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kAttended; ++j) key[j] = keys + std::min(t + j, n - 1) * width;
    for (int g = 0; g < G; ++g) {
      __m512 a[kAttended];
#pragma GCC unroll 16
      for (__m512& sum : a) sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < width; i += 32) {
        const __mmask32 some = up_to(width - i);
        const __m512bh query = (__m512bh)_mm512_maskz_loadu_epi16(some, q + g * width + i);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kAttended; ++j)
          a[j] = _mm512_dpbf16_ps(a[j], query, (__m512bh)_mm512_maskz_loadu_epi16(some, key[j] + i));
      }
      const __m512 found = _mm512_mul_ps(sums_of(a), _mm512_set1_ps(scaling));
      _mm512_mask_storeu_ps(scores + g * room + t, __mmask16(up_to(n - t)), found);
      largest[g] = _mm512_max_ps(found, largest[g]);  // not of NaN: the second is taken then
    }
  }
  for (int g = 0; g < G; ++g) most[g] = _mm512_reduce_max_ps(largest[g]);
}

// Weights of tokens as bfloat16, in place, with a zero behind them; returns their sum before they are rounded.
inline float round_weights(float* weights, int64_t n) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t t = 0; t < n; t += kAttended) {
    const __m512 some = _mm512_maskz_loadu_ps(__mmask16(up_to(n - t)), weights + t);
    total = _mm512_add_ps(total, some);
    const __mmask16 kept = __mmask16(up_to(n + n % 2 - t));
    _mm256_mask_storeu_epi16(reinterpret_cast<bf16*>(weights) + t, kept, (__m256i)_mm512_cvtneps_pbh(some));
  }
  return _mm512_reduce_add_ps(total);
}

// out [G, width] = the tokens' weights [G, stride] times 32 N columns of their values, over each head's total; of the
// last 32 columns only those in `some`. Two tokens at a time: their rows are interleaved, so that a dot product of
// pairs takes one of each.
template <int G, int N>
inline void mean_of(const bf16* weights, int64_t stride, const bf16* values, int64_t n, int64_t width, __mmask32 some,
                    const float* total, bf16* out) {
  __m512 a[G][N][2];
  for (auto& head : a)
    for (auto& columns : head) columns[0] = columns[1] = _mm512_setzero_ps();
  for (int64_t t = 0; t < n; t += 2) {
    __m512bh pair[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) pair[g] = (__m512bh)_mm512_set1_epi32(int(load32(weights + g * stride + t)));
    const bf16* row = values + t * width;
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      const __mmask32 mine = i + 1 < N ? ~0u : some;
      const __m512i one = _mm512_maskz_loadu_epi16(mine, row + 32 * i);
      const __m512i other = _mm512_maskz_loadu_epi16(t + 1 < n ? mine : 0, row + width + 32 * i);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, other);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(one, other);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        a[g][i][0] = _mm512_dpbf16_ps(a[g][i][0], pair[g], low);
        a[g][i][1] = _mm512_dpbf16_ps(a[g][i][1], pair[g], high);
      }
    }
  }
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i after = _mm512_add_epi32(order, _mm512_set1_epi32(8));
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) {
      const __m512 over = _mm512_set1_ps(total[g]);
      const __m512 first = _mm512_div_ps(_mm512_permutex2var_ps(a[g][i][0], order, a[g][i][1]), over);
      const __m512 second = _mm512_div_ps(_mm512_permutex2var_ps(a[g][i][0], after, a[g][i][1]), over);
      _mm512_mask_storeu_epi16(out + g * width + 32 * i, i + 1 < N ? ~0u : some,
                               (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

// G heads as attend_block computes one, with the dot product of pairs for both of its sums.
template <int G>
void attend_together(const bf16* q, const bf16* keys, const bf16* values, int64_t n, int64_t width, float scaling,
                     float* scores, bf16* out) {
  const int64_t room = score_room(n);
  float largest[G], total[G];
  scores_of<G>(q, keys, n, width, scaling, scores, room, largest);
  for (int g = 0; g < G; ++g) {
    float* mine = scores + g * room;
    for (int64_t t = 0; t < n; ++t) mine[t] = exponential(mine[t] - largest[g]);
    total[g] = round_weights(mine, n);
  }
  const auto* weights = reinterpret_cast<const bf16*>(scores);
  int64_t i = 0;
  for (; i + 32 < width; i += 64)
    mean_of<G, 2>(weights, 2 * room, values + i, n, width, up_to(width - i - 32), total, out + i);
  if (i < width) mean_of<G, 1>(weights, 2 * room, values + i, n, width, up_to(width - i), total, out + i);
}

// As each_head, but heads read the cache together: it comes from memory, and takes longer than to multiply.
void attend(const bf16* q, int64_t heads, const bf16* keys, const bf16* values, int64_t n, int64_t width, float scaling,
            float* scores, float*, bf16* out) {
  constexpr int64_t kMost = 4;
  static constexpr decltype(&attend_together<1>) kTogether[kMost] = {attend_together<1>, attend_together<2>,
                                                                     attend_together<3>, attend_together<4>};
  const int64_t parts = divide_up(heads, kMost);
  for (int64_t part = 0; part < parts; ++part) {  // even parts: 6 heads are 3 + 3
    const int64_t from = heads * part / parts, some = heads * (part + 1) / parts - from;
    kTogether[size_t(some - 1)](q + from * width, keys, values, n, width, scaling, scores, out + from * width);
  }
}

// ---- a dense matrix, one token --------------------------------------------------------------------------------------

// One row times x [width], lanes not summed yet: memory is read front to back, and the next row does not wait for this
// one's chain of sums.
inline __m512 dot_of(const bf16* x, const bf16* row, int64_t width) {
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(row + i) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(row + i) + kAhead + 64, _MM_HINT_T0);
    a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_loadu_si512(x + i), (__m512bh)_mm512_loadu_si512(row + i));
    b = _mm512_dpbf16_ps(b, (__m512bh)_mm512_loadu_si512(x + i + 32), (__m512bh)_mm512_loadu_si512(row + i + 32));
  }
  for (; i < width; i += 32) {
    const __mmask32 some = up_to(width - i);
    a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_maskz_loadu_epi16(some, x + i),
                         (__m512bh)_mm512_maskz_loadu_epi16(some, row + i));
  }
  return _mm512_add_ps(a, b);
}

// As dots_block; for wide rows. Of narrow ones, as a cache has them, scores_of takes sixteen at a time.
void dots(const bf16* x, const bf16* rows, int64_t n, int64_t width, float* found, float*) {
  for (int64_t t = 0; t < n; t += kStrip) {
    __m512 a[kStrip] = {};
    const int64_t some = std::min(kStrip, n - t);
    for (int64_t j = 0; j < some; ++j) a[j] = dot_of(x, rows + (t + j) * width, width);
    _mm512_mask_storeu_ps(found + t, __mmask16(up_to(some)), sums_of(a));
  }
}

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels{"avx512", 16,       kIntegerTokens, 1 << 30, true,       1,      false, stream,
                                   decode,   multiply, integer_digits, round,   gate_block, attend, dots};
  return kernels;
}

const Kernels& avx512_a8_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "avx512-a8";
    k.bytes = integer_bytes;
    return k;
  }();
  return kernels;
}

}  // namespace losa
LOSA_TARGET_END
#endif
