// The operator losa::sparse_linear on the CPU, through LibTorch's stable ABI: one build serves every torch from 2.10
// on.
//
// y_TO = x_TI W_OI^T + b_O, W packed: `multiply` of product.cpp, on torch's own threads; for many tokens, where that is
// faster, panels of rows are decoded to a dense matrix that stays in the L2 cache and go through torch's own GEMM.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "tensors.h"

namespace losa {
namespace {

constexpr int64_t kRows = 64;             // of a dense matrix, at a time
constexpr int64_t kPanelBytes = 2 << 20;  // a panel stays in the L2 cache, or at worst the L3

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x W^T for panels of rows, by torch's GEMM; in float32 where it has no fast one for bfloat16.
bool by_panels(const Packed& p, const Kernels& k, const Tensor& x_in, const std::optional<Tensor>& bias, bf16* y_out) {
  const ScalarType dtype = k.bf16_gemm ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t strips = divide_up(p.rows, kStrip), row_bytes = std::max<int64_t>(1, p.columns * (k.bf16_gemm ? 2 : 4));
  const int64_t step = std::max<int64_t>(1, kPanelBytes / (row_bytes * kStrip)), tokens = x_in.size(0);
  const Tensor x = torch::stable::to(x_in, dtype);
  std::atomic<bool> ok{true};
  for (int64_t s = 0; s < strips; s += step) {
    const int64_t last = std::min(strips, s + step), from = s * kStrip, rows = std::min(p.rows, last * kStrip) - from;
    Tensor panel = torch::stable::new_empty(x, {rows, p.columns});
    void* out = panel.mutable_data_ptr();
    torch::stable::parallel_for(s, last, grain(p, kStrip), [&](int64_t begin, int64_t end) {
      const bool fits = k.bf16_gemm ? expand(p, k, s, begin, end, static_cast<bf16*>(out))
                                    : expand(p, k, s, begin, end, static_cast<float*>(out));
      if (!fits) ok = false;
    });
    std::optional<Tensor> shift;
    if (bias) shift = torch::stable::to(torch::stable::narrow(const_cast<Tensor&>(*bias), 0, from, rows), dtype);
    const Tensor product = torch::stable::to(linear(x, panel, shift), ScalarType::BFloat16);
    const bf16* y = static_cast<const bf16*>(product.const_data_ptr());
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(y_out + t * p.rows + from, y + t * rows, size_t(rows) * sizeof(bf16));
  }
  return ok;
}

Tensor sparse_linear(const Tensor& x_in, const Tensor& mask, const Tensor& values, const Tensor& offsets,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& groups,
                     const std::optional<Tensor>& bias, int64_t rows, int64_t columns, int64_t type, int64_t kernel) {
  const Kernels& k = kernels_of(kernel);
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == ScalarType::BFloat16 && x_in.dim() == 2,
                  "losa::sparse_linear: x must be a bfloat16 [tokens, columns] tensor on the CPU");
  STD_TORCH_CHECK(x_in.size(1) == columns, "losa::sparse_linear: found ", x_in.size(1),
                  " features in x, the weight has ", columns);
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const int64_t tokens = x.size(0);
  const Packed p = view(mask, values, offsets, scale, groups, rows, columns, type);
  if (bias)
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16 && bias->numel() == rows,
        "losa::sparse_linear: expected ", rows, " bfloat16 biases");
  Tensor y = torch::stable::new_empty(x, {tokens, rows});
  if (tokens == 0 || rows == 0) return y;

  bf16* out = static_cast<bf16*>(y.mutable_data_ptr());
  const bf16* shift = bias ? static_cast<const bf16*>(bias->const_data_ptr()) : nullptr;
  const Parallel parallel = on_torch_threads;
  const Part part{p, shift, out};
  const bool ok = multiplies(k, p.type, tokens)
                      ? multiply(&part, 1, k, static_cast<const bf16*>(x.const_data_ptr()), tokens, parallel)
                      : by_panels(p, k, x, bias, out);
  STD_TORCH_CHECK(ok, "losa::sparse_linear: the masks and offsets of this packed weight disagree; the file is corrupt");
  return y;
}

// One token times a dense matrix that is read once.
Tensor dense_linear(const Tensor& x_in, const Tensor& weight, int64_t kernel) {
  const Kernels& k = kernels_of(kernel);
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16 && weight.dim() == 2,
      "losa::dense_linear: the weight must be a contiguous bfloat16 [rows, columns] tensor on the CPU");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.scalar_type() == ScalarType::BFloat16 && x_in.numel() == columns,
                  "losa::dense_linear: x must be one token of ", columns, " bfloat16 features on the CPU, found ",
                  x_in.numel());
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Tensor y = torch::stable::new_empty(x, {rows});
  const auto* from = static_cast<const bf16*>(x.const_data_ptr());
  const auto* w = static_cast<const bf16*>(weight.const_data_ptr());
  auto* out = static_cast<bf16*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kRows, 65536 / (columns + 1)),
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> wide(static_cast<size_t>(columns));
                                float dots[kRows];
                                for (int64_t r = begin; r < end; r += kRows) {
                                  const int64_t n = std::min(kRows, end - r);
                                  k.dots(from, w + r * columns, n, columns, dots, wide.data());
                                  std::transform(dots, dots + n, out + r, to_bf16);
                                }
                              });
  return y;
}

}  // namespace
}  // namespace losa

STABLE_TORCH_LIBRARY(losa, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor? scale, Tensor? groups, Tensor? "
      "bias, int rows, int columns, "
      "int values_type, int kernel) -> Tensor");
  m.def("dense_linear(Tensor x, Tensor weight, int kernel) -> Tensor");
  m.def("cpu_kernels() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(losa, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear));
  m.impl("dense_linear", TORCH_BOX(&losa::dense_linear));
}
STABLE_TORCH_LIBRARY_IMPL(losa, CompositeExplicitAutograd, m) { m.impl("cpu_kernels", TORCH_BOX(&losa::cpu_kernels)); }
