// What the files of AVX-512 share: expanding one word into one register, and int4 values into int8.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "target.h"

#define LOSA_AVX512                                                                                                    \
  "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx512vpopcntdq,avx2,fma,bmi,bmi2," \
  "popcnt"

namespace losa {

// Values that are integers (avx512_integer.cpp).
bool stream_integers(const Packed& p, const Activations& in, int64_t strip, int64_t n, float* out);
void decode_integers(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile);
void integer_digits(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int64_t span,
                    int8_t* bytes, int32_t* starts);
void integer_bytes(const bf16* x, int64_t columns, int64_t tokens, int8_t* bytes, int32_t* starts, float* scales);
// The next `words` of a strip, at most 64, as as many registers of 64 int8.
void expand_integers(const Packed& p, Cursor& cursor, const uint8_t* mask, int64_t words, int8_t* bytes);
// What a strip's sums of digits add to the outputs, sums [3 digits, 16 tokens, 16 rows] over words from `word` on; and
// the last step.
void add_sums(const Packed& p, const Activations& in, int64_t strip, int64_t word, const int32_t* sums, float* out);
void times_units(const Activations& in, float* out);
constexpr int64_t kIntegerTokens = 16;  // that are multiplied in fixed point

}  // namespace losa

LOSA_TARGET_BEGIN(LOSA_AVX512)
#include "feed.h"
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

// Both operands of an expand are made opaque. Zeros: on Zen 4 the zero-masking form waits for the previous contents of
// its destination register, which chains all expands of a loop, 1.75 ns a word instead of 0.95. Values: expanding from
// memory is a fifth slower than a load and an expand (docs/LOG.md).
inline __m512i expand16(__mmask32 m, __m512i packed) {
  return _mm512_mask_expand_epi16(opaque(_mm512_setzero_si512()), m, opaque(packed));
}

}  // namespace
}  // namespace losa
LOSA_TARGET_END
