// prefix_attention on the CPU: forward and backward over [a prefix shared by samples; own keys],
// which are never concatenated. One task computes one head of one sample (forward), or of a group
// of samples that share a prefix (backward). Its matrix products are torch's, on one thread.
// bfloat16 is computed in float32, double in double. Every run gives the same bits, whatever the
// number of threads.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../operations.h"
#include "plain.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kGroups =
    8;  // parts of a batch that shares one prefix; fixed, so that sums are too

at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensors that one call reads, and slices of them in the type of the computation.
struct Inputs {
  Tensor q, k, v, prefix_k, prefix_v;  // prefixes with a set dimension, [G | 1, H, m, d]
  std::vector<int64_t> set, length;    // set of each sample, length of each set
  OptionalTensor bias;                 // [B0 | 1, B1 | 1, H | 1, N | 1, S | 1]
  double scale;
  at::ScalarType type;

  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
         const Tensor& prefix_v, const OptionalTensor& index, const OptionalTensor& lengths,
         const OptionalTensor& bias, double scale)
      : q(q),
        k(k),
        v(v),
        prefix_k(prefix_k.dim() == 4 ? prefix_k : prefix_k.unsqueeze(0)),
        prefix_v(prefix_v.dim() == 4 ? prefix_v : prefix_v.unsqueeze(0)),
        bias(bias),
        scale(scale),
        type(compute_type(q)) {
    const int64_t sets = this->prefix_k.size(0);
    for (int64_t b = 0; b < q.size(0); ++b) set.push_back(sets == 1 ? 0 : b);
    if (index) copy(*index, set);
    length.assign(sets, prefix_k.size(-2));
    if (lengths) copy(*lengths, length);
    for (const int64_t g : set) {
      TORCH_CHECK_INDEX(0 <= g && g < sets, "prefix_index: ", g, ", expected 0..", sets - 1);
    }
    for (const int64_t m : length) {
      TORCH_CHECK_INDEX(0 <= m && m <= prefix_k.size(-2), "prefix_lengths: ", m, ", expected 0..",
                        prefix_k.size(-2));
    }
  }

  static void copy(const Tensor& from, std::vector<int64_t>& to) {
    const Tensor numbers = from.to(at::kLong).contiguous();
    to.assign(numbers.const_data_ptr<int64_t>(), numbers.const_data_ptr<int64_t>() + to.size());
  }

  Tensor head(const Tensor& x, int64_t b, int64_t h) const {
    return x.select(0, b).select(0, h).to(type);
  }
  Tensor prefix(const Tensor& x, int64_t b, int64_t h) const {
    const int64_t g = set[b];
    return x.select(0, g).select(0, h).narrow(0, 0, length[g]).to(type);
  }

  // scale * q [prefix; own]^T + [0; bias], [N, m + S]
  Tensor scores(int64_t b, int64_t h, const Tensor& queries, const Tensor& prefix_keys,
                const Tensor& keys) const {
    const int64_t m = prefix_keys.size(0), own = keys.size(0);
    Tensor scores = at::empty({queries.size(0), m + own}, queries.options());
    Tensor front = scores.narrow(1, 0, m), back = scores.narrow(1, m, own);
    at::mm_out(front, queries, prefix_keys.t());
    at::mm_out(back, queries, keys.t());
    scores.mul_(scale);
    if (bias) {
      const int64_t inner = bias->size(1) > 1 ? bias->size(1) : q.size(0) / bias->size(0);
      const Tensor part =
          at_or_first(at_or_first(at_or_first(*bias, b / inner), b % inner), h);  // [N | 1, S | 1]
      if (part.scalar_type() == at::kBool) {
        back.masked_fill_(at::logical_not(part), -kInfinity);
      } else {
        back.add_(part);
      }
    }
    return scores;
  }

  static Tensor at_or_first(const Tensor& x, int64_t i) {
    return x.select(0, x.size(0) > 1 ? i : 0);
  }
};

// An empty [B, H, N, d] with memory [B, N, H, d], the layout that all backends return.
Tensor token_major(const Tensor& like, int64_t tokens, int64_t dim) {
  return at::empty({like.size(0), tokens, like.size(1), dim}, like.options()).transpose(1, 2);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& prefix_k, const Tensor& prefix_v,
                                   const OptionalTensor& index, const OptionalTensor& lengths,
                                   const OptionalTensor& bias, double scale,
                                   c10::string_view /*backend*/) {
  const Inputs in(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale);
  const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2);
  Tensor out = token_major(q, n, v.size(3));
  Tensor lse = at::empty({heads, batch, n}, q.options().dtype(in.type)).transpose(0, 1);
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const pcx::Plain plain;  // every thread has a dispatch state of its own
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      const Tensor queries = in.head(q, b, h), keys = in.head(k, b, h), values = in.head(v, b, h);
      const Tensor prefix_values = in.prefix(in.prefix_v, b, h);
      const int64_t m = prefix_values.size(0);
      Tensor weights = in.scores(b, h, queries, in.prefix(in.prefix_k, b, h), keys);
      Tensor top = weights.amax(1, true);
      top.masked_fill_(top == -kInfinity, 0);  // rows that attend to nothing
      weights.sub_(top).exp_();
      Tensor total = weights.sum(1, true);  // [N, 1]
      lse.select(0, b).select(0, h).copy_((total.log() + top).squeeze(1));
      Tensor result = at::mm(weights.narrow(1, m, keys.size(0)), values);
      if (m > 0) result.addmm_(weights.narrow(1, 0, m), prefix_values);
      out.select(0, b).select(0, h).copy_(result.div_(total.masked_fill_(total == 0, 1)));
    }
  });
  return {out, lse};
}

