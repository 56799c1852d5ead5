// prefix_attention on CUDA: decides which calls the kernels for Hopper run, and makes ops of these
// kernels. Triton, in Python, runs every other call.

#include "prefix_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../dispatch.h"
#include "../operations.h"
#include "device.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Strides of [B, H, tokens, d], or of a prefix [G, H, m, d] or [H, m, d], shared by all samples.
pcx::Strides strides(const Tensor& x) {
  const auto last = x.dim() - 1;
  return {x.dim() == 4 ? x.stride(0) : 0, x.stride(last - 2), x.stride(last - 1)};
}

void check(const Tensor& x, const Tensor& q) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.is_cuda() && x.device() == q.device() && type == q.scalar_type() &&
                  (type == at::kBFloat16 || type == at::kHalf),
              "prefix_attention: tensors of one 16-bit dtype on one CUDA device expected");
  TORCH_CHECK(
      x.size(-1) == 64 && x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
      "prefix_attention: dense, aligned rows of 64 expected");
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    TORCH_CHECK(x.size(i) <= 1 || x.stride(i) % 8 == 0,
                "prefix_attention: rows on multiples of 16 bytes expected");
}

// An empty [B, H, tokens, d] with memory [B, tokens, H, d].
Tensor token_major(const Tensor& like, int64_t tokens) {
  return at::empty({like.size(0), tokens, like.size(1), like.size(3)}, like.options())
      .transpose(1, 2);
}

// An empty [B, H, N] with memory [H, B, N].
Tensor by_row(const Tensor& q) {
  return at::empty({q.size(1), q.size(0), q.size(2)}, q.options().dtype(at::kFloat))
      .transpose(0, 1);
}

bool is_by_row(const Tensor& x, const Tensor& q) {
  return x.scalar_type() == at::kFloat && x.sizes() == q.sizes().slice(0, 3) &&
         x.transpose(0, 1).is_contiguous();
}

// The optional tensors of a call, made contiguous; they must outlive the kernel's launch.
struct Sets {
  OptionalTensor index, lengths;

  Sets(const OptionalTensor& prefix_index, const OptionalTensor& prefix_lengths)
      : index(dense(prefix_index)), lengths(dense(prefix_lengths)) {}

  static OptionalTensor dense(const OptionalTensor& x) {
    return x ? OptionalTensor(x->to(at::kLong).contiguous()) : std::nullopt;
  }
};

