// AVX-512: VBMI2 expands one word into one register, the bfloat16 (or VNNI byte) dot product multiplies it by a broadcast of the
// matching activations. Needs F, BW, VL, VBMI, VBMI2, VNNI and BF16: Zen 4 and later, Sapphire Rapids and later.
//
// Cost of a word of 32 bfloat16 weights and one token: mask load, population count, value load, expand, broadcast, dot product,
// about 4 cycles, while memory delivers the word's 23 bytes (70 % zeros) in 4 to 8. int8 multiplies the 64 weights of a word
// by the three bytes of 24-bit fixed-point activations: integer sums are exact, and no int8 is ever converted to float.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
LOSA_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,bmi,bmi2,popcnt")

namespace losa {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of values prefetched ahead; 2 to 9 KiB measured alike, 1 KiB and none slower

inline uint32_t load32(const void* p) {
  uint32_t m;
  __builtin_memcpy(&m, p, 4);
  return m;
}
inline uint64_t load64(const void* p) {
  uint64_t m;
  __builtin_memcpy(&m, p, 8);
  return m;
}

// A value that the compiler may not fold into the instruction that uses it.
inline __m512i opaque(__m512i v) {
  __asm__("" : "+v"(v));
  return v;
}

// Both operands of an expand are made opaque. Zeros: on Zen 4 the zero-masking form waits for the previous contents of its
// destination register, which chains all expands of a loop, 1.75 ns a word instead of 0.95. Values: expanding from memory is a
// fifth slower than a load and an expand (docs/LOG.md).
inline __m512i expand16(__mmask32 m, __m512i packed) { return _mm512_mask_expand_epi16(opaque(_mm512_setzero_si512()), m, opaque(packed)); }
inline __m512i expand8(__mmask64 m, __m512i packed) { return _mm512_mask_expand_epi8(opaque(_mm512_setzero_si512()), m, opaque(packed)); }

// Two readers of one interface: the next word of a strip, expanded. `kSafe` checks every word against the end of the values.
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
template <bool kSafe>
struct Reader8 {
  const int8_t* v;
  const int8_t* end;
  bool ok = true;
  inline __m512i next(const uint8_t* mask) {
    const uint64_t m = load64(mask);
    const int64_t n = __builtin_popcountll(m);
    if constexpr (kSafe) {
      if (end - v < n) {
        ok = false;
        return _mm512_setzero_si512();
      }
      const __m512i packed = _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(n)), v);
      v += n;
      return expand8(m, packed);
    }
    const __m512i packed = _mm512_loadu_si512(v);
    v += n;
    return expand8(m, packed);
  }
  inline void ahead() const { _mm_prefetch(reinterpret_cast<const char*>(v) + kAhead, _MM_HINT_T0); }
};

inline uint32_t pair_of(const bf16* x, int64_t i) { return load32(x + 2 * i); }

// ---- one to sixteen tokens, bfloat16 --------------------------------------------------------------------------------------

template <int T>
struct Sums16 {
  static constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;  // enough independent sums to hide the dot product's latency
  __m512 a[T][kChains];
};

template <int T, bool kSafe>
inline void words16(Reader16<kSafe>& reader, const uint8_t* mask, int64_t first, int64_t n, const Activations& in, Sums16<T>& sums) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    reader.ahead();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i w = reader.next(mask + 4 * (first + i + j));
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        __m512& a = sums.a[t][j % Sums16<T>::kChains];
        a = _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(pair_of(in.pairs, (first + i + j) * T + t))));
      }
    }
  }
  if constexpr (kSafe) {  // the last words of a strip; a block is a multiple of four
    for (; i < n; ++i) {
      const __m512i w = reader.next(mask + 4 * (first + i));
      for (int t = 0; t < T; ++t)
        sums.a[t][0] = _mm512_dpbf16_ps(sums.a[t][0], (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(pair_of(in.pairs, (first + i) * T + t))));
    }
  }
}

