// important_tokens and dissimilar_tokens on CUDA: which calls the kernels take. What they leave is
// written out in torch.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"
#include "token_choice.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool fit(const Tensor& scores) {
  return scores.scalar_type() == at::kFloat && scores.is_contiguous() && scores.numel() &&
         scores.size(1) <= pcx::kMostHeads && scores.size(2) <= pcx::kMostTokens;
}

pcx::Heads heads_of(const Tensor& scores, double low, double high) {
  return {
      .scores = scores.const_data_ptr<float>(),
      .count = static_cast<int>(scores.size(1)),
      .low = static_cast<float>(low),
      .high = static_cast<float>(high),
  };
}

Tensor important_tokens(const Tensor& scores, int64_t keep, int64_t protected_tokens, double low,
                        double high, const OptionalTensor& among) {
  TORCH_CHECK(
      scores.dim() == 3 && protected_tokens >= 0 && keep >= 0 &&
          protected_tokens + keep <= scores.size(2) &&
          (!among || (among->sizes() == at::IntArrayRef({scores.size(0), scores.size(2)}) &&
                      among->device() == scores.device() && among->scalar_type() == at::kLong)),
      "important_tokens: keep, protected or among does not fit scores");
  if (!fit(scores) || (among && among->stride(1) != 1)) {
    using Signature =
        Tensor(const Tensor&, int64_t, int64_t, double, double, const OptionalTensor&);
    static const auto written_out = pcx::operation<Signature>("pcx::important_tokens_written_out");
    return written_out.call(scores, keep, protected_tokens, low, high, among);
  }
  const c10::cuda::CUDAGuard guard(scores.device());
  const Tensor out =
      at::empty({scores.size(0), protected_tokens + keep}, scores.options().dtype(at::kLong));
  const pcx::Important call{
      .heads = heads_of(scores, low, high),
      .among = among ? among->const_data_ptr<int64_t>() : nullptr,
      .out = out.mutable_data_ptr<int64_t>(),
      .among_stride = among ? among->stride(0) : 0,
      .batch = static_cast<int>(scores.size(0)),
      .tokens = static_cast<int>(scores.size(2)),
      .first_patch = static_cast<int>(protected_tokens),
      .keep = static_cast<int>(keep),
  };
  C10_CUDA_CHECK(pcx::launch_important(call, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor dissimilar_tokens(const Tensor& votes, const Tensor& k, int64_t drop,
                         int64_t protected_tokens, double low, double high) {
  TORCH_CHECK(votes.dim() == 3 && k.dim() == 4 && k.sizes().slice(0, 3) == votes.sizes() &&
                  k.device() == votes.device() && protected_tokens >= 0 && drop >= 0 &&
                  2 * drop <= votes.size(2) - protected_tokens,
              "dissimilar_tokens: k, drop or protected does not fit votes");
  const auto type = pcx::element(k);
  const int64_t dim = k.size(3);
  if (!fit(votes) || !type || dim % 8 || !pcx::on_lines_of_16_bytes(k) ||
      pcx::choice_bytes(static_cast<int>(votes.size(2)), static_cast<int>(dim)) + pcx::kOtherBytes >
          pcx::attribute(k, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
      pcx::attribute(k, cudaDevAttrComputeCapabilityMajor) < 8) {
    using Signature = Tensor(const Tensor&, const Tensor&, int64_t, int64_t, double, double);
    static const auto written_out = pcx::operation<Signature>("pcx::dissimilar_tokens_written_out");
    return written_out.call(votes, k, drop, protected_tokens, low, high);
  }
  const c10::cuda::CUDAGuard guard(k.device());
  const Tensor out =
      at::empty({votes.size(0), votes.size(2) - drop}, votes.options().dtype(at::kLong));
  const pcx::Dissimilar call{
      .heads = heads_of(votes, low, high),
      .k = k.const_data_ptr(),
      .out = out.mutable_data_ptr<int64_t>(),
      .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
      .batch = static_cast<int>(votes.size(0)),
      .tokens = static_cast<int>(votes.size(2)),
      .first_patch = static_cast<int>(protected_tokens),
      .drop = static_cast<int>(drop),
      .dim = static_cast<int>(dim),
  };
  C10_CUDA_CHECK(pcx::launch_dissimilar(call, *type, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace

void pcx::register_cuda_token_choice() {
  static torch::Library library(torch::Library::IMPL, "pcx", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  library.impl("important_tokens", &important_tokens);
  library.impl("dissimilar_tokens", &dissimilar_tokens);
}
