// salient_linear and salient_sum on CUDA: decides which calls the kernel runs. Triton's kernel, or
// the reference in plain torch, runs every other call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"
#include "salient_linear.h"

namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<ScalarType>;
using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Signature = Found(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                        const OptionalTensor&, const OptionalTensor&, double, OptionalType,
                        ScalarType, bool);
using Sum = std::tuple<Tensor, Tensor>;
using SumSignature = Sum(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         double, const OptionalTensor&, const OptionalTensor&, double, ScalarType,
                         ScalarType);

std::optional<pcx::Element> element(ScalarType type) {
  if (type == at::kFloat) return pcx::Element::kFloat;
  if (type == at::kBFloat16) return pcx::Element::kBFloat16;
  if (type == at::kHalf) return pcx::Element::kHalf;
  return std::nullopt;
}

bool dense(const Tensor& x) {
  return x.is_contiguous() && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// The reason why the kernel cannot run, or an empty text if it can.
std::string cannot(const Tensor& x, const OptionalTensor& y, const Tensor& index,
                   const Tensor& weight, const Tensor& bias, const OptionalTensor& norm_weight,
                   const OptionalTensor& norm_bias, OptionalType dtype, ScalarType product) {
  for (const Tensor* given :
       {&x, y ? &*y : nullptr, &weight, &bias, norm_weight ? &*norm_weight : nullptr,
        norm_bias ? &*norm_bias : nullptr}) {
    if (!given) continue;
    if (!pcx::element(*given))
      return std::string("it computes bfloat16, float16 and float32, got ") +
             toString(given->scalar_type());
    if (!dense(*given)) return "a tensor is not contiguous in memory";
  }
  if (!index.is_contiguous()) return "the index is not contiguous in memory";
  for (const ScalarType type : {product, dtype.value_or(at::kFloat)})
    if (!element(type))
      return std::string("it computes bfloat16, float16 and float32, not ") + toString(type);
  const int64_t dim = x.size(-1), count = index.size(0);
  if (dim % 4 || dim > pcx::kWidestNorm)
    return "it needs a width that is a multiple of 4 and at most " +
           std::to_string(pcx::kWidestNorm) + ", got " + std::to_string(dim);
  if (x.numel() == 0) return "there are no rows";
  if (x.numel() / dim > std::numeric_limits<int>::max() / 2) return "there are too many rows";
  if (count > pcx::kMostChannels ||
      pcx::salient_bytes(static_cast<int>(count), static_cast<int>(dim), *element(product)) >
          pcx::attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return "the shared memory of a block cannot hold the matrix of " + std::to_string(count) +
           " channels";
  if (pcx::attribute(x, cudaDevAttrComputeCapabilityMajor) < 8)
    return "it needs compute capability 8.0 or more";
  return {};
}

void check(const Tensor& x, const OptionalTensor& y, const Tensor& index, const Tensor& weight,
           const Tensor& bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias) {
  bool fits = x.dim() > 0 && index.dim() == 1 && index.scalar_type() == at::kLong &&
              index.size(0) > 0 && index.size(0) <= x.size(-1) &&
              (!y || (y->sizes() == x.sizes() && y->device() == x.device()));
  for (const OptionalTensor* given : {&norm_weight, &norm_bias})
    fits = fits && (!*given || ((*given)->sizes() == x.sizes().slice(x.dim() - 1) &&
                                (*given)->device() == x.device()));
  fits = fits && weight.sizes() == at::IntArrayRef({index.size(0), index.size(0)}) &&
         bias.sizes() == index.sizes();
  for (const Tensor* given : {&index, &weight, &bias}) fits = fits && given->device() == x.device();
  TORCH_CHECK(fits, "salient_linear: y, index, weight, bias or norm does not fit x");
}

pcx::Rows rows_of(const OptionalTensor& x) {
  if (!x) return {nullptr, pcx::Element::kFloat};
  return {x->const_data_ptr(), *pcx::element(*x)};
}

// What the kernel gives: the changed x, or x + y where there is a y, is written to `to`.
Found run(const Tensor& x, const OptionalTensor& y, const Tensor& to, const Tensor& index,
          const Tensor& weight, const Tensor& bias, double scale, const OptionalTensor& norm_weight,
          const OptionalTensor& norm_bias, double eps, OptionalType dtype, ScalarType product,
          bool keep) {
  const c10::cuda::CUDAGuard guard(x.device());
  c10::SmallVector<int64_t, 5> u_sizes(x.sizes()), row_sizes(x.sizes()), nothing{0};
  u_sizes.back() = index.size(0), row_sizes.back() = 1;
  const bool keeps_rows = keep && dtype;
  const auto wide = x.options().dtype(at::kFloat);
  const Tensor normed = at::empty(dtype ? x.sizes() : at::IntArrayRef(nothing),
                                  x.options().dtype(dtype.value_or(x.scalar_type())));
  const Tensor u = at::empty(keep ? u_sizes : nothing, x.options().dtype(product));
  const Tensor mean = at::empty(keeps_rows ? row_sizes : nothing, wide);
  const Tensor rstd = at::empty(keeps_rows ? row_sizes : nothing, wide);
  const pcx::SalientLinear call{
      .x = rows_of(x),
      .y = rows_of(y),
      .to = to.mutable_data_ptr(),
      .to_type = *pcx::element(to),
      .index = index.const_data_ptr<int64_t>(),
      .matrix = rows_of(weight),
      .bias = rows_of(bias),
      .scale = static_cast<float>(scale),
      .product = *element(product),
      .norm_weight = rows_of(norm_weight),
      .norm_bias = rows_of(norm_bias),
      .eps = static_cast<float>(eps),
      .normed = dtype ? normed.mutable_data_ptr() : nullptr,
      .normed_type = *pcx::element(normed),
      .u = keep ? u.mutable_data_ptr() : nullptr,
      .mean = keeps_rows ? mean.mutable_data_ptr<float>() : nullptr,
      .rstd = keeps_rows ? rstd.mutable_data_ptr<float>() : nullptr,
      .rows = static_cast<int>(x.numel() / x.size(-1)),
      .dim = static_cast<int>(x.size(-1)),
      .count = static_cast<int>(index.size(0)),
      .processors = pcx::attribute(x, cudaDevAttrMultiProcessorCount),
  };
  C10_CUDA_CHECK(pcx::launch_salient_linear(call, c10::cuda::getCurrentCUDAStream()));
  return {normed, u, mean, rstd};
}

Found salient_linear(const Tensor& x, const Tensor& index, const Tensor& weight, const Tensor& bias,
                     double scale, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, double eps, OptionalType dtype,
                     ScalarType product, bool keep) {
  check(x, {}, index, weight, bias, norm_weight, norm_bias);
  if (cannot(x, {}, index, weight, bias, norm_weight, norm_bias, dtype, product).empty())
    return run(x, {}, x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product,
               keep);
  static const auto in_triton = pcx::operation<Signature>("pcx::salient_linear_triton");
  return in_triton.call(x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product,
                        keep);
}

// The same for backend="cuda", which raises an error instead of falling back.
Found in_cuda(const Tensor& x, const Tensor& index, const Tensor& weight, const Tensor& bias,
              double scale, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
              double eps, OptionalType dtype, ScalarType product, bool keep) {
  check(x, {}, index, weight, bias, norm_weight, norm_bias);
  const std::string reason =
      cannot(x, {}, index, weight, bias, norm_weight, norm_bias, dtype, product);
  TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
  return run(x, {}, x, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product,
             keep);
}

Sum run_sum(const Tensor& x, const Tensor& y, const Tensor& index, const Tensor& weight,
            const Tensor& bias, double scale, const OptionalTensor& norm_weight,
            const OptionalTensor& norm_bias, double eps, ScalarType dtype, ScalarType product) {
  const Tensor total =
      at::empty(x.sizes(), x.options().dtype(c10::promoteTypes(x.scalar_type(), y.scalar_type())));
  const Tensor normed = std::get<0>(run(x, y, total, index, weight, bias, scale, norm_weight,
                                        norm_bias, eps, dtype, product, false));
  return {total, normed};
}

Sum salient_sum(const Tensor& x, const Tensor& y, const Tensor& index, const Tensor& weight,
                const Tensor& bias, double scale, const OptionalTensor& norm_weight,
                const OptionalTensor& norm_bias, double eps, ScalarType dtype, ScalarType product) {
  check(x, y, index, weight, bias, norm_weight, norm_bias);
  if (cannot(x, y, index, weight, bias, norm_weight, norm_bias, dtype, product).empty())
    return run_sum(x, y, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product);
  static const auto in_two = pcx::operation<SumSignature>("pcx::salient_sum_in_two");
  return in_two.call(x, y, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product);
}

// The same for backend="cuda", which raises an error instead of falling back.
Sum sum_in_cuda(const Tensor& x, const Tensor& y, const Tensor& index, const Tensor& weight,
                const Tensor& bias, double scale, const OptionalTensor& norm_weight,
                const OptionalTensor& norm_bias, double eps, ScalarType dtype, ScalarType product) {
  check(x, y, index, weight, bias, norm_weight, norm_bias);
  const std::string reason =
      cannot(x, y, index, weight, bias, norm_weight, norm_bias, dtype, product);
  TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
  return run_sum(x, y, index, weight, bias, scale, norm_weight, norm_bias, eps, dtype, product);
}

const pcx::Implementations implementations(c10::DispatchKey::CUDA, [](torch::Library& library) {
  library.impl("salient_linear", &salient_linear);
  library.impl("salient_linear_cuda", &in_cuda);
  library.impl("salient_sum", &salient_sum);
  library.impl("salient_sum_cuda", &sum_in_cuda);
});

}  // namespace