pcx::Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                         const Tensor& prefix_v, const Sets& sets, double scale) {
  for (const Tensor& x : {q, k, v, prefix_k, prefix_v}) check(x, q);
  TORCH_CHECK(k.size(2) > 0, "k: no keys");
  return {
      .q = q.data_ptr(),
      .k = k.data_ptr(),
      .v = v.data_ptr(),
      .prefix_k = prefix_k.data_ptr(),
      .prefix_v = prefix_v.data_ptr(),
      .index = sets.index ? sets.index->data_ptr<int64_t>() : nullptr,
      .lengths = sets.lengths ? sets.lengths->data_ptr<int64_t>() : nullptr,
      .q_strides = strides(q),
      .k_strides = strides(k),
      .v_strides = strides(v),
      .prefix_k_strides = strides(prefix_k),
      .prefix_v_strides = strides(prefix_v),
      .batch = static_cast<int>(q.size(0)),
      .heads = static_cast<int>(q.size(1)),
      .queries = static_cast<int>(q.size(2)),
      .keys = static_cast<int>(k.size(2)),
      .prefix = static_cast<int>(prefix_k.size(-2)),
      .sets = static_cast<int>(prefix_k.dim() == 4 ? prefix_k.size(0) : 1),
      .scale = static_cast<float>(scale),
      .bfloat16 = q.scalar_type() == at::kBFloat16,
  };
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& prefix_k, const Tensor& prefix_v,
                                   const OptionalTensor& prefix_index,
                                   const OptionalTensor& prefix_lengths, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor out = token_major(q, q.size(2)), lse = by_row(q);
  if (out.numel() == 0) return {out, lse};
  const Sets sets(prefix_index, prefix_lengths);
  const pcx::Forward call{
      .inputs = attention(q, k, v, prefix_k, prefix_v, sets, scale),
      .out = out.data_ptr(),
      .lse = lse.data_ptr<float>(),
  };
  C10_CUDA_CHECK(pcx::launch_forward(call, c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

// The gradient of the queries, and delta.
std::tuple<Tensor, Tensor> query_gradient(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& prefix_k, const Tensor& prefix_v,
                                          const OptionalTensor& prefix_index,
                                          const OptionalTensor& prefix_lengths, const Tensor& out,
                                          const Tensor& lse, const Tensor& grad_out,
                                          const OptionalTensor& grad_lse, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor dq = token_major(q, q.size(2)), delta = by_row(q);
  if (dq.numel() == 0) return {dq, delta};
  for (const Tensor& x : {out, grad_out}) {
    check(x, q);
    TORCH_CHECK(x.sizes() == q.sizes(), "prefix_attention: shapes differ");
  }
  TORCH_CHECK(is_by_row(lse, q), "prefix_attention: lse laid out otherwise");
  TORCH_CHECK(!grad_lse || (grad_lse->scalar_type() == at::kFloat && grad_lse->is_cuda() &&
                            grad_lse->sizes() == lse.sizes()),
              "prefix_attention: grad_lse does not fit lse");
  const Sets sets(prefix_index, prefix_lengths);
  const pcx::QueryGradient call{
      .inputs = attention(q, k, v, prefix_k, prefix_v, sets, scale),
      .out = out.data_ptr(),
      .grad_out = grad_out.data_ptr(),
      .lse = lse.data_ptr<float>(),
      .grad_lse = grad_lse ? grad_lse->data_ptr<float>() : nullptr,
      .out_strides = strides(out),
      .grad_strides = strides(grad_out),
      .grad_lse_strides =
          grad_lse ? pcx::Strides{grad_lse->stride(0), grad_lse->stride(1), grad_lse->stride(2)}
                   : pcx::Strides{},
      .dq = dq.data_ptr(),
      .delta = delta.data_ptr<float>(),
  };
  C10_CUDA_CHECK(pcx::launch_query_gradient(call, c10::cuda::getCurrentCUDAStream()));
  return {dq, delta};
}

// The gradients of keys and values. They are [B, H, S, d], each sample's own keys or its own prefix
// set, or [H, m, d], a prefix that all samples share.
std::tuple<Tensor, Tensor> key_gradients(const Tensor& q, const Tensor& grad_out,
                                         const Tensor& keys, const Tensor& values,
                                         const Tensor& lse, const Tensor& delta, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  for (const Tensor& x : {q, grad_out, keys, values}) check(x, q);
  const auto batch = q.size(0), heads = q.size(1), queries = q.size(2), count = keys.size(-2);
  const bool own = keys.dim() == 4;
  TORCH_CHECK(batch > 0 && queries > 0 && count > 0, "prefix_attention: nothing to do");
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(-3) == heads &&
                  (!own || keys.size(0) == batch) && grad_out.sizes() == q.sizes(),
              "prefix_attention: shapes differ");
  TORCH_CHECK(batch * queries < (int64_t{1} << 31), "prefix_attention: too many queries");
  TORCH_CHECK(is_by_row(lse, q) && is_by_row(delta, q),
              "prefix_attention: lse or delta laid out otherwise");
  const int64_t rows = batch * queries;
  int cut = 1;
  if (!own)
    C10_CUDA_CHECK(pcx::cut_prefix(static_cast<int>(heads), static_cast<int>(count),
                                   static_cast<int>(rows), &cut));
  // An item has whole stages of 64 rows, and no item is empty.
  const int64_t per_item = own ? queries : ((rows + cut - 1) / cut + 63) / 64 * 64;
  const int64_t items = own ? batch : (rows + per_item - 1) / per_item;
  Tensor dk, dv, both;
  if (own) {
    dk = token_major(q, count);
    dv = token_major(q, count);
  } else {
    both = at::empty({items, 2, heads, count, 64}, q.options().dtype(at::kFloat));
    dk = both.select(1, 0), dv = both.select(1, 1);
  }
  const pcx::KeyGradients call{
      .q = q.data_ptr(),
      .grad_out = grad_out.data_ptr(),
      .keys = keys.data_ptr(),
      .values = values.data_ptr(),
      .lse = lse.data_ptr<float>(),
      .delta = delta.data_ptr<float>(),
      .dk = dk.data_ptr(),
      .dv = dv.data_ptr(),
      .q_strides = strides(q),
      .grad_strides = strides(grad_out),
      .key_strides = strides(keys),
      .value_strides = strides(values),
      .out_strides = strides(dk),
      .items = static_cast<int>(items),
      .heads = static_cast<int>(heads),
      .queries = static_cast<int>(queries),
      .count = static_cast<int>(count),
      .rows = static_cast<int>(rows),
      .rows_per_item = static_cast<int>(per_item),
      .scale = static_cast<float>(scale),
      .bfloat16 = q.scalar_type() == at::kBFloat16,
      .partial = !own,
  };
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(pcx::launch_key_gradients(call, stream));
  if (own) return {dk, dv};
  const Tensor sum_k = at::empty({heads, count, 64}, q.options()), sum_v = at::empty_like(sum_k);
  C10_CUDA_CHECK(pcx::launch_sums(both.data_ptr<float>(), call.items, sum_k.numel(),
                                  sum_k.data_ptr(), sum_v.data_ptr(), call.bfloat16, stream));
  return {sum_k, sum_v};
}

// The most queries of a head that one block holds. Triton's gradient of more is faster (measured).
constexpr int64_t kQueries = 200;

// The reason why the kernels cannot run, or an empty text if they can.
std::string cannot(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                   const Tensor& prefix_v, const OptionalTensor& bias) {
  if (pcx::attribute(q, cudaDevAttrComputeCapabilityMajor) != 9 ||
      pcx::attribute(q, cudaDevAttrComputeCapabilityMinor) != 0)
    return "it is written for compute capability 9.0 (Hopper)";
  if (q.scalar_type() != at::kBFloat16 && q.scalar_type() != at::kHalf)
    return std::string("it computes bfloat16 and float16, q has ") + toString(q.scalar_type());
  if (q.size(3) != 64 || v.size(3) != 64)
    return "it needs d = dv = 64, got " + std::to_string(q.size(3)) + " and " +
           std::to_string(v.size(3));
  if (bias) return "it takes no bias";
  const std::array<std::pair<const char*, const Tensor*>, 5> named{
      {{"q", &q}, {"k", &k}, {"v", &v}, {"prefix_k", &prefix_k}, {"prefix_v", &prefix_v}}};
  for (const auto& [name, x] : named) {
    if (!pcx::on_lines_of_16_bytes(*x))
      return std::string("the rows of ") + name + " do not begin on multiples of 16 bytes";
    if (x->stride(-2) >= int64_t{1} << 30)
      return std::string("the tokens of ") + name + " lie 2**30 elements apart";
  }
  return {};
}

// Whether the kernels run this call. With `held_to`, backend="cuda" raises an error if they cannot.
// A backward pass is not held to it, since hooks may have changed the layout of saved tensors.
// "auto" needs a head for every processor; with fewer, Triton's smaller parts are faster.
bool taken(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
           const Tensor& prefix_v, const OptionalTensor& bias, c10::string_view backend,
           bool held_to) {
  if (backend == "triton") return false;
  const std::string reason = cannot(q, k, v, prefix_k, prefix_v, bias);
  if (held_to && backend == "cuda")
    TORCH_CHECK_VALUE(reason.empty(), "backend: 'cuda' cannot run: ", reason);
  if (!reason.empty()) return false;
  return backend == "cuda" ||
         q.size(0) * q.size(1) >= pcx::attribute(q, cudaDevAttrMultiProcessorCount);
}

std::tuple<Tensor, Tensor> attention_on_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& prefix_k, const Tensor& prefix_v,
                                             const OptionalTensor& index,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& bias, double scale,
                                             c10::string_view backend) {
  if (taken(q, k, v, prefix_k, prefix_v, bias, backend, true))
    return forward(q, k, v, prefix_k, prefix_v, index, lengths, scale);
  using Triton = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, const OptionalTensor&, double);
  static const auto triton = pcx::operation<Triton>("pcx::prefix_attention_triton");
  return triton.call(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_on_cuda(const Tensor& any_grad_out, const OptionalTensor& grad_lse,
                           const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& prefix_k, const Tensor& prefix_v,
                           const OptionalTensor& index, const OptionalTensor& lengths,
                           const OptionalTensor& bias, const Tensor& any_out, const Tensor& any_lse,
                           double scale, const c10::List<bool>& needs, c10::string_view backend) {
  const bool need_q = needs[0], need_own = needs[1], need_prefix = needs[2];
  const bool fits = q.numel() > 0 && taken(q, k, v, prefix_k, prefix_v, bias, backend, false);
  const bool queries = fits && need_q && (q.size(2) <= kQueries || backend == "cuda");
  const bool prefix = fits && need_prefix && !index && !lengths && prefix_k.size(-2) > 0;
  const auto aligned = [&](const Tensor& x) {
    return !fits || pcx::on_lines_of_16_bytes(x) ? x : x.clone(at::MemoryFormat::Contiguous);
  };
  const Tensor grad_out = aligned(any_grad_out), out = aligned(any_out);
  const Tensor lse = is_by_row(any_lse, q) ? any_lse  // hooks may change its layout
                                           : any_lse.transpose(0, 1).contiguous().transpose(0, 1);
  if (!queries || (need_prefix && !prefix)) {
    using Triton = Gradients(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const Tensor&,
                             const Tensor&, double, const c10::List<bool>&, const c10::List<bool>&);
    static const auto triton = pcx::operation<Triton>("pcx::prefix_attention_backward_triton");
    return triton.call(grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias, out,
                       lse, scale, needs, c10::List<bool>({queries, fits && need_own, prefix}));
  }
  const auto none = [&] { return at::empty({0}, q.options()); };
  const auto [dq, delta] = query_gradient(q, k, v, prefix_k, prefix_v, index, lengths, out, lse,
                                          grad_out, grad_lse, scale);
  Tensor dk = none(), dv = none(), dprefix_k = none(), dprefix_v = none();
  if (need_own) std::tie(dk, dv) = key_gradients(q, grad_out, k, v, lse, delta, scale);
  if (need_prefix)
    std::tie(dprefix_k, dprefix_v) =
        key_gradients(q, grad_out, prefix_k, prefix_v, lse, delta, scale);
  return {dq, dk, dv, dprefix_k, dprefix_v, none()};
}

const pcx::Implementations implementations(c10::DispatchKey::CUDA, [](torch::Library& library) {
  library.impl("prefix_attention", &attention_on_cuda);
  library.impl("prefix_attention_backward", &backward_on_cuda);
  library.impl("prefix_attention_query_gradient_hopper", &query_gradient);
  library.impl("prefix_attention_key_gradients_hopper", &key_gradients);
});

}  // namespace
