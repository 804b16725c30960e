// int8 and int4 values on AVX-512: integer sums of strips times tokens, in registers, and their totals as floats.
// Include it after avx512.h and LOSA_TARGET_BEGIN.
#pragma once

#include "kernels.h"

namespace losa {
namespace {

// Sums of the digits as one float, times the group's scales.
template <ValueType V, int D>
inline __m512 drained(const __m512i* a, __m512 level, __m512 total) {
  __m512 sum = _mm512_cvtepi32_ps(a[D - 1]);
  for (int d = D - 2; d >= 0; --d) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(a[d]));
  if constexpr (row_of(V).grouped) return _mm512_fmadd_ps(sum, level, total);
  return _mm512_add_ps(sum, total);
}

template <ValueType V>
inline __m512 levels_of(const Packed& p, int64_t strip, int64_t block) {  // level_of of 16 rows
  if constexpr (!row_of(V).grouped) return _mm512_setzero_ps();
  const __m512i bytes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.groups_of(strip, block))));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bytes, 19), _mm512_set1_epi32((127 - 15) << 23)));
}

// f(0), ..., f(N - 1), each with a constant: gcc 12 leaves in memory what a loop indexes that it unrolls late.
template <int N, typename F>
LOSA_ALWAYS inline void each(F f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(std::integral_constant<int, N - 1>());
  }
}

// Integer sums of S strips by T tokens, of activations of D digits.
template <int S, int T, int D>
struct Sums {
  static constexpr int kChains = T == 1 ? 2 : 1;  // enough independent sums to hide the dot product's latency
  __m512i a[S][T][D][kChains];

  LOSA_ALWAYS inline void begin(const int32_t* starts, int64_t tokens) {
    each<T>([&](auto t) LOSA_ALWAYS {
      each<D>([&](auto d) LOSA_ALWAYS {
        const __m512i start = _mm512_set1_epi32(starts[d * tokens + t]);
        each<S>([&](auto s) LOSA_ALWAYS {
          a[s][t][d][0] = start;
          if constexpr (kChains == 2) a[s][t][d][1] = _mm512_setzero_si512();
        });
      });
    });
  }

  template <int kChain>
  LOSA_ALWAYS inline void add(const __m512i (&weights)[S], const int8_t* const (&x)[D],
                              int64_t i) {  // word i of a block
    each<T>([&](auto t) LOSA_ALWAYS {
      each<D>([&](auto d) LOSA_ALWAYS {
        const __m512i digits = _mm512_set1_epi32(int(load32(x[d] + t * kGroup + 4 * i)));
        each<S>([&](auto s) LOSA_ALWAYS {
          a[s][t][d][kChain] = opaque(_mm512_dpbusd_epi32(a[s][t][d][kChain], weights[s], digits));
        });
      });
    });
  }

  // A block of `n` up to 16 words; next(s, i) returns those of strip s one by one. Their digits are `digit` bytes
  // apart.
  template <typename Next>
  LOSA_ALWAYS inline void add_block(Next next, int64_t n, const int8_t* x, int64_t digit) {
    const int8_t* x_d[D];
    each<D>([&](auto d) LOSA_ALWAYS {
      x_d[d] = x + d * digit;
      __asm__("" : "+r"(x_d[d]));  // or else every word's address is computed on its own
    });
    const auto add_word = [&](auto chain, int64_t i) LOSA_ALWAYS {
      __m512i weights[S];
      each<S>([&](auto s) LOSA_ALWAYS { weights[s] = next(s, i); });
      add<chain>(weights, x_d, i);
    };
    if (n == kBlock)
      each<kBlock>([&](auto i) LOSA_ALWAYS { add_word(std::integral_constant<int, i % kChains>(), i); });
    else
      for (int64_t i = 0; i < n; ++i) add_word(std::integral_constant<int, 0>(), i);
  }

  // One strip's as floats, added to `total`. `scales` are those of activations of one byte.
  template <ValueType V, int s>
  LOSA_ALWAYS inline void end(__m512 level, const float* scales, __m512 (&total)[T]) {
    each<T>([&](auto t) LOSA_ALWAYS {
      __m512i sums[D];
      each<D>([&](auto d) LOSA_ALWAYS {
        sums[d] = kChains == 2 ? _mm512_add_epi32(a[s][t][d][0], a[s][t][d][kChains - 1]) : a[s][t][d][0];
      });
      if constexpr (D == 1) {
        const __m512 scale = _mm512_set1_ps(scales[t]);
        total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), row_of(V).grouped ? _mm512_mul_ps(level, scale) : scale,
                                   total[t]);
      } else {
        total[t] = drained<V, D>(sums, level, total[t]);
      }
    });
  }
};

// S strips times T tokens, from token t_0 on: totals, which wait in `out`, [S, tokens, 16], when others are at work.
template <ValueType V, int S, int T, int D>
struct Product {
  const Packed& p;
  const int64_t* strips;
  const Activations& in;
  int64_t t_0;
  float* out;
  __m512 total[S][T];

  LOSA_ALWAYS inline Product(const Packed& p, const int64_t* strips, const Activations& in, int64_t t_0, float* out)
      : p(p), strips(strips), in(in), t_0(t_0), out(out) {
    each<S * T>([&](auto i) LOSA_ALWAYS { total[i / T][i % T] = _mm512_loadu_ps(place(i / T, i % T)); });
  }
  LOSA_ALWAYS inline float* place(int s, int t) const { return out + (s * in.tokens + t_0 + t) * kStrip; }
  LOSA_ALWAYS inline void store() const {
    each<S * T>([&](auto i) LOSA_ALWAYS { _mm512_storeu_ps(place(i / T, i % T), total[i / T][i % T]); });
  }

  // Adds what the words [first, end) come to; next(s, b, i) returns word i of block b of strip s.
  template <typename Next>
  LOSA_ALWAYS inline void add(Next next, int64_t first, int64_t end) {
    constexpr int64_t kSpan = span_of(V, D);
    const int64_t blocks = divide_up(end, kBlock), row = D * in.tokens;
    for (int64_t begin = first / kBlock; begin < blocks; begin += kSpan) {
      Sums<S, T, D> sums;
      sums.begin(in.starts + begin / kSpan * row + t_0, in.tokens);
      for (int64_t b = begin; b < (kSpan == 1 ? begin + 1 : std::min(blocks, begin + kSpan)); ++b)
        sums.add_block([&](auto s, int64_t i) LOSA_ALWAYS { return next(s, b, i); }, std::min(kBlock, end - b * kBlock),
                       in.bytes + (b * row + t_0) * kGroup, in.tokens * kGroup);
      const float* scales = D == 1 ? in.scales + begin * in.tokens + t_0 : nullptr;
      each<S>([&](auto s)
                  LOSA_ALWAYS { sums.template end<V, s>(levels_of<V>(p, strips[s], begin), scales, total[s]); });
    }
  }
};

}  // namespace
}  // namespace losa
