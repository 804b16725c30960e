// Mathematics of a decoder block beside its matrices: exponentials, the gate of the MLP, attention of one query over a
// cache.
//
// Include it after <cmath> and LOSA_TARGET_BEGIN, so that each instruction set's file compiles it for itself;
// everything here has internal linkage. Loops over `kLanes` accumulators are what compilers make vectors of.
#pragma once

#include "kernels.h"

namespace losa {
namespace {

constexpr int64_t kLanes = 16;

// e^x for x <= 88, within 2 units in the last place; 0 below -87. NaN stays NaN.
inline float exponential(float x) {
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
inline void gate_block(const bf16* gate, const bf16* up, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(gate[i]);
    const float silu = to_float(to_bf16(g / (1.0f + exponential(-g))));
    out[i] = to_bf16(silu * to_float(up[i]));
  }
}

// dots [n] = x times each of n rows of `width`, in float32. `wide` has room for `width` floats.
inline void dots_block(const bf16* x, const bf16* rows, int64_t n, int64_t width, float* dots, float*) {
  for (int64_t t = 0; t < n; ++t) {
    const bf16* row = rows + t * width;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += to_float(x[i + j]) * to_float(row[i + j]);
    float dot = 0;
    for (; i < width; ++i) dot += to_float(x[i]) * to_float(row[i]);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    dots[t] = dot + lanes[0];
  }
}

inline float largest_of(const float* scores, int64_t n) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < n; ++t) largest = scores[t] > largest ? scores[t] : largest;
  return largest;
}

// One head: out = softmax(scaling q K^T) V over `n` cached tokens, all sums in float32.
// `scores` has room for n floats, `sums` for `width`.
inline void attend_block(const bf16* q, const bf16* keys, const bf16* values, int64_t n, int64_t width, float scaling,
                         float* scores, float* sums, bf16* out) {
  dots_block(q, keys, n, width, scores, sums);
  for (int64_t t = 0; t < n; ++t) scores[t] *= scaling;
  const float largest = largest_of(scores, n);
  for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - largest);
  float total = 0;
  for (int64_t t = 0; t < n; ++t) total += scores[t];
  for (int64_t i = 0; i < width; ++i) sums[i] = 0;
  for (int64_t t = 0; t < n; ++t) {
    const bf16* v = values + t * width;
    const float p = to_float(to_bf16(scores[t]));  // as torch rounds them for its bfloat16 product
    for (int64_t i = 0; i < width; ++i) sums[i] += p * to_float(v[i]);
  }
  for (int64_t i = 0; i < width; ++i) out[i] = to_bf16(sums[i] / total);
}

// Heads that share a head of the cache, q and out [heads, width], one after the other. `scores` has room for
// heads * score_room(n) floats.
template <auto kHead>
void each_head(const bf16* q, int64_t heads, const bf16* keys, const bf16* values, int64_t n, int64_t width,
               float scaling, float* scores, float* sums, bf16* out) {
  for (int64_t h = 0; h < heads; ++h)
    kHead(q + h * width, keys, values, n, width, scaling, scores, sums, out + h * width);
}

}  // namespace
}  // namespace losa
