// What the operators of ops.cpp and decode.cpp share: which kernels run here, and a packed weight's tensors as the
// kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "product.h"

namespace losa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Kernel : int64_t { kPortable, kAvx2, kAvx512, kAmx, kAvx512A8, kAmxA8 };

inline bool runs_here(int64_t kernel) {
  if (kernel == kPortable) return true;
#if defined(__x86_64__)
  if (kernel == kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vpopcntdq") && runs_here(kAvx2);
  if (kernel == kAvx512 || kernel == kAvx512A8) return avx512;
  if (kernel == kAmx || kernel == kAmxA8) return avx512 && amx_permitted();
#endif
  return false;
}

inline const Kernels& kernels_of(int64_t kernel) {
  STD_TORCH_CHECK(runs_here(kernel), "losa::sparse_linear: this CPU does not run kernel ", kernel,
                  " (0 portable, 1 avx2, 2 avx512, 3 amx, 4 avx512-a8, 5 amx-a8); see losa::cpu_kernels");
#if defined(__x86_64__)
  if (kernel == kAvx2) return avx2_kernels();
  if (kernel == kAvx512) return avx512_kernels();
  if (kernel == kAmx) return amx_kernels();
  if (kernel == kAvx512A8) return avx512_a8_kernels();
  if (kernel == kAmxA8) return amx_a8_kernels();
#endif
  return portable_kernels();
}

inline int64_t cpu_kernels() {  // bit k set: kernel k runs here
  int64_t bits = 0;
  for (int64_t k = kPortable; k <= kAmx; ++k) bits |= int64_t(runs_here(k)) << k;
  return bits;
}

constexpr ScalarType stored_as(const TypeRow& row) {
  return row.bits == 16 ? ScalarType::BFloat16 : row.bits == 8 ? ScalarType::Char : ScalarType::Byte;
}

// The memory of `t`, once it is what the format says.
template <typename T>
inline const T* checked(const std::optional<Tensor>& t, bool wanted, ScalarType type, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.has_value() == wanted, "losa::sparse_linear: this type of values comes ",
                  wanted ? "with " : "without ", name);
  if (!wanted) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous(),
                  "losa::sparse_linear: packed tensors must be contiguous, on the CPU");
  STD_TORCH_CHECK(t->scalar_type() == type && t->numel() == size, "losa::sparse_linear: expected ", size, " ", name,
                  " of their type, found ", t->numel());
  return static_cast<const T*>(t->const_data_ptr());
}

inline Packed view(const Tensor& mask, const Tensor& values, const Tensor& offsets, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& groups, int64_t rows, int64_t columns, int64_t type) {
  STD_TORCH_CHECK(type >= 0 && type < kTypes, "losa::sparse_linear: no type of values has the number ", type);
  const TypeRow& row = kTypeRows[type];
  STD_TORCH_CHECK(values.scalar_type() == stored_as(row),
                  "losa::sparse_linear: values of another dtype than their type has");
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous(),
                  "losa::sparse_linear: packed tensors must be contiguous, on the CPU");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "losa::sparse_linear: negative shape");
  const int64_t strips = divide_up(rows, kStrip), words = divide_up(columns, row.columns);
  Packed p{ValueType(type), rows, columns, words, nullptr, values.const_data_ptr(), 0, nullptr, nullptr, nullptr};
  p.mask = checked<uint8_t>(mask, true, ScalarType::Byte, strips * words * p.word_bytes(), "mask bytes");
  p.offsets = checked<int64_t>(offsets, true, ScalarType::Long, strips + 1, "offsets");
  p.scale = checked<float>(scale, row.scaled, ScalarType::Float, rows, "a scale per row");
  p.groups = checked<uint8_t>(groups, row.grouped, ScalarType::Byte, strips * divide_up(columns, kGroup) * kStrip,
                              "scales of groups");
  p.count = row.shared() * values.numel();
  for (int64_t s = 0; s <= strips; ++s)
    STD_TORCH_CHECK(p.offsets[s] >= 0 && p.offsets[s] <= p.count, "losa::sparse_linear: offset ", p.offsets[s],
                    " outside the ", p.count, " values");
  return p;
}

inline void on_torch_threads(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  torch::stable::parallel_for(begin, end, grain, work);
}

}  // namespace losa
