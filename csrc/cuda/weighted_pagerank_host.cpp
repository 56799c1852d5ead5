// weighted_pagerank on CUDA: decides which calls the kernels run. Triton runs every other call that
// it can, and the reference in plain torch the rest.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <climits>
#include <optional>
#include <string>

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

int64_t nodes_of(const Tensor& q, const OptionalTensor& among) {
  return among ? among->size(1) : q.size(2);
}

// The reason why the kernels cannot run, or an empty text if they can.
std::string cannot(const Tensor& q, const Tensor& k, const Tensor& init, const OptionalTensor& bias,
                   const OptionalTensor& prefix_k, const OptionalTensor& among, int64_t iters,
                   double scale) {
  if (bias) return "it takes no bias";
  if (prefix_k) return "it takes no prefix_k";
  if (iters == 0) return "it needs iters of at least 1, got 0";
  if (init.numel() == 0) return "there are no scores to compute";
  const auto type = pcx::element(q);
  const int64_t nodes = nodes_of(q, among), dim = q.size(3);
  if (!type || pcx::element(k) != type)
    return std::string("it computes bfloat16, float16 and float32, one for both; q has ") +
           toString(q.scalar_type()) + " and k has " + toString(k.scalar_type());
  if (nodes > pcx::kMostNodes)
    return "it needs at most " + std::to_string(pcx::kMostNodes) + " tokens, got " +
           std::to_string(nodes);
  if (dim > 128 || dim % 8)
    return "it needs a head dim that is a multiple of 8, at most 128, got " + std::to_string(dim);
  if (!(scale > 0)) return "it needs scale > 0, got " + std::to_string(scale);
  if (q.stride(2) > kMostStride || k.stride(2) > kMostStride)
    return "the tokens of q or k lie more than 2**29 elements apart";
  if (!pcx::on_lines_of_16_bytes(q) || !pcx::on_lines_of_16_bytes(k))
    return "the rows of q or k do not begin on multiples of 16 bytes";
  if (among && among->stride(1) != 1) return "the tokens of among are not dense in memory";
  const int major = pcx::attribute(q, cudaDevAttrComputeCapabilityMajor);
  if (major != 8 && major != 9)
    return "it is written for compute capabilities 8.x and 9.x, the device has " +
           std::to_string(major) + ".x";
  if (nodes > pcx::kMostInOneBlock && major != 9 && !once(q, iters))
    return "it needs at most " + std::to_string(pcx::kMostInOneBlock) +
           " tokens on compute capability 8.x, got " + std::to_string(nodes);
  if (pcx::shared_bytes(static_cast<int>(nodes), static_cast<int>(dim), *type) >
      pcx::attribute(q, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return "the shared memory of a block cannot hold " + std::to_string(nodes) + " tokens";
  return {};
}

void check(const Tensor& q, const Tensor& k, const Tensor& init, const OptionalTensor& among,
           int64_t iters) {
  const int64_t nodes = nodes_of(q, among);
  TORCH_CHECK(k.sizes() == q.sizes() && k.device() == q.device() &&
                  init.sizes() == at::IntArrayRef({q.size(0), q.size(1), nodes}) &&
                  init.device() == q.device() && iters >= 0 && iters <= INT_MAX &&
                  (!among || (among->device() == q.device() && among->size(0) == q.size(0) &&
                              among->scalar_type() == at::kLong)),
              "weighted_pagerank: k, init, among or iters does not fit q");
}

Tensor run(const Tensor& q, const Tensor& k, const Tensor& init, const OptionalTensor& among,
           int64_t iters, double scale) {
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
      .nodes = static_cast<int>(nodes_of(q, among)),
      .dim = static_cast<int>(q.size(3)),
      .iters = static_cast<int>(iters),
      .scale = static_cast<float>(scale),
  };
  const pcx::Element type = *pcx::element(q);
  const auto launch = once(q, iters) ? pcx::launch_pagerank_once : pcx::launch_pagerank;
  C10_CUDA_CHECK(launch(call, type, c10::cuda::getCurrentCUDAStream()));
  return scores;
}

Tensor weighted_pagerank(const Tensor& q, const Tensor& k, const Tensor& init,
                         const OptionalTensor& bias, const OptionalTensor& prefix_k,
                         const OptionalTensor& among, int64_t iters, double scale) {
  check(q, k, init, among, iters);
  if (cannot(q, k, init, bias, prefix_k, among, iters, scale).empty())
    return run(q, k, init, among, iters, scale);
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, int64_t, double);
  static const auto in_triton = pcx::operation<Signature>("pcx::weighted_pagerank_triton");
  return in_triton.call(q, k, init, bias, prefix_k, among, iters, scale);
}

// The same for backend="cuda", which raises an error instead of falling back.
Tensor in_cuda(const Tensor& q, const Tensor& k, const Tensor& init, const OptionalTensor& bias,
               const OptionalTensor& prefix_k, const OptionalTensor& among, int64_t iters,
               double scale) {
  check(q, k, init, among, iters);
  const std::string reason = cannot(q, k, init, bias, prefix_k, among, iters, scale);
  TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
  return run(q, k, init, among, iters, scale);
}

const pcx::Implementations implementations(c10::DispatchKey::CUDA, [](torch::Library& library) {
  library.impl("weighted_pagerank", &weighted_pagerank);
  library.impl("weighted_pagerank_cuda", &in_cuda);
});

}  // namespace
