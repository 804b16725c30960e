// Mathematics of a decoder block beside its matrices: exponentials, the gate of the MLP, attention of one query over a
// cache.
//
// Every function is inlined into its caller, so that each instruction set's file compiles it for itself: include this
// header before LOSA_TARGET_BEGIN and call it from inside. Loops over `kLanes` accumulators are what compilers make
// vectors of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(_MSC_VER)
#define LOSA_INLINE static __forceinline
#else
#define LOSA_INLINE static inline __attribute__((always_inline))
#endif

namespace losa {

constexpr int64_t kLanes = 16;

LOSA_INLINE float widen_bf16(bf16 v) {
  const uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
LOSA_INLINE bf16 narrow_float(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87. NaN stays NaN.
LOSA_INLINE float exponential(float x) {
  const float limited = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float whole = limited * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  const float n = whole - 12582912.0f;
  const float r = (limited - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &whole, 4);
  bits = (bits + 127) << 23;  // 2^n: the integer is in the low bits
  float scale;
  std::memcpy(&scale, &bits, 4);
  const float e = x < -87.0f ? 0.0f : p * scale;
  return x != x ? x : e;
}

// out = silu(gate) * up, rounded where transformers rounds: after silu, after the product.
LOSA_INLINE void gate_block(const bf16* gate, const bf16* up, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen_bf16(gate[i]);
    const float silu = widen_bf16(narrow_float(g / (1.0f + exponential(-g))));
    out[i] = narrow_float(silu * widen_bf16(up[i]));
  }
}

// One head: out = softmax(scaling q K^T) V over `n` cached tokens, all sums in float32.
// `scores` has room for n floats, `sums` for `width`.
LOSA_INLINE void attend_block(const bf16* q, const bf16* keys, const bf16* values, int64_t n, int64_t width,
                              float scaling, float* scores, float* sums, bf16* out) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < n; ++t) {
    const bf16* k = keys + t * width;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += widen_bf16(q[i + j]) * widen_bf16(k[i + j]);
    float score = 0;
    for (; i < width; ++i) score += widen_bf16(q[i]) * widen_bf16(k[i]);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    scores[t] = (score + lanes[0]) * scaling;
    largest = scores[t] > largest ? scores[t] : largest;
  }
  for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - largest);
  float total = 0;
  for (int64_t t = 0; t < n; ++t) total += scores[t];
  for (int64_t i = 0; i < width; ++i) sums[i] = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bf16* v = values + t * width;
    const float p = widen_bf16(narrow_float(scores[t]));  // as torch rounds them for its bfloat16 product
    for (int64_t i = 0; i < width; ++i) sums[i] += p * widen_bf16(v[i]);
  }
  for (int64_t i = 0; i < width; ++i) out[i] = narrow_float(sums[i] / total);
}

}  // namespace losa
