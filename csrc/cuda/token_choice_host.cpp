// important_tokens and dissimilar_tokens on CUDA: decides which calls the kernels run. The
// reference in plain torch runs every other call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"
#include "token_choice.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The reason why the kernels cannot run on scores [B, H, N], or an empty text if they can.
std::string cannot(const Tensor& scores) {
  if (scores.scalar_type() != at::kFloat)
    return std::string("it computes float32 scores, got ") + toString(scores.scalar_type());
  if (!scores.is_contiguous()) return "the scores are not contiguous in memory";
  if (scores.numel() == 0) return "there are no scores";
  if (scores.size(1) > pcx::kMostHeads)
    return "it needs at most " + std::to_string(pcx::kMostHeads) + " heads, got " +
           std::to_string(scores.size(1));
  if (scores.size(2) > pcx::kMostTokens)
    return "it needs at most " + std::to_string(pcx::kMostTokens) + " tokens, got " +
           std::to_string(scores.size(2));
  return {};
}

std::string cannot_among(const Tensor& scores, const OptionalTensor& among) {
  if (among && among->stride(1) != 1) return "the tokens of among are not dense in memory";
  return cannot(scores);
}

std::string cannot_by_keys(const Tensor& votes, const Tensor& k) {
  std::string reason = cannot(votes);
  if (!reason.empty()) return reason;
  if (!pcx::element(k))
    return std::string("it computes bfloat16, float16 and float32, k has ") +
           toString(k.scalar_type());
  const int64_t dim = k.size(3);
  if (dim % 8) return "it needs a head dim that is a multiple of 8, got " + std::to_string(dim);
  if (!pcx::on_lines_of_16_bytes(k)) return "the rows of k do not begin on multiples of 16 bytes";
  if (pcx::choice_bytes(static_cast<int>(votes.size(2)), static_cast<int>(dim)) + pcx::kOtherBytes >
      pcx::attribute(k, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return "the shared memory of a block cannot hold " + std::to_string(votes.size(2)) +
           " tokens of " + std::to_string(dim) + " numbers";
  if (pcx::attribute(k, cudaDevAttrComputeCapabilityMajor) < 8)
    return "it needs compute capability 8.0 or more";
  return {};
}

void hold_to(const std::string& reason) {
  TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
}

pcx::Heads heads_of(const Tensor& scores, double low, double high) {
  return {
      .scores = scores.const_data_ptr<float>(),
      .count = static_cast<int>(scores.size(1)),
      .low = static_cast<float>(low),
      .high = static_cast<float>(high),
  };
}

void check_important(const Tensor& scores, int64_t keep, int64_t protected_tokens,
                     const OptionalTensor& among) {
  TORCH_CHECK(
      scores.dim() == 3 && protected_tokens >= 0 && keep >= 0 &&
          protected_tokens + keep <= scores.size(2) &&
          (!among || (among->sizes() == at::IntArrayRef({scores.size(0), scores.size(2)}) &&
                      among->device() == scores.device() && among->scalar_type() == at::kLong)),
      "important_tokens: keep, protected or among does not fit scores");
}

Tensor run_important(const Tensor& scores, int64_t keep, int64_t protected_tokens, double low,
                     double high, const OptionalTensor& among) {
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

Tensor important_tokens(const Tensor& scores, int64_t keep, int64_t protected_tokens, double low,
                        double high, const OptionalTensor& among) {
  check_important(scores, keep, protected_tokens, among);
  if (cannot_among(scores, among).empty())
    return run_important(scores, keep, protected_tokens, low, high, among);
  using Signature = Tensor(const Tensor&, int64_t, int64_t, double, double, const OptionalTensor&);
  static const auto written_out = pcx::operation<Signature>("pcx::important_tokens_written_out");
  return written_out.call(scores, keep, protected_tokens, low, high, among);
}

// The same for backend="cuda", which raises an error instead of falling back.
Tensor important_in_cuda(const Tensor& scores, int64_t keep, int64_t protected_tokens, double low,
                         double high, const OptionalTensor& among) {
  check_important(scores, keep, protected_tokens, among);
  hold_to(cannot_among(scores, among));
  return run_important(scores, keep, protected_tokens, low, high, among);
}

void check_dissimilar(const Tensor& votes, const Tensor& k, int64_t drop,
                      int64_t protected_tokens) {
  TORCH_CHECK(votes.dim() == 3 && k.dim() == 4 && k.sizes().slice(0, 3) == votes.sizes() &&
                  k.device() == votes.device() && protected_tokens >= 0 && drop >= 0 &&
                  2 * drop <= votes.size(2) - protected_tokens,
              "dissimilar_tokens: k, drop or protected does not fit votes");
}

Tensor run_dissimilar(const Tensor& votes, const Tensor& k, int64_t drop, int64_t protected_tokens,
                      double low, double high) {
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
      .dim = static_cast<int>(k.size(3)),
  };
  C10_CUDA_CHECK(pcx::launch_dissimilar(call, *pcx::element(k), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor dissimilar_tokens(const Tensor& votes, const Tensor& k, int64_t drop,
                         int64_t protected_tokens, double low, double high) {
  check_dissimilar(votes, k, drop, protected_tokens);
  if (cannot_by_keys(votes, k).empty())
    return run_dissimilar(votes, k, drop, protected_tokens, low, high);
  using Signature = Tensor(const Tensor&, const Tensor&, int64_t, int64_t, double, double);
  static const auto written_out = pcx::operation<Signature>("pcx::dissimilar_tokens_written_out");
  return written_out.call(votes, k, drop, protected_tokens, low, high);
}

Tensor dissimilar_in_cuda(const Tensor& votes, const Tensor& k, int64_t drop,
                          int64_t protected_tokens, double low, double high) {
  check_dissimilar(votes, k, drop, protected_tokens);
  hold_to(cannot_by_keys(votes, k));
  return run_dissimilar(votes, k, drop, protected_tokens, low, high);
}

const pcx::Implementations implementations(c10::DispatchKey::CUDA, [](torch::Library& library) {
  library.impl("important_tokens", &important_tokens);
  library.impl("dissimilar_tokens", &dissimilar_tokens);
  library.impl("important_tokens_cuda", &important_in_cuda);
  library.impl("dissimilar_tokens_cuda", &dissimilar_in_cuda);
});

}  // namespace
