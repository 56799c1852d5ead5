// Scores of prompts on the CPU, from gradients taken at the prompts or behind their LayerNorm. One
// task computes all samples of some prompts, whose means and variances are computed once. float and
// the 16-bit types are computed in float, double in double. Every run gives the same bits, whatever
// the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../operations.h"

namespace {

using at::Tensor;

constexpr int kLanes = 16;  // partial sums; the compiler keeps them in vector registers

template <typename Wide, typename Term>
Wide sum(int64_t n, Term term) {
  Wide lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(j + l);
  Wide total = 0;
  for (; j < n; ++j) total += term(j);
  for (const Wide lane : lanes) total += lane;
  return total;
}

// One prompt: its normalised row, and the factors that turn a gradient into the scored product.
template <typename Wide>
struct Prompt {
  std::vector<Wide> normed, factor;
  bool layer_norm;

  Prompt(const Wide* p, int64_t dim, bool layer_norm, double eps)
      : factor(p, p + dim), layer_norm(layer_norm) {
    if (!layer_norm) return;
    const Wide mean = sum<Wide>(dim, [&](int64_t j) { return p[j]; }) / dim;
    const Wide variance =
        sum<Wide>(dim, [&](int64_t j) { return (p[j] - mean) * (p[j] - mean); }) / dim;
    const Wide inverse = 1 / std::sqrt(variance + static_cast<Wide>(eps));
    normed.resize(dim);
    for (int64_t j = 0; j < dim; ++j) {
      normed[j] = (p[j] - mean) * inverse;
      factor[j] = p[j] * inverse;
    }
  }

  // ||g * p|| and |<g, p>| of the gradient g by the prompt, computed from the gradient by the
  // norm's output, multiplied by the norm's weight.
  void score(const Wide* behind, Wide* taylor, Wide* inner) const {
    const auto dim = static_cast<int64_t>(factor.size());
    Wide mean = 0, along = 0;
    if (layer_norm) {
      mean = sum<Wide>(dim, [&](int64_t j) { return behind[j]; }) / dim;
      along = sum<Wide>(dim, [&](int64_t j) { return behind[j] * normed[j]; }) / dim;
    }
    const auto product = [&](int64_t j) {
      return (layer_norm ? behind[j] - mean - normed[j] * along : behind[j]) * factor[j];
    };
    *taylor = std::sqrt(sum<Wide>(dim, [&](int64_t j) { return product(j) * product(j); }));
    *inner = std::abs(sum<Wide>(dim, product));
  }
};

template <typename T, typename Wide>
void score_all(const Tensor& gradient, const Tensor& prompts, bool layer_norm, const Wide* weight,
               double eps, Tensor& scores) {
  const int64_t batch = gradient.size(0), m = gradient.size(1), dim = gradient.size(2);
  const int64_t stride_b = gradient.stride(0), stride_m = gradient.stride(1);
  const T* from = gradient.const_data_ptr<T>();
  const Wide* p = prompts.const_data_ptr<Wide>();
  Wide* taylor = scores.mutable_data_ptr<Wide>();
  Wide* inner = taylor + batch * m;
  at::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    std::vector<Wide> behind(dim);
    for (int64_t i = begin; i < end; ++i) {
      const Prompt<Wide> prompt(p + i * dim, dim, layer_norm, eps);
      for (int64_t b = 0; b < batch; ++b) {
        const T* row = from + b * stride_b + i * stride_m;
        for (int64_t j = 0; j < dim; ++j)
          behind[j] = static_cast<Wide>(row[j]) * (weight ? weight[j] : Wide{1});
        prompt.score(behind.data(), taylor + b * m + i, inner + b * m + i);
      }
    }
  });
}

Tensor prompt_score(const Tensor& gradient, const Tensor& prompts, bool layer_norm,
                    const std::optional<Tensor>& weight, double eps) {
  const bool wide = gradient.scalar_type() == at::kDouble;
  const auto type = wide ? at::kDouble : at::kFloat;
  Tensor scores =
      at::empty({2, gradient.size(0), gradient.size(1)}, gradient.options().dtype(type));
  if (scores.numel() == 0) return scores;
  const Tensor rows = gradient.stride(2) == 1 ? gradient : gradient.contiguous();
  const Tensor p = prompts.to(type).contiguous();
  const Tensor w = layer_norm && weight ? weight->to(type).contiguous() : Tensor();
  const auto run = [&]<typename T, typename Wide>() {
    score_all<T, Wide>(rows, p, layer_norm, w.defined() ? w.const_data_ptr<Wide>() : nullptr, eps,
                       scores);
  };
  switch (gradient.scalar_type()) {
    case at::kDouble:
      run.operator()<double, double>();
      break;
    case at::kFloat:
      run.operator()<float, float>();
      break;
    case at::kBFloat16:
      run.operator()<at::BFloat16, float>();
      break;
    case at::kHalf:
      run.operator()<at::Half, float>();
      break;
    default:
      TORCH_CHECK(false, "gradient: floating point expected");
  }
  return scores;
}

const pcx::Implementations implementations(c10::DispatchKey::CPU, [](torch::Library& library) {
  library.impl("prompt_score", &prompt_score);
});

}  // namespace
