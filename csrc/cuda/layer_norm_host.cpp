// add_layer_norm on CUDA: decides which calls the kernel runs. The reference in plain torch runs
// every other call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"
#include "layer_norm.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Found = std::tuple<Tensor, Tensor>;
using Signature = Found(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, double, at::ScalarType);

bool narrow(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

bool dense(const OptionalTensor& x) {
  return !x || (x->is_contiguous() && reinterpret_cast<uintptr_t>(x->data_ptr()) % 16 == 0);
}

// The reason why the kernel cannot run, or an empty text if it can.
std::string cannot(const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
                   const OptionalTensor& bias, at::ScalarType dtype) {
  for (const Tensor* given :
       {&x, y ? &*y : nullptr, weight ? &*weight : nullptr, bias ? &*bias : nullptr})
    if (given && !pcx::element(*given))
      return std::string("it computes bfloat16, float16 and float32, got ") +
             toString(given->scalar_type());
  if (!narrow(dtype) && dtype != at::kFloat)
    return std::string("it gives bfloat16, float16 and float32, not ") + toString(dtype);
  if (y && y->scalar_type() != x.scalar_type() && x.scalar_type() != at::kFloat)
    return "the sum has another dtype than x";
  const int64_t dim = x.size(-1);
  if (dim % 4 || dim > pcx::kWidestNorm)
    return "it needs a width that is a multiple of 4 and at most " +
           std::to_string(pcx::kWidestNorm) + ", got " + std::to_string(dim);
  if (x.numel() == 0) return "there are no rows";
  if (x.numel() / dim > std::numeric_limits<int>::max()) return "there are too many rows";
  if (!dense(x) || !dense(y) || !dense(weight) || !dense(bias))
    return "a tensor is not contiguous in memory";
  return {};
}

void check(const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
           const OptionalTensor& bias) {
  bool fits = x.dim() > 0 && (!y || (y->sizes() == x.sizes() && y->device() == x.device()));
  for (const OptionalTensor* given : {&weight, &bias})
    fits = fits && (!*given || ((*given)->sizes() == x.sizes().slice(x.dim() - 1) &&
                                (*given)->device() == x.device()));
  TORCH_CHECK(fits, "add_layer_norm: y, weight or bias does not fit x");
}

pcx::Rows rows_of(const OptionalTensor& x) {
  if (!x) return {nullptr, pcx::Element::kFloat};
  return {x->const_data_ptr(), *pcx::element(*x)};
}

Found run(const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
          const OptionalTensor& bias, double eps, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor sum = y ? at::empty_like(x) : at::empty({0}, x.options());
  const Tensor normed = at::empty(x.sizes(), x.options().dtype(dtype));
  const pcx::AddLayerNorm call{
      .x = rows_of(x),
      .y = rows_of(y),
      .weight = rows_of(weight),
      .bias = rows_of(bias),
      .sum = y ? sum.mutable_data_ptr() : nullptr,
      .normed = normed.mutable_data_ptr(),
      .type = *pcx::element(normed),
      .eps = static_cast<float>(eps),
      .rows = static_cast<int>(x.numel() / x.size(-1)),
      .dim = static_cast<int>(x.size(-1)),
  };
  C10_CUDA_CHECK(pcx::launch_add_layer_norm(call, c10::cuda::getCurrentCUDAStream()));
  return {sum, normed};
}

Found add_layer_norm(const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, at::ScalarType dtype) {
  check(x, y, weight, bias);
  if (cannot(x, y, weight, bias, dtype).empty()) return run(x, y, weight, bias, eps, dtype);
  static const auto written_out = pcx::operation<Signature>("pcx::add_layer_norm_written_out");
  return written_out.call(x, y, weight, bias, eps, dtype);
}

// The same for backend="cuda", which raises an error instead of falling back.
Found in_cuda(const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
              const OptionalTensor& bias, double eps, at::ScalarType dtype) {
  check(x, y, weight, bias);
  const std::string reason = cannot(x, y, weight, bias, dtype);
  TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
  return run(x, y, weight, bias, eps, dtype);
}

const pcx::Implementations implementations(c10::DispatchKey::CUDA, [](torch::Library& library) {
  library.impl("add_layer_norm", &add_layer_norm);
  library.impl("add_layer_norm_cuda", &in_cuda);
});

}  // namespace
