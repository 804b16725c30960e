// The operator losa::decode_step: one token through all decoder blocks of a Llama-like model, outside Python.
//
// For each block: h += O(attention(Q(n), K(n), V(n))), n = norm(h); h += down(silu(gate(m)) * up(m)), m = norm(h).
// Numbers are rounded to bfloat16 where transformers' modules round them; inside attention, sums are float32. The cache
// is the caller's, one [1, heads, capacity, width] tensor of keys and one of values a block; this token's go to index
// `position`, and 0..position are attended to.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "tensors.h"

namespace losa {
namespace {

// What a block brings, in this order: four norms, then six tensors for each of seven layers (mask, values, offsets,
// scale, scales of groups, bias). A tensor without elements stands for one that is not there.
enum Norms : int64_t { kInputNorm, kMlpNorm, kQueryNorm, kKeyNorm, kNorms };
enum Layers : int64_t { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLayers };
constexpr int64_t kParts = 6, kPerBlock = kNorms + kParts * kLayers;

struct Shape {
  int64_t hidden, heads, kv_heads, width, inner;
  int64_t rows(int64_t layer) const {
    const int64_t rows[kLayers] = {heads * width, kv_heads * width, kv_heads * width, hidden, inner, inner, hidden};
    return rows[layer];
  }
  int64_t columns(int64_t layer) const { return layer == kOutput ? heads * width : layer == kDown ? inner : hidden; }
};

struct Layer {
  Packed p;
  const bf16* bias;
};

const bf16* vector_of(const Tensor& t, int64_t n, const char* what) {
  if (t.numel() == 0 && n > 0) return nullptr;
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::BFloat16 && t.numel() == n,
                  "losa::decode_step: expected ", n, " bfloat16 numbers on the CPU for ", what, ", found ", t.numel());
  return static_cast<const bf16*>(t.const_data_ptr());
}

std::optional<Tensor> optional(const Tensor& t) { return t.numel() > 0 ? std::optional<Tensor>(t) : std::nullopt; }

Layer layer_of(const Tensor* parts, int64_t rows, int64_t columns, int64_t type) {
  const Packed p = view(parts[0], parts[1], parts[2], optional(parts[3]), optional(parts[4]), rows, columns, type);
  return {p, vector_of(parts[5], rows, "a bias")};
}

void multiply(const Kernels& k, const Layer& layer, const bf16* x, bf16* y) {
  const Parallel parallel = on_torch_threads;
  const bool ok = multiply(layer.p, k, x, 1, layer.bias, y, parallel);
  STD_TORCH_CHECK(ok, "losa::decode_step: the masks and offsets of a packed weight disagree; the file is corrupt");
}

bf16 rounded(float f) { return to_bf16(f); }

void norm(const bf16* x, const bf16* weight, int64_t n, float epsilon, bf16* out) {
  constexpr int64_t kSums = 8;
  float sums[kSums] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % kSums] += to_float(x[i]) * to_float(x[i]);
  float total = 0;
  for (float s : sums) total += s;
  const float factor = 1.0f / std::sqrt(total / float(n) + epsilon);
  for (int64_t i = 0; i < n; ++i) out[i] = rounded(to_float(weight[i]) * to_float(rounded(to_float(x[i]) * factor)));
}

void add(bf16* h, const bf16* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) h[i] = rounded(to_float(h[i]) + to_float(x[i]));
}

// Rotary position embedding of one head's first `turned` numbers: halves i and i + turned / 2 make a pair.
void rotate(bf16* x, const bf16* cosine, const bf16* sine, int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[i + half]);
    const auto product = [](float v, bf16 w) { return to_float(rounded(v * to_float(w))); };
    x[i] = rounded(product(a, cosine[i]) + product(-b, sine[i]));
    x[i + half] = rounded(product(b, cosine[i + half]) + product(a, sine[i + half]));
  }
}

struct Scratch {
  std::vector<bf16> normed, query, attended, projected, gate, up, key, value;
  explicit Scratch(const Shape& s)
      : normed(size_t(s.hidden)),
        query(size_t(s.heads * s.width)),
        attended(query.size()),
        projected(size_t(s.hidden)),
        gate(size_t(s.inner)),
        up(size_t(s.inner)),
        key(size_t(s.kv_heads * s.width)),
        value(key.size()) {}
};

struct Step {
  const Shape s;
  const Kernels& k;
  const int64_t position;
  const float epsilon, scaling;
  const bf16 *cosine, *sine;
  const int64_t turned, type;

