// weighted_pagerank on CUDA: which calls the kernels take. What they leave is Triton's, or torch's
// where that cannot take it either.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <climits>
#include <optional>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"
#include "weighted_pagerank.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMostStride = INT_MAX / 4;  // elements, whose bytes a kernel counts in 32 bits

bool once(const Tensor& q, int64_t iters) {
  return iters == 1 && pcx::element(q) != pcx::Element::kFloat;
}

bool fits(const Tensor& q, const Tensor& k, int64_t nodes, const OptionalTensor& among,
          int64_t iters, double scale) {
  const auto type = pcx::element(q);
  const int64_t dim = q.size(3);
  if (!type || pcx::element(k) != type || nodes > pcx::kMostNodes || dim > 128 || dim % 8 ||
      !(scale > 0) || q.stride(2) > kMostStride || k.stride(2) > kMostStride ||
      !pcx::on_lines_of_16_bytes(q) || !pcx::on_lines_of_16_bytes(k) ||
      (among && among->stride(1) != 1))
    return false;
  const int major = pcx::attribute(q, cudaDevAttrComputeCapabilityMajor);
  const bool matrix_stays = nodes <= pcx::kMostInOneBlock || major == 9 || once(q, iters);
  return (major == 8 || major == 9) && matrix_stays &&
         pcx::shared_bytes(static_cast<int>(nodes), static_cast<int>(dim), *type) <=
             pcx::attribute(q, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

Tensor weighted_pagerank(const Tensor& q, const Tensor& k, const Tensor& init,
                         const OptionalTensor& bias, const OptionalTensor& prefix_k,
                         const OptionalTensor& among, int64_t iters, double scale) {
  const int64_t nodes = among ? among->size(1) : q.size(2);
  TORCH_CHECK(k.sizes() == q.sizes() && k.device() == q.device() &&
                  init.sizes() == at::IntArrayRef({q.size(0), q.size(1), nodes}) &&
                  init.device() == q.device() && iters >= 0 && iters <= INT_MAX &&
                  (!among || (among->device() == q.device() && among->size(0) == q.size(0) &&
                              among->scalar_type() == at::kLong)),
              "weighted_pagerank: k, init, among or iters does not fit q");
  if (bias || prefix_k || iters == 0 || init.numel() == 0 ||
      !fits(q, k, nodes, among, iters, scale)) {
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, int64_t, double);
    static const auto in_triton = pcx::operation<Signature>("pcx::weighted_pagerank_triton");
    return in_triton.call(q, k, init, bias, prefix_k, among, iters, scale);
  }
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor scores = at::empty(init.sizes(), q.options().dtype(at::kFloat));
  const pcx::Pagerank call{
      .q = q.data_ptr(),
      .k = k.data_ptr(),
      .init = init.data_ptr<float>(),
      .among = among ? among->const_data_ptr<int64_t>() : nullptr,
      .scores = scores.data_ptr<float>(),
      .q_strides = {q.stride(0), q.stride(1), q.stride(2)},
      .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
      .init_strides = {init.stride(0), init.stride(1), init.stride(2)},
      .among_stride = among ? among->stride(0) : 0,
      .batch = static_cast<int>(q.size(0)),
      .heads = static_cast<int>(q.size(1)),
      .tokens = static_cast<int>(q.size(2)),
      .nodes = static_cast<int>(nodes),
      .dim = static_cast<int>(q.size(3)),
      .iters = static_cast<int>(iters),
      .scale = static_cast<float>(scale),
  };
  const pcx::Element type = *pcx::element(q);
  const auto launch = once(q, iters) ? pcx::launch_pagerank_once : pcx::launch_pagerank;
  C10_CUDA_CHECK(launch(call, type, c10::cuda::getCurrentCUDAStream()));
  return scores;
}

}  // namespace

void pcx::register_cuda_pagerank() {
  static torch::Library library(torch::Library::IMPL, "pcx", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  library.impl("weighted_pagerank", &weighted_pagerank);
}
