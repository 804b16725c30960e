// AVX-512: VBMI2 expands one word into one register, the bfloat16 (or VNNI byte) dot product multiplies it by a
// broadcast of the matching activations. Needs F, BW, VL, VBMI, VBMI2, VNNI, VPOPCNTDQ and BF16: Zen 4 and later,
// Sapphire Rapids and later.
//
// Cost of a word of 32 bfloat16 weights and one token: mask load, population count, value load, expand, broadcast, dot
// product, about 4 cycles, while memory delivers the word's 23 bytes (70 % zeros) in 4 to 8. Integers:
// avx512_integer.cpp.
#include "kernels.h"

#if defined(__x86_64__)
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
  static constexpr int kChains = T == 1   ? 4
                                 : T == 2 ? 2
                                          : 1;  // enough independent sums to hide the dot product's latency
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

using Stream = bool (*)(const Packed&, const Activations&, int64_t, float*);
constexpr Stream kStream16[16] = {stream16<1>,  stream16<2>,  stream16<3>,  stream16<4>,  stream16<5>,  stream16<6>,
                                  stream16<7>,  stream16<8>,  stream16<9>,  stream16<10>, stream16<11>, stream16<12>,
                                  stream16<13>, stream16<14>, stream16<15>, stream16<16>};

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return p.type == ValueType::kBFloat16 ? kStream16[in.tokens - 1](p, in, strip, out)
                                        : stream_integers(p, in, strip, out);
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
  if (p.type != ValueType::kBFloat16) return decode_integers(p, cursor, strip, first, pairs, tile);
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

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels{"avx512", 16,     kIntegerTokens, 1 << 30,        true,  1,          false,
                                   stream,   decode, multiply,       integer_digits, round, gate_block, attend_block};
  return kernels;
}

}  // namespace losa
LOSA_TARGET_END
#endif