  void attention(Scratch& b, const bf16* query_norm, const bf16* key_norm, bf16* keys, bf16* values,
                 int64_t capacity) const {
    for (int64_t h = 0; h < s.heads; ++h) {
      bf16* q = &b.query[size_t(h * s.width)];
      if (query_norm) norm(q, query_norm, s.width, epsilon, q);
      rotate(q, cosine, sine, turned);
    }
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      bf16* key = &b.key[size_t(h * s.width)];
      if (key_norm) norm(key, key_norm, s.width, epsilon, key);
      rotate(key, cosine, sine, turned);
      const int64_t at = (h * capacity + position) * s.width;
      std::memcpy(keys + at, key, size_t(s.width) * sizeof(bf16));
      std::memcpy(values + at, &b.value[size_t(h * s.width)], size_t(s.width) * sizeof(bf16));
    }
    const int64_t tokens = position + 1, shared = s.heads / s.kv_heads;
    torch::stable::parallel_for(
        0, s.heads, std::max<int64_t>(1, 32768 / (tokens * s.width)), [&](int64_t begin, int64_t end) {
          std::vector<float> scores(size_t(tokens + s.width));
          for (int64_t h = begin; h < end; ++h) {
            const int64_t from = h / shared * capacity * s.width;
            k.attend(&b.query[size_t(h * s.width)], keys + from, values + from, tokens, s.width, scaling, scores.data(),
                     scores.data() + tokens, &b.attended[size_t(h * s.width)]);
          }
        });
  }

  void block(bf16* hidden, const Tensor* tensors, bf16* keys, bf16* values, int64_t capacity, Scratch& b) const {
    const auto norm_of = [&](int64_t i) {
      return vector_of(tensors[i], i < kQueryNorm ? s.hidden : s.width, "a norm");
    };
    Layer layers[kLayers];
    for (int64_t l = 0; l < kLayers; ++l)
      layers[l] = layer_of(tensors + kNorms + kParts * l, s.rows(l), s.columns(l), type);
    const bf16 *first = norm_of(kInputNorm), *second = norm_of(kMlpNorm);
    STD_TORCH_CHECK(first && second, "losa::decode_step: a block without its norms");
    norm(hidden, first, s.hidden, epsilon, b.normed.data());
    multiply(k, layers[kQuery], b.normed.data(), b.query.data());
    multiply(k, layers[kKey], b.normed.data(), b.key.data());
    multiply(k, layers[kValue], b.normed.data(), b.value.data());
    attention(b, norm_of(kQueryNorm), norm_of(kKeyNorm), keys, values, capacity);
    multiply(k, layers[kOutput], b.attended.data(), b.projected.data());
    add(hidden, b.projected.data(), s.hidden);
    norm(hidden, second, s.hidden, epsilon, b.normed.data());
    multiply(k, layers[kGate], b.normed.data(), b.gate.data());
    multiply(k, layers[kUp], b.normed.data(), b.up.data());
    k.gate(b.gate.data(), b.up.data(), s.inner, b.gate.data());
    multiply(k, layers[kDown], b.gate.data(), b.projected.data());
    add(hidden, b.projected.data(), s.hidden);
  }
};

// x [hidden] -> the normed hidden state [hidden] that the head takes. `tensors`: see Norms; the last is the final norm.
Tensor decode_step(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const Tensor& cosine, const Tensor& sine,
                   const std::vector<int64_t>& shape, double epsilon, double scaling, int64_t position,
                   int64_t values_type, int64_t kernel) {
  STD_TORCH_CHECK(shape.size() == 5,
                  "losa::decode_step: the shape is hidden, heads, heads of the cache, their width, inner");
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  const int64_t blocks = int64_t(keys.size()), turned = cosine.numel();
  STD_TORCH_CHECK(s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.width > 0 && s.inner > 0 &&
                      s.heads % s.kv_heads == 0 && turned % 2 == 0 && turned <= s.width,
                  "losa::decode_step: impossible shape");
  STD_TORCH_CHECK(blocks > 0 && values.size() == keys.size() && int64_t(tensors.size()) == blocks * kPerBlock + 1,
                  "losa::decode_step: expected ", kPerBlock, " tensors for each of ", blocks,
                  " blocks and a norm, found ", tensors.size());
  const Step step{s,
                  kernels_of(kernel),
                  position,
                  float(epsilon),
                  float(scaling),
                  vector_of(cosine, turned, "cosines"),
                  vector_of(sine, turned, "sines"),
                  turned,
                  values_type};
  const bf16 *from = vector_of(x, s.hidden, "the hidden state"),
             *last = vector_of(tensors.back(), s.hidden, "the last norm");
  STD_TORCH_CHECK(from && last, "losa::decode_step: no hidden state or no last norm");
  std::vector<bf16> hidden(from, from + s.hidden);
  Scratch scratch(s);
  for (int64_t b = 0; b < blocks; ++b) {
    const Tensor &key = keys[size_t(b)], &value = values[size_t(b)];
    for (const Tensor* t : {&key, &value})
      STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::BFloat16 && t->dim() == 4 &&
                          t->size(0) == 1 && t->size(1) == s.kv_heads && t->size(3) == s.width && position >= 0 &&
                          position < t->size(2),
                      "losa::decode_step: a cache is a contiguous bfloat16 [1, ", s.kv_heads, ", more than ", position,
                      ", ", s.width, "] tensor");
    STD_TORCH_CHECK(key.size(2) == value.size(2), "losa::decode_step: keys and values have different room");
    step.block(hidden.data(), &tensors[size_t(b * kPerBlock)], static_cast<bf16*>(key.mutable_data_ptr()),
               static_cast<bf16*>(value.mutable_data_ptr()), key.size(2), scratch);
  }
  Tensor y = torch::stable::new_empty(x, {1, 1, s.hidden});
  norm(hidden.data(), last, s.hidden, step.epsilon, static_cast<bf16*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace
}  // namespace losa

STABLE_TORCH_LIBRARY_FRAGMENT(losa, m) {
  m.def(
      "decode_step(Tensor x, Tensor[] tensors, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cosine, Tensor sine, "
      "int[] shape, float epsilon, "
      "float scaling, int position, int values_type, int kernel) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(losa, CPU, m) { m.impl("decode_step", TORCH_BOX(&losa::decode_step)); }
