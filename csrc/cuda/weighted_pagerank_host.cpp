// weighted_pagerank on CUDA: which calls the kernel takes. What it leaves is written out in torch.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../operations.h"
#include "device.h"
#include "weighted_pagerank.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool fits(const Tensor& q, const Tensor& k) {
  const auto type = q.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) return false;
  const int major = pcx::attribute(q, cudaDevAttrComputeCapabilityMajor);
  return (major == 8 || major == 9) && k.scalar_type() == type && q.size(2) <= pcx::kMostTokens &&
         q.size(3) <= 128 && q.size(3) % 8 == 0 && pcx::on_lines_of_16_bytes(q) &&
         pcx::on_lines_of_16_bytes(k);
}

Tensor weighted_pagerank(const Tensor& q, const Tensor& k, const Tensor& init,
                         const OptionalTensor& bias, const OptionalTensor& prefix_k, int64_t iters,
                         double scale) {
  if (bias || prefix_k || iters == 0 || q.numel() == 0 || !fits(q, k)) {
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, int64_t, double);
    static const auto written_out = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("pcx::weighted_pagerank_written_out", "")
                                        .typed<Signature>();
    return written_out.call(q, k, init, bias, prefix_k, iters, scale);
  }
  const c10::cuda::CUDAGuard guard(q.device());
  TORCH_CHECK(k.sizes() == q.sizes() && init.sizes() == q.sizes().slice(0, 3) &&
                  init.scalar_type() == at::kFloat && init.is_cuda() && k.is_cuda(),
              "weighted_pagerank: k or init does not fit q");
  const Tensor scores = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const pcx::Pagerank call{
      .q = q.data_ptr(),
      .k = k.data_ptr(),
      .init = init.data_ptr<float>(),
      .scores = scores.data_ptr<float>(),
      .q_strides = {q.stride(0), q.stride(1), q.stride(2)},
      .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
      .init_strides = {init.stride(0), init.stride(1), init.stride(2)},
      .batch = static_cast<int>(q.size(0)),
      .heads = static_cast<int>(q.size(1)),
      .tokens = static_cast<int>(q.size(2)),
      .dim = static_cast<int>(q.size(3)),
      .iters = static_cast<int>(iters),
      .scale = static_cast<float>(scale),
  };
  const auto type = q.scalar_type() == at::kFloat      ? pcx::Element::kFloat
                    : q.scalar_type() == at::kBFloat16 ? pcx::Element::kBFloat16
                                                       : pcx::Element::kHalf;
  C10_CUDA_CHECK(pcx::launch_pagerank(call, type, c10::cuda::getCurrentCUDAStream()));
  return scores;
}

}  // namespace

void pcx::register_cuda_pagerank() {
  static torch::Library library(torch::Library::IMPL, "pcx", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  library.impl("weighted_pagerank", &weighted_pagerank);
}
