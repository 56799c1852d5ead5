// Weighted PageRank over attention on the CPU. One task computes one head of one sample, and keeps
// its attention matrix only for its iterations. bfloat16, float16 and float are computed in float,
// double in double. Every run gives the same bits, whatever the number of threads.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/unsqueeze.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../operations.h"
#include "plain.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Turns one row of logits, of the prefix and of the tokens, into attention to the tokens.
template <typename T>
void attend(const T* to_prefix, int64_t m, T* row, int64_t n) {
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < m; ++j) top = std::max(top, to_prefix[j]);
  for (int64_t j = 0; j < n; ++j) top = std::max(top, row[j]);
  if (top == -std::numeric_limits<T>::infinity()) top = 0;  // the row attends to nothing
  T total = 0;
  for (int64_t j = 0; j < m; ++j) total += std::exp(to_prefix[j] - top);
  for (int64_t j = 0; j < n; ++j) total += row[j] = std::exp(row[j] - top);
  const T inverse = total > 0 ? 1 / total : 0;
  for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
}

template <typename T>
void run(const Tensor& q, const Tensor& k, const Tensor& init, const Tensor& bias,
         const Tensor& prefix_k, int64_t iters, double scale, const Tensor& scores) {
  const int64_t heads = q.size(1), n = q.size(2), m = prefix_k.defined() ? prefix_k.size(1) : 0;
  at::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    const pcx::Plain plain;  // every thread has a dispatch state of its own
    std::vector<T> now(n), next(n);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      const Tensor rows = q.select(0, b).select(0, h) * scale;
      Tensor matrix = at::mm(rows, k.select(0, b).select(0, h).t());
      if (bias.defined()) matrix = (matrix + bias.select(0, b).select(0, h)).contiguous();
      const Tensor to_prefix = m ? at::mm(rows, prefix_k.select(0, h).t()) : Tensor();
      T* a = matrix.mutable_data_ptr<T>();
      for (int64_t r = 0; r < n; ++r)
        attend(m ? to_prefix.const_data_ptr<T>() + r * m : nullptr, m, a + r * n, n);
      const T* start = init.const_data_ptr<T>() + i * n;
      now.assign(start, start + n);
      for (int64_t step = 0; step < iters; ++step) {
        next.assign(n, 0);
        for (int64_t r = 0; r < n; ++r)
          for (int64_t j = 0; j < n; ++j) next[j] += a[r * n + j] * now[r];
        T total = 0;
        for (const T score : next) total += score;
        for (T& score : next) score = total == 0 ? T(1) / n : score / total;
        now.swap(next);
      }
      std::copy(now.begin(), now.end(), scores.mutable_data_ptr<T>() + i * n);
    }
  });
}

Tensor weighted_pagerank(const Tensor& all_q, const Tensor& all_k, const Tensor& init,
                         const OptionalTensor& bias, const OptionalTensor& prefix_k,
                         const OptionalTensor& among, int64_t iters, double scale) {
  const auto nodes = [&](const Tensor& x) {
    if (!among) return x;
    const Tensor index = at::unsqueeze(at::unsqueeze(*among, 1), 3);
    return at::gather(x, 2, index.expand({x.size(0), x.size(1), -1, x.size(3)}));
  };
  const Tensor q = nodes(all_q), k = nodes(all_k);
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor scores = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(type));
  if (scores.numel() == 0) return scores;
  const auto wide = [&](const OptionalTensor& x) {
    return x ? x->to(type).contiguous() : Tensor();
  };
  const Tensor from = init.to(type).expand(scores.sizes()).contiguous();
  const Tensor added =
      bias ? bias->to(type).expand({q.size(0), q.size(1), q.size(2), q.size(2)}) : Tensor();
  const auto call = type == at::kDouble ? run<double> : run<float>;
  call(wide(q), wide(k), from, added, wide(prefix_k), iters, scale, scores);
  return scores;
}

const pcx::Implementations implementations(c10::DispatchKey::CPU, [](torch::Library& library) {
  library.impl("weighted_pagerank", &weighted_pagerank);
});

}  // namespace
