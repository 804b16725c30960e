// Two operators: losa::decode_plan looks once at a Llama-like model's tensors, and losa::decode_step takes one token
// through all of its blocks, outside Python.
//
// For each block: h += O(attention(Q(n), K(n), V(n))), n = norm(h); h += down(silu(gate(m)) * up(m)), m = norm(h).
// Numbers are rounded to bfloat16 where transformers' modules round them; inside attention, sums are float32. The cache
// is the caller's, one [1, heads, capacity, width] tensor of keys and one of values a block; this token's go to index
// `position`, and 0..position are attended to.
//
// A plan is a tensor of bytes that holds addresses: it is of use in this process only, and while whoever made it holds
// the tensors it was made of. A step that took those instead, a thousand and more, would spend up to an eighth of its
// time on their handles.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
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
                  "losa::decode_plan and decode_step: expected ", n, " bfloat16 numbers on the CPU for ", what,
                  ", found ", t.numel());
  return static_cast<const bf16*>(t.const_data_ptr());
}

std::optional<Tensor> optional(const Tensor& t) { return t.numel() > 0 ? std::optional<Tensor>(t) : std::nullopt; }

Layer layer_of(const Tensor* parts, int64_t rows, int64_t columns, int64_t type) {
  const Packed p = view(parts[0], parts[1], parts[2], optional(parts[3]), optional(parts[4]), rows, columns, type);
  return {p, vector_of(parts[5], rows, "a bias")};
}

struct Block {
  const bf16* norms[kNorms];
  Layer layers[kLayers];
};

// What a plan's bytes are: this, then the blocks.
struct Plan {
  static constexpr uint64_t kMark = 0x6c6f7361706c616e;  // "losaplan"
  uint64_t mark;
  int64_t blocks;
  Shape s;
  const bf16* last;  // the final norm
  const Block* block(int64_t b) const { return reinterpret_cast<const Block*>(this + 1) + b; }
  Block* block(int64_t b) { return reinterpret_cast<Block*>(this + 1) + b; }
  static int64_t bytes(int64_t blocks) { return int64_t(sizeof(Plan)) + blocks * int64_t(sizeof(Block)); }
};
static_assert(std::is_trivially_copyable_v<Plan> && std::is_trivially_copyable_v<Block> &&
              sizeof(Plan) % alignof(Block) == 0);

template <size_t N>
void multiply(const Kernels& k, const Part (&parts)[N], const bf16* x) {
  const Parallel parallel = on_torch_threads;
  const bool ok = multiply(parts, N, k, x, 1, parallel);
  STD_TORCH_CHECK(ok, "losa::decode_step: the masks and offsets of a packed weight disagree; the file is corrupt");
}
Part into(const Layer& layer, std::vector<bf16>& y) { return {layer.p, layer.bias, y.data()}; }

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
  const int64_t turned;

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
          std::vector<float> scores(size_t(shared * score_room(tokens) + s.width));
          float* sums = scores.data() + shared * score_room(tokens);
          for (int64_t h = begin, next; h < end; h = next) {
            next = std::min(end, (h / shared + 1) * shared);
            const int64_t from = h / shared * capacity * s.width;
            k.attend(&b.query[size_t(h * s.width)], next - h, keys + from, values + from, tokens, s.width, scaling,
                     scores.data(), sums, &b.attended[size_t(h * s.width)]);
          }
        });
  }

  void block(bf16* hidden, const Block& block, bf16* keys, bf16* values, int64_t capacity, Scratch& b) const {
    const auto& layers = block.layers;
    norm(hidden, block.norms[kInputNorm], s.hidden, epsilon, b.normed.data());
    multiply(k, {into(layers[kQuery], b.query), into(layers[kKey], b.key), into(layers[kValue], b.value)},
             b.normed.data());
    attention(b, block.norms[kQueryNorm], block.norms[kKeyNorm], keys, values, capacity);
    multiply(k, {into(layers[kOutput], b.projected)}, b.attended.data());
    add(hidden, b.projected.data(), s.hidden);
    norm(hidden, block.norms[kMlpNorm], s.hidden, epsilon, b.normed.data());
    multiply(k, {into(layers[kGate], b.gate), into(layers[kUp], b.up)}, b.normed.data());
    k.gate(b.gate.data(), b.up.data(), s.inner, b.gate.data());
    multiply(k, {into(layers[kDown], b.projected)}, b.gate.data());
    add(hidden, b.projected.data(), s.hidden);
  }
};

