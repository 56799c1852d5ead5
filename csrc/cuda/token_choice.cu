// The choice of the tokens that a pruning layer keeps (Zero-TPrune). A block computes one sample.
// The heads' scores are combined into one (VHF and EIR). A patch's rank is the number of patches
// before it. The tokens that stay are written in their order, at places that bit masks give.
//
// The similarity stage sums the heads' keys in float32, as rows of shared memory. Cosines of group
// A's rows with group B's are products on the tensor cores, as three of TF32 parts. Only the
// largest of each row is kept.

#include "attention_graph.cuh"
#include "token_choice.h"

namespace pcx {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Maps floats to unsigned numbers in the same order; NaN is above all, as torch sorts it.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return isnan(x) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Masks {  // one bit per token
  uint32_t words[kMostTokens / 32];

  // Set once, by a whole block: bit i is `of(i)`, for i below `tokens`.
  template <typename Of>
  __device__ void set(int tokens, Of of) {
    for (int base = threadIdx.x - threadIdx.x % 32; base < tokens; base += kThreads) {
      const int i = base + threadIdx.x % 32;
      const uint32_t word = __ballot_sync(0xffffffff, i < tokens && of(i));
      if (threadIdx.x % 32 == 0) words[base / 32] = word;
    }
    __syncthreads();
  }
  __device__ bool has(int i) const { return words[i / 32] >> i % 32 & 1; }
  __device__ int before(int i) const {
    int count = __popc(words[i / 32] & ((1u << i % 32) - 1));
    for (int w = 0; w < i / 32; ++w) count += __popc(words[w]);
    return count;
  }
};

// VHF and EIR: sort keys in the order of sqrt(sum of used heads' squares) / count.
__device__ void combine(const Heads& heads, int b, int tokens, uint32_t* keys) {
  __shared__ bool used[kMostHeads];
  __shared__ int count;
  const float* scores = heads.scores + int64_t{b} * heads.count * tokens;
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < heads.count; h += kWarps) {
    const float* row = scores + h * tokens;
    float mean = 0, variance = 0;
    for (int i = lane; i < tokens; i += 32) mean += row[i];
    mean = over_warp(mean) / tokens;
    for (int i = lane; i < tokens; i += 32) variance += (row[i] - mean) * (row[i] - mean);
    variance = over_warp(variance) * tokens;  // variance of N times the scores: N^2 / N
    if (lane == 0) used[h] = variance >= heads.low && variance <= heads.high;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    count = 0;
    for (int h = 0; h < heads.count; ++h) count += used[h];
  }
  __syncthreads();
  const int among = count ? count : heads.count;  // if no head passes, all are used
  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    float sum = 0;
    for (int h = 0; h < heads.count; ++h) {
      const float score = scores[h * tokens + i];
      if (used[h] || !count) sum += score * score;
    }
    keys[i] = ordered(sqrtf(sum) / among);
  }
  __syncthreads();
}

// The number of keys[first], ... before the i-th: higher ones, and equal ones at lower places.
__device__ int rank_of(const uint32_t* keys, int first, int last, int i) {
  int before = 0;
  const uint32_t own = keys[i];
  for (int j = first; j < i; ++j) before += keys[j] >= own;
  for (int j = i + 1; j < last; ++j) before += keys[j] > own;
  return before;
}

__global__ void __launch_bounds__(kThreads) important_kernel(const Important call) {
  __shared__ uint32_t keys[kMostTokens];
  __shared__ Masks stays;
  const int b = blockIdx.x, n = call.tokens, first = call.first_patch;
  combine(call.heads, b, n, keys);
  stays.set(n, [&](int i) { return i < first || rank_of(keys, first, n, i) < call.keep; });
  int64_t* out = call.out + int64_t{b} * (first + call.keep);
  const int64_t* among = call.among ? call.among + b * call.among_stride : nullptr;
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (stays.has(i)) out[stays.before(i)] = among ? among[i] : i;
}

// Sums 16 bytes of a token's keys over the heads.
template <typename T>
__device__ __forceinline__ void sum_heads(float (&sums)[16 / sizeof(T)], const T* k, int64_t stride,
                                          int heads) {
#pragma unroll 6
  for (int h = 0; h < heads; ++h) {
    const uint4 raw = *reinterpret_cast<const uint4*>(k + h * stride);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (std::is_same_v<T, float>) {
        sums[w] += __uint_as_float(words[w]);
      } else {
        const float2 pair = unpack<T>(words[w]);
        sums[2 * w] += pair.x;
        sums[2 * w + 1] += pair.y;
      }
    }
  }
}

template <typename T>
__device__ void features_of(const Dissimilar& call, int b, char* features) {
  constexpr int kVector = 16 / sizeof(T);
  const int bytes = row_bytes(call.dim, sizeof(float)), vectors = call.dim / kVector;
  const T* k = static_cast<const T*>(call.k) + b * call.k_strides[0];
  for (int i = threadIdx.x; i < call.tokens * vectors; i += kThreads) {
    const int token = i / vectors, at = i % vectors * kVector;
    float sums[kVector] = {};
    sum_heads<T>(sums, k + token * call.k_strides[2] + at, call.k_strides[1], call.heads.count);
    float* row = reinterpret_cast<float*>(features + token * bytes) + at;
#pragma unroll
    for (int j = 0; j < kVector; j += 4)
      *reinterpret_cast<float4*>(row + j) =
          make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
  }
}