template <int T>
bool stream16(const Packed& p, const Activations& in, int64_t strip, float* out) {
  const uint8_t* mask = p.mask + strip * p.words * 4;
  const bf16* values = static_cast<const bf16*>(p.values);
  const bf16* end = values + p.count;
  Sums16<T> sums;
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < Sums16<T>::kChains; ++c) sums.a[t][c] = _mm512_setzero_ps();
  Reader16<false> fast{values + p.offsets[strip], end};
  int64_t i = 0;
  for (; i + kBlock <= p.words && end - fast.v >= kBlock * kWordBits16; i += kBlock) {
    _mm_prefetch(reinterpret_cast<const char*>(mask + 4 * i) + 1024, _MM_HINT_T0);
    words16<T>(fast, mask, i, kBlock, in, sums);
  }
  Reader16<true> safe{fast.v, end};
  words16<T>(safe, mask, i, p.words - i, in, sums);
  for (int t = 0; t < T; ++t) {
    __m512 a = sums.a[t][0];
    for (int c = 1; c < Sums16<T>::kChains; ++c) a = _mm512_add_ps(a, sums.a[t][c]);
    _mm512_storeu_ps(out + t * kStrip, a);
  }
  return safe.ok && safe.v == values + p.offsets[strip + 1];
}

// ---- one to four tokens, int8 ---------------------------------------------------------------------------------------------

// The instruction multiplies unsigned by signed bytes: the weights become w + 128 (one xor), the activations stay signed, and
// what 128 added, 128 times the sum of the activations' digits, is known before the weight is read.
template <int T>
struct Sums8 {
  __m512i a[T][3];  // int32 sums, one for each digit of the activations
};

template <int T, bool kSafe>
inline void words8(Reader8<kSafe>& reader, const uint8_t* mask, int64_t first, int64_t n, const Activations& in, Sums8<T>& sums) {
#pragma GCC unroll 2
  for (int64_t i = first; i < first + n; ++i) {
    if (i % 2 == 0) reader.ahead();
    const __m512i w = _mm512_xor_si512(reader.next(mask + 8 * i), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d)
        sums.a[t][d] = _mm512_dpbusd_epi32(sums.a[t][d], w, _mm512_set1_epi32(int(load32(in.digits + ((i * T + t) * 3 + d) * 4))));
  }
}

template <int T>
bool stream8(const Packed& p, const Activations& in, int64_t strip, float* out) {
  const uint8_t* mask = p.mask + strip * p.words * 8;
  const int8_t* values = static_cast<const int8_t*>(p.values);
  const int8_t* end = values + p.count;
  Sums8<T> sums;
  for (int t = 0; t < T; ++t)
    for (int d = 0; d < 3; ++d) sums.a[t][d] = _mm512_setzero_si512();
  Reader8<false> fast{values + p.offsets[strip], end};
  int64_t i = 0;
  for (; i + kBlock <= p.words && end - fast.v >= kBlock * kWordBits8; i += kBlock) {
    _mm_prefetch(reinterpret_cast<const char*>(mask + 8 * i) + 1024, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(mask + 8 * i) + 1088, _MM_HINT_T0);
    words8<T>(fast, mask, i, kBlock, in, sums);
  }
  Reader8<true> safe{fast.v, end};
  words8<T>(safe, mask, i, p.words - i, in, sums);
  for (int t = 0; t < T; ++t) {
    __m512 total = _mm512_setzero_ps();
    for (int d = 2; d >= 0; --d) {
      const __m512i exact = _mm512_sub_epi32(sums.a[t][d], _mm512_set1_epi32(128 * in.digit_sums[3 * t + d]));
      total = _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(exact));
    }
    _mm512_storeu_ps(out + t * kStrip, _mm512_mul_ps(total, _mm512_set1_ps(in.unit[t])));
  }
  return safe.ok && safe.v == values + p.offsets[strip + 1];
}

using Stream = bool (*)(const Packed&, const Activations&, int64_t, float*);
constexpr Stream kStream16[16] = {stream16<1>,  stream16<2>,  stream16<3>,  stream16<4>,  stream16<5>,  stream16<6>,  stream16<7>,  stream16<8>,
                                  stream16<9>,  stream16<10>, stream16<11>, stream16<12>, stream16<13>, stream16<14>, stream16<15>, stream16<16>};
