// What the files of AVX2 share.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "target.h"

#define LOSA_AVX2 "avx2,fma,bmi,bmi2,popcnt"

namespace losa {

// Values that are integers (avx2_integer.cpp).
constexpr int64_t kAvx2IntegerTokens = 4;  // that are multiplied in fixed point
bool avx2_stream_integers(const Packed& p, const Activations& in, int64_t strip, float* out);
void avx2_decode_integers(const Packed& p, Cursor& cursor, int64_t strip, int64_t first, int64_t pairs, bf16* tile);
void avx2_digits(const bf16* x, int64_t columns, float steps, int64_t digits, int64_t tokens, int64_t span,
                 int8_t* bytes, int32_t* starts);

}  // namespace losa

LOSA_TARGET_BEGIN(LOSA_AVX2)
#include "feed.h"
namespace losa {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of values prefetched ahead, as in avx512.h

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Eight bfloat16 as float32.
inline __m256 floats(const bf16* v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(v)), 16));
}
inline void ask_for(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
}  // namespace losa
LOSA_TARGET_END
