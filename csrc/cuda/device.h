// Questions about tensors and their device that decide which CUDA kernel runs.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include <optional>

#include "element.h"

namespace pcx {

// The kernels' number type of a tensor, or none if they do not compute its dtype.
inline std::optional<Element> element(const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat) return Element::kFloat;
  if (x.scalar_type() == at::kBFloat16) return Element::kBFloat16;
  if (x.scalar_type() == at::kHalf) return Element::kHalf;
  return std::nullopt;
}

inline int attribute(const at::Tensor& on, cudaDeviceAttr which) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, on.device().index()));
  return value;
}

// Whether rows are dense and begin on multiples of 16 bytes.
inline bool on_lines_of_16_bytes(const at::Tensor& x) {
  if (x.stride(-1) != 1 || reinterpret_cast<uintptr_t>(x.data_ptr()) % 16) return false;
  const int64_t line = 16 / x.element_size();
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    if (x.size(i) > 1 && x.stride(i) % line) return false;
  return true;
}

}  // namespace pcx