constexpr Stream kStream8[4] = {stream8<1>, stream8<2>, stream8<3>, stream8<4>};

bool stream(const Packed& p, const Activations& in, int64_t strip, float* out) {
  return (p.is_int8() ? kStream8 : kStream16)[in.tokens - 1](p, in, strip, out);
}

// ---- more tokens: decode a tile, then multiply ----------------------------------------------------------------------------

// 32 int8 -> 32 bfloat16, exact: every integer of 8 bits is a bfloat16.
inline __m512i widen(__m256i q) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

template <bool kSafe>
inline void decode16(Reader16<kSafe>& reader, const uint8_t* mask, int64_t n, bf16* tile) {
  for (int64_t i = 0; i < n; ++i) {
    if (i % 4 == 0) reader.ahead();
    _mm512_storeu_si512(tile + i * kWordBits16, reader.next(mask + 4 * i));
  }
}

template <bool kSafe>
inline void decode8(Reader8<kSafe>& reader, const uint8_t* mask, int64_t n, bf16* tile) {
  for (int64_t i = 0; i < n; ++i) {
    if (i % 2 == 0) reader.ahead();
    const __m512i w = reader.next(mask + 8 * i);  // row by row, four columns: the first two, then the last two
    _mm512_storeu_si512(tile + (2 * i) * kWordBits16, widen(_mm512_cvtepi32_epi16(w)));
    _mm512_storeu_si512(tile + (2 * i + 1) * kWordBits16, widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16))));
  }
}

void decode(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile) {
  if (p.is_int8()) {
    const int8_t* values = static_cast<const int8_t*>(p.values);
    const uint8_t* mask = p.mask + (strip * p.words + first / 2) * 8;
    Reader8<false> fast{values + cursor.value, values + p.count};
    const int64_t words = pairs / 2;
    int64_t i = 0;
    for (; i + kBlock <= words && fast.end - fast.v >= kBlock * kWordBits8; i += kBlock)
      decode8(fast, mask + 8 * i, kBlock, tile + 2 * i * kWordBits16);
    Reader8<true> safe{fast.v, fast.end};
    decode8(safe, mask + 8 * i, words - i, tile + 2 * i * kWordBits16);
    cursor = {safe.v - values, cursor.ok && safe.ok};
    return;
  }
  const bf16* values = static_cast<const bf16*>(p.values);
  const uint8_t* mask = p.mask + (strip * p.words + first) * 4;
  Reader16<false> fast{values + cursor.value, values + p.count};
  int64_t i = 0;
  for (; i + kBlock <= pairs && fast.end - fast.v >= kBlock * kWordBits16; i += kBlock) decode16(fast, mask + 4 * i, kBlock, tile + i * kWordBits16);
  Reader16<true> safe{fast.v, fast.end};
  decode16(safe, mask + 4 * i, pairs - i, tile + i * kWordBits16);
  cursor = {safe.v - values, cursor.ok && safe.ok};
}

// N tokens by 32 rows: 2 N sums in registers, every weight register used N times, every broadcast twice.
template <int N>
void multiply_tokens(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, bool accumulate, float* sum) {
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
constexpr Multiply kMultiply[12] = {multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>,  multiply_tokens<4>,
                                    multiply_tokens<5>, multiply_tokens<6>, multiply_tokens<7>,  multiply_tokens<8>,
                                    multiply_tokens<9>, multiply_tokens<10>, multiply_tokens<11>, multiply_tokens<12>};

void multiply(const bf16* tile_0, const bf16* tile_1, int64_t pairs, const bf16* x, int64_t tokens, bool accumulate, float* sum) {
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
  static constexpr Kernels kernels{"avx512", 16, 4, 1 << 30, true, true, stream, decode, multiply, round};
  return kernels;
}

}  // namespace losa
LOSA_TARGET_END
#endif