// Samples whose gradients of a prefix are summed one after the other.
std::vector<std::vector<int64_t>> groups_of(const Inputs& in, bool one_set) {
  const int64_t batch = in.q.size(0);
  const int64_t count = one_set ? std::min(batch, kGroups) : in.prefix_k.size(0);
  std::vector<std::vector<int64_t>> groups(count);
  for (int64_t b = 0; b < batch; ++b) groups[one_set ? b * count / batch : in.set[b]].push_back(b);
  return groups;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v, const OptionalTensor& index,
    const OptionalTensor& lengths, const OptionalTensor& bias, const Tensor& out, const Tensor& lse,
    double scale, const c10::List<bool>& needs, c10::string_view /*backend*/) {
  const Inputs in(q, k, v, prefix_k, prefix_v, index, lengths, bias, scale);
  const bool need_q = needs[0], need_own = needs[1], need_prefix = needs[2], need_bias = needs[3];
  const int64_t heads = q.size(1), n = q.size(2), own = k.size(2);
  const auto none = [&] { return at::empty({0}, q.options()); };
  Tensor dq = need_q ? token_major(q, n, q.size(3)) : none();
  Tensor dk = need_own ? token_major(q, own, q.size(3)) : none();
  Tensor dv = need_own ? token_major(q, own, v.size(3)) : none();
  const auto wide = q.options().dtype(in.type);
  Tensor dbias = need_bias ? at::empty({q.size(0), heads, n, own}, wide) : none();
  const bool one_set = prefix_k.dim() == 3;
  const auto groups = groups_of(in, one_set);
  const int64_t count = groups.size(), m = prefix_k.size(-2);
  // Prefix sets lie in memory as [G, m, H, d], one row for each prompt.
  const auto zeros = [&](int64_t dim) {
    if (!need_prefix) return none();
    return one_set ? at::zeros({count, heads, m, dim}, wide)
                   : at::zeros({count, m, heads, dim}, wide).transpose(1, 2);
  };
  Tensor dprefix_k = zeros(prefix_k.size(-1)), dprefix_v = zeros(prefix_v.size(-1));

  at::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    const pcx::Plain plain;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / heads, h = task % heads;
      for (const int64_t b : groups[group]) {
        const Tensor queries = in.head(q, b, h), keys = in.head(k, b, h);
        const Tensor prefix_keys = in.prefix(in.prefix_k, b, h);
        const Tensor prefix_values = in.prefix(in.prefix_v, b, h);
        const Tensor gradient = in.head(grad_out, b, h);
        const int64_t front = prefix_keys.size(0);
        Tensor normaliser = in.head(lse, b, h).unsqueeze(1);
        normaliser = normaliser.masked_fill(normaliser == -kInfinity, kInfinity);
        Tensor weights = in.scores(b, h, queries, prefix_keys, keys).sub_(normaliser).exp_();
        Tensor delta = (gradient * in.head(out, b, h)).sum(1, true);  // [N, 1]
        if (grad_lse) delta.sub_(in.head(*grad_lse, b, h).unsqueeze(1));
        Tensor slopes = at::empty_like(weights);
        Tensor prefix_slopes = slopes.narrow(1, 0, front),
               own_slopes = slopes.narrow(1, front, own);
        at::mm_out(prefix_slopes, gradient, prefix_values.t());
        at::mm_out(own_slopes, gradient, in.head(v, b, h).t());
        slopes.sub_(delta).mul_(weights);
        if (need_bias) dbias.select(0, b).select(0, h).copy_(own_slopes);
        slopes.mul_(scale);
        if (need_q) {
          dq.select(0, b).select(0, h).copy_(
              at::mm(own_slopes, keys).addmm_(prefix_slopes, prefix_keys));
        }
        if (need_own) {
          dk.select(0, b).select(0, h).copy_(at::mm(own_slopes.t(), queries));
          dv.select(0, b).select(0, h).copy_(at::mm(weights.narrow(1, front, own).t(), gradient));
        }
        if (need_prefix) {
          const auto total = [&](Tensor& x) {
            return x.select(0, group).select(0, h).narrow(0, 0, front);
          };
          total(dprefix_k).addmm_(prefix_slopes.t(), queries);
          total(dprefix_v).addmm_(weights.narrow(1, 0, front).t(), gradient);
        }
      }
    }
  });
  if (!need_prefix) return {dq, dk, dv, none(), none(), dbias};
  if (one_set) dprefix_k = dprefix_k.sum(0), dprefix_v = dprefix_v.sum(0);
  return {dq, dk, dv, dprefix_k.to(q.scalar_type()), dprefix_v.to(q.scalar_type()), dbias};
}

const pcx::Implementations implementations(c10::DispatchKey::CPU, [](torch::Library& library) {
  library.impl("prefix_attention", &forward);
  library.impl("prefix_attention_backward", &backward);
});

}  // namespace