// The inverse of a row's length.
__device__ float inverse_length(const char* row, int dim) {
  float square = 0;
  for (int j = 0; j < dim; j += 4) {
    const float4 x = reinterpret_cast<const float4*>(row)[j / 4];
    square += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  return 1 / fmaxf(sqrtf(square), 1e-12f);
}

// The largest cosine of each token of group A with one of group B, 16 tokens of A per warp.
__device__ void likenesses(const char* features, const float* inverse, const int* group_a,
                           int size_a, const int* group_b, int size_b, int dim, uint32_t* alike) {
  const int bytes = row_bytes(dim, sizeof(float)), steps = steps_of(dim, sizeof(float));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t base = shared_address(features);
  for (int tile = 16 * warp; tile < size_a; tile += 16 * kWarps) {
    const int of_a = min(tile + lane % 16, size_a - 1);  // rows beyond the last repeat it
    const uint32_t left = base + group_a[of_a] * bytes + lane / 16 * 16;
    float best0 = -INFINITY, best1 = -INFINITY;
    for (int start = 0; start < size_b; start += 32) {
      uint32_t right[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int of_b = min(start + 16 * u + lane % 8 + lane / 16 * 8, size_b - 1);
        right[u] = base + group_b[of_b] * bytes + lane / 8 % 2 * 16;
      }
      float c[4][4] = {};
      for (int step = 0; step < steps; ++step) {
        uint32_t x[4];
        load_matrices(x, left + step * kStepBytes);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint32_t y[4];
          load_matrices(y, right[u] + step * kStepBytes);
          multiply_add_both<float>(c[2 * u], c[2 * u + 1], x, y);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int of_b = min(start + 8 * t + 2 * (lane % 4) + j, size_b - 1);
          const float scale = inverse[group_b[of_b]];
          best0 = fmaxf(best0, c[t][j] * scale);
          best1 = fmaxf(best1, c[t][2 + j] * scale);
        }
    }
    best0 = over_row<Max>(best0);
    best1 = over_row<Max>(best1);
    const int r0 = tile + lane / 4, r1 = r0 + 8;
    if (lane % 4 == 0) {
      if (r0 < size_a) alike[r0] = ordered(best0 * inverse[group_a[r0]]);
      if (r1 < size_a) alike[r1] = ordered(best1 * inverse[group_a[r1]]);
    }
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) dissimilar_kernel(const Dissimilar call) {
  extern __shared__ __align__(16) char features[];
  __shared__ Masks in_a, stays;
  const int b = blockIdx.x, n = call.tokens, first = call.first_patch;
  const int size_a = (n - first) / 2, size_b = n - first - size_a;
  const int bytes = row_bytes(call.dim, sizeof(float));
  uint32_t* const keys = reinterpret_cast<uint32_t*>(features + n * bytes);
  float* const inverse = reinterpret_cast<float*>(keys + n);
  int* const group_a = reinterpret_cast<int*>(inverse + n);
  int* const group_b = group_a + size_a;

  features_of<T>(call, b, features);
  combine(call.heads, b, n, keys);
  in_a.set(n, [&](int i) { return i >= first && rank_of(keys, first, n, i) >= size_b; });
  for (int i = first + threadIdx.x; i < n; i += kThreads) {
    const int of_a = in_a.before(i);
    if (in_a.has(i))
      group_a[of_a] = i;
    else
      group_b[i - first - of_a] = i;
    inverse[i] = inverse_length(features + i * bytes, call.dim);
  }
  __syncthreads();
  uint32_t* const alike = keys;  // the keys are not needed any more
  likenesses(features, inverse, group_a, size_a, group_b, size_b, call.dim, alike);
  stays.set(n, [&](int i) {
    return !in_a.has(i) || rank_of(alike, 0, size_a, in_a.before(i)) >= call.drop;
  });
  int64_t* out = call.out + int64_t{b} * (n - call.drop);
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (stays.has(i)) out[stays.before(i)] = i;
}

template <typename T>
cudaError_t launch(const Dissimilar& call, cudaStream_t stream) {
  const int bytes = choice_bytes(call.tokens, call.dim);
  const cudaError_t error = allow_shared_memory(dissimilar_kernel<T>);
  if (error != cudaSuccess) return error;
  dissimilar_kernel<T><<<call.batch, kThreads, bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

int choice_bytes(int tokens, int dim) {
  return tokens * (row_bytes(dim, sizeof(float)) + 3 * static_cast<int>(sizeof(float)));
}

cudaError_t launch_important(const Important& call, cudaStream_t stream) {
  important_kernel<<<call.batch, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t launch_dissimilar(const Dissimilar& call, Element type, cudaStream_t stream) {
  if (type == Element::kFloat) return launch<float>(call, stream);
  if (type == Element::kBFloat16) return launch<__nv_bfloat16>(call, stream);
  return launch<__half>(call, stream);
}

}  // namespace pcx
