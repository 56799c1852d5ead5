// Makes the CUDA kernels operations of torch. What fits them is decided, and said, in
// pcx/ops/backends.py; what is checked here would be a mistake there.

#include "prefix_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../operations.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of [B, H, tokens, d], or of a prefix [G, H, m, d] or [H, m, d], which all samples then share.
pcx::Strides strides(const Tensor& x) {
  const auto last = x.dim() - 1;
  return {x.dim() == 4 ? x.stride(0) : 0, x.stride(last - 2), x.stride(last - 1)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& prefix_k, const Tensor& prefix_v,
                                   const OptionalTensor& prefix_index,
                                   const OptionalTensor& prefix_lengths, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const auto batch = q.size(0), heads = q.size(1), queries = q.size(2), dim = q.size(3);
  for (const Tensor& x : {q, k, v, prefix_k, prefix_v}) {
    TORCH_CHECK(x.is_cuda() && x.scalar_type() == q.scalar_type() && x.size(-1) == 64 &&
                x.stride(-1) == 1);
    TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0);
  }
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf);
  const Tensor out = at::empty({batch, queries, heads, dim}, q.options()).transpose(1, 2);
  const Tensor lse =
      at::empty({heads, batch, queries}, q.options().dtype(at::kFloat)).transpose(0, 1);
  if (out.numel() == 0) return {out, lse};
  const auto dense = [](const OptionalTensor& x) {
    return x ? OptionalTensor(x->contiguous()) : std::nullopt;
  };
  const OptionalTensor index = dense(prefix_index), lengths = dense(prefix_lengths);
  const pcx::Forward call{
      .q = q.data_ptr(),
      .k = k.data_ptr(),
      .v = v.data_ptr(),
      .prefix_k = prefix_k.data_ptr(),
      .prefix_v = prefix_v.data_ptr(),
      .out = out.data_ptr(),
      .lse = lse.data_ptr<float>(),
      .index = index ? index->data_ptr<int64_t>() : nullptr,
      .lengths = lengths ? lengths->data_ptr<int64_t>() : nullptr,
      .q_strides = strides(q),
      .k_strides = strides(k),
      .v_strides = strides(v),
      .prefix_k_strides = strides(prefix_k),
      .prefix_v_strides = strides(prefix_v),
      .batch = static_cast<int>(batch),
      .heads = static_cast<int>(heads),
      .queries = static_cast<int>(queries),
      .keys = static_cast<int>(k.size(2)),
      .prefix = static_cast<int>(prefix_k.size(-2)),
      .sets = static_cast<int>(prefix_k.dim() == 4 ? prefix_k.size(0) : 1),
      .scale = static_cast<float>(scale),
      .bfloat16 = q.scalar_type() == at::kBFloat16,
  };
  C10_CUDA_CHECK(pcx::launch_forward(call, c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

}  // namespace

void pcx::register_cuda() {
  static torch::Library library(torch::Library::IMPL, "pcx", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  library.impl("prefix_attention_hopper", &forward);
}
