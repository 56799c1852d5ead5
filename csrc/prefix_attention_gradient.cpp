// The gradient of prefix_attention. pcx/ops/prefix_attention.py has the same in Python, for
// installations without the extension. A call in Python takes some hundred microseconds, longer
// than the GPU needs. tests/ops/test_prefix_attention_gradient.py compares the two.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "dispatch.h"
#include "operations.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using Attention = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                             const Tensor&, const Tensor&, const OptionalTensor&,
                                             const OptionalTensor&, const OptionalTensor&, double,
                                             c10::string_view);

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = Gradients(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                           const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, const Tensor&,
                           const Tensor&, double, const c10::List<bool>&, c10::string_view);

OptionalTensor given(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

Tensor or_none(const OptionalTensor& x) { return x.value_or(Tensor()); }

bool differentiated(std::initializer_list<OptionalTensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto& x : tensors)
    if (x && x->requires_grad()) return true;
  return false;
}

// The gradient of a bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1], from the expanded gradient
// [B0 * B1, H, N, S].
Tensor bias_gradient(const Tensor& expanded, const Tensor& bias, const c10::SymInt& batch) {
  const auto inner = bias.sym_size(1) > 1   ? bias.sym_size(1)
                     : bias.sym_size(0) > 0 ? batch / bias.sym_size(0)
                                            : c10::SymInt(0);
  const auto outer = inner > 0 ? batch / inner : bias.sym_size(0);
  const auto by_batches = expanded.unflatten_symint(0, {outer, inner});
  return by_batches.sum_to_size_symint(bias.sym_sizes()).to(bias.scalar_type());
}

struct Attend : torch::autograd::Function<Attend> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                               const OptionalTensor& index, const OptionalTensor& lengths,
                               const OptionalTensor& bias, double scale, c10::string_view backend) {
    static const auto attend = pcx::operation<Attention>("pcx::prefix_attention");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, lse] =
        attend.call(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale, backend);
    ctx->save_for_backward(
        {q, k, v, prefix_k, prefix_v, or_none(index), or_none(lengths), or_none(bias), out, lse});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["backend"] = std::string(backend);
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = pcx::operation<Backward>("pcx::prefix_attention_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &index = saved[5], &lengths = saved[6], &bias = saved[7],
                 &out = saved[8];
    // Inputs that are undefined have no edge.
    const size_t bias_edge = 5 + index.defined() + lengths.defined();
    const auto needs = [&](size_t edge) { return ctx->needs_input_grad(edge); };
    const bool need_bias = bias.defined() && needs(bias_edge);
    const auto [dq, dk, dv, dprefix_k, dprefix_v, dbias] =
        run.call(grads[0].defined() ? grads[0] : at::zeros_like(out), given(grads[1]), q, saved[1],
                 saved[2], saved[3], saved[4], given(index), given(lengths), given(bias), out,
                 saved[9], ctx->saved_data["scale"].toDouble(),
                 c10::List<bool>({needs(0), needs(1) || needs(2), needs(3) || needs(4), need_bias}),
                 ctx->saved_data["backend"].toStringRef());
    const auto wanted = [](bool need, const Tensor& x) { return need ? x : Tensor(); };
    return {wanted(needs(0), dq),
            wanted(needs(1), dk),
            wanted(needs(2), dv),
            wanted(needs(3), dprefix_k),
            wanted(needs(4), dprefix_v),
            Tensor(),
            Tensor(),
            need_bias ? bias_gradient(dbias, bias, q.sym_size(0)) : Tensor(),
            Tensor(),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& prefix_k, const Tensor& prefix_v,
                                     const OptionalTensor& index, const OptionalTensor& lengths,
                                     const OptionalTensor& bias, double scale,
                                     c10::string_view backend) {
  if (!differentiated({q, k, v, prefix_k, prefix_v, bias})) {
    static const auto attend = pcx::operation<Attention>("pcx::prefix_attention");
    const at::AutoDispatchBelowADInplaceOrView below;
    return attend.call(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale, backend);
  }
  const auto found =
      Attend::apply(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale, backend);
  return {found[0], found[1]};
}

using Second = std::vector<Tensor>(at::TensorList, const Tensor&, const OptionalTensor&,
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, double);

// The backward pass as a function of what it reads, whose own gradient torch's functions compute.
// `from` has grad_out, grad_lse, q, k, v, prefix_k, prefix_v and bias, or empty tensors.
struct Differentiated : torch::autograd::Function<Differentiated> {
  static variable_list forward(AutogradContext* ctx, at::TensorList from, at::TensorList found,
                               const OptionalTensor& index, const OptionalTensor& lengths,
                               double scale, bool with_lse, bool with_bias) {
    variable_list kept = from.vec();
    kept.push_back(or_none(index));
    kept.push_back(or_none(lengths));
    ctx->save_for_backward(kept);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["with_lse"] = with_lse;
    ctx->saved_data["with_bias"] = with_bias;
    ctx->saved_data["inputs"] =
        static_cast<int64_t>(from.size() + found.size()) + 5;  // those behind
    return found.vec();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = pcx::operation<Second>("pcx::prefix_attention_second");
    const auto saved = ctx->get_saved_variables();
    const auto if_any = [](bool any, const Tensor& x) {
      return any ? OptionalTensor(x) : std::nullopt;
    };
    auto found = run.call(grads, saved[0], if_any(ctx->saved_data["with_lse"].toBool(), saved[1]),
                          saved[2], saved[3], saved[4], saved[5], saved[6], given(saved[8]),
                          given(saved[9]), if_any(ctx->saved_data["with_bias"].toBool(), saved[7]),
                          ctx->saved_data["scale"].toDouble());
    for (auto& x : found)
      if (x.numel() == 0) x = Tensor();
    variable_list all(ctx->saved_data["inputs"].toInt());
    std::copy(found.begin(), found.end(), all.begin());
    return all;
  }
};

Gradients attention_backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& prefix_k, const Tensor& prefix_v,
                             const OptionalTensor& index, const OptionalTensor& lengths,
                             const OptionalTensor& bias, const Tensor& out, const Tensor& lse,
                             double scale, const c10::List<bool>& needs, c10::string_view backend) {
  static const auto run = pcx::operation<Backward>("pcx::prefix_attention_backward");
  const auto compute = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return run.call(grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias, out, lse,
                    scale, needs, backend);
  };
  const auto found = compute();
  if (!differentiated({grad_out, grad_lse, q, k, v, prefix_k, prefix_v, bias})) return found;
  const auto [dq, dk, dv, dprefix_k, dprefix_v, dbias] = found;
  const Tensor nothing = at::empty({0}, q.options());
  const variable_list from{grad_out, grad_lse.value_or(nothing), q, k, v, prefix_k,
                           prefix_v, bias.value_or(nothing)};
  const variable_list to{dq, dk, dv, dprefix_k, dprefix_v, dbias};
  const auto again = Differentiated::apply(at::TensorList(from), at::TensorList(to), index, lengths,
                                           scale, grad_lse.has_value(), bias.has_value());
  return {again[0], again[1], again[2], again[3], again[4], again[5]};
}

const pcx::Implementations implementations(c10::DispatchKey::Autograd, [](torch::Library& library) {
  library.impl("prefix_attention", &attention);
  library.impl("prefix_attention_backward", &attention_backward);
});

}  // namespace