// `tensors`: see Norms; the last is the final norm. `shape`: see Shape.
Tensor decode_plan(const std::vector<Tensor>& tensors, const std::vector<int64_t>& shape, int64_t values_type) {
  STD_TORCH_CHECK(shape.size() == 5,
                  "losa::decode_plan: the shape is hidden, heads, heads of the cache, their width, inner");
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  STD_TORCH_CHECK(
      s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.width > 0 && s.inner > 0 && s.heads % s.kv_heads == 0,
      "losa::decode_plan: impossible shape");
  const int64_t blocks = int64_t(tensors.size()) / kPerBlock;
  STD_TORCH_CHECK(blocks > 0 && int64_t(tensors.size()) == blocks * kPerBlock + 1, "losa::decode_plan: expected ",
                  kPerBlock, " tensors for each block and a norm, found ", tensors.size());
  Tensor bytes = torch::stable::new_empty(tensors.back(), {Plan::bytes(blocks)}, ScalarType::Byte);
  Plan* plan =
      new (bytes.mutable_data_ptr()) Plan{Plan::kMark, blocks, s, vector_of(tensors.back(), s.hidden, "a norm")};
  STD_TORCH_CHECK(plan->last, "losa::decode_plan: no last norm");
  for (int64_t b = 0; b < blocks; ++b) {
    const Tensor* from = &tensors[size_t(b * kPerBlock)];
    Block* block = new (plan->block(b)) Block{};
    for (int64_t i = 0; i < kNorms; ++i)
      block->norms[i] = vector_of(from[i], i < kQueryNorm ? s.hidden : s.width, "a norm");
    STD_TORCH_CHECK(block->norms[kInputNorm] && block->norms[kMlpNorm], "losa::decode_plan: a block without its norms");
    for (int64_t l = 0; l < kLayers; ++l)
      block->layers[l] = layer_of(from + kNorms + kParts * l, s.rows(l), s.columns(l), values_type);
  }
  return bytes;
}

// x [hidden] -> the normed hidden state [hidden] that the head takes.
Tensor decode_step(const Tensor& x, const Tensor& plan_bytes, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const Tensor& cosine, const Tensor& sine, double epsilon,
                   double scaling, int64_t position, int64_t kernel) {
  STD_TORCH_CHECK(plan_bytes.is_cpu() && plan_bytes.is_contiguous() && plan_bytes.scalar_type() == ScalarType::Byte &&
                      plan_bytes.numel() >= int64_t(sizeof(Plan)),
                  "losa::decode_step: no plan");
  const Plan& plan = *static_cast<const Plan*>(plan_bytes.const_data_ptr());
  STD_TORCH_CHECK(plan.mark == Plan::kMark && plan_bytes.numel() == Plan::bytes(plan.blocks),
                  "losa::decode_step: no plan");
  const Shape& s = plan.s;
  const int64_t blocks = plan.blocks, turned = cosine.numel();
  STD_TORCH_CHECK(turned % 2 == 0 && turned <= s.width, "losa::decode_step: impossible rotary positions");
  STD_TORCH_CHECK(int64_t(keys.size()) == blocks && int64_t(values.size()) == blocks,
                  "losa::decode_step: expected keys and values of ", blocks, " blocks, found ", keys.size());
  const Step step{s,
                  kernels_of(kernel),
                  position,
                  float(epsilon),
                  float(scaling),
                  vector_of(cosine, turned, "cosines"),
                  vector_of(sine, turned, "sines"),
                  turned};
  const bf16* from = vector_of(x, s.hidden, "the hidden state");
  STD_TORCH_CHECK(from, "losa::decode_step: no hidden state");
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
    step.block(hidden.data(), *plan.block(b), static_cast<bf16*>(key.mutable_data_ptr()),
               static_cast<bf16*>(value.mutable_data_ptr()), key.size(2), scratch);
  }
  Tensor y = torch::stable::new_empty(x, {1, 1, s.hidden});
  norm(hidden.data(), plan.last, s.hidden, step.epsilon, static_cast<bf16*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace
}  // namespace losa

STABLE_TORCH_LIBRARY_FRAGMENT(losa, m) {
  m.def("decode_plan(Tensor[] tensors, int[] shape, int values_type) -> Tensor");
  m.def(
      "decode_step(Tensor x, Tensor plan, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor cosine, Tensor sine, "
      "float epsilon, float scaling, int position, int kernel) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(losa, CPU, m) {
  m.impl("decode_plan", TORCH_BOX(&losa::decode_plan));
  m.impl("decode_step", TORCH_BOX(&losa::decode_step));
}
