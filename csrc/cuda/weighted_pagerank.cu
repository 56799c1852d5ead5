// Weighted PageRank, s <- A^T s with A = softmax(q k^T scale): one block is one head of a sample,
// and its whole matrix stays in registers from the products to the last iteration.
//
// A warp holds 16 rows of A^T, so 16 tokens whose scores it alone makes: an iteration reads the
// scores from shared memory, sums over a row within four lanes, and writes 16 new ones. Rows of A
// are columns there, spread over all warps, and are summed once. What their sums divide is not the
// matrix but the scores: A^T s = E^T (s / Z) with E = exp(logits - maxima), Z = E's row sums.
//
// 16 bits go through the tensor cores as they are; float32 as three products of TF32 parts, which
// is float32 to rounding. All sums have a fixed order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "weighted_pagerank.h"

namespace pcx {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
__device__ void add_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ uint32_t tf32(float x) {
  uint32_t found;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(found) : "f"(x));
  return found;
}

// x as the sum of two TF32 numbers.
template <int N>
__device__ void split(const uint32_t (&x)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    high[i] = tf32(__uint_as_float(x[i]));
    low[i] = tf32(__uint_as_float(x[i]) - __uint_as_float(high[i]));
  }
}

template <typename T>
__device__ void add_exact(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split(a, a_high, a_low);
    split(b, b_high, b_low);
    add_product<T>(c, a_low, b_high);
    add_product<T>(c, a_high, b_low);
    add_product<T>(c, a_high, b_high);
  } else {
    add_product<T>(c, a, b);
  }
}

// One word of a row: 32 bits at element `at`, 0 beyond the row's end.
template <typename T>
__device__ uint32_t word(const T* row, int at, int dim) {
  return row && at < dim ? *reinterpret_cast<const uint32_t*>(row + at) : 0;
}

struct Sum {
  static constexpr float kEmpty = 0;
  __device__ static float of(float a, float b) { return a + b; }
};

struct Max {
  static constexpr float kEmpty = -INFINITY;
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces a warp's 16 rows to one: `value(i)` is this lane's of its i-th column, of 4 * TILES. The
// eight lanes that share columns halve each eight of them among each other three times.
template <typename Op, int TILES, typename Value>
__device__ void reduce_columns(Value value, float* row, int lane) {
  constexpr int kValues = 4 * TILES;
  const auto merged = [](bool upper, float first, float second, int mask) {
    return Op::of(upper ? second : first,
                  __shfl_xor_sync(0xffffffff, upper ? first : second, mask));
  };
#pragma unroll
  for (int start = 0; start < kValues; start += 8) {
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int other = start + i + 4;
      half[i] =
          merged(lane & 16, value(start + i), other < kValues ? value(other) : Op::kEmpty, 16);
    }
    const float first = merged(lane & 8, half[0], half[2], 8);
    const float second = merged(lane & 8, half[1], half[3], 8);
    const float found = merged(lane & 4, first, second, 4);
    const int index = start + (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    if (index < kValues) row[8 * (index / 2) + 2 * (lane % 4) + index % 2] = found;
  }
}

template <typename T, int TILES>
__global__ void __launch_bounds__(32 * TILES, 1) pagerank_kernel(const Pagerank call) {
  constexpr int kRows = 16 * TILES, kWords = std::is_same_v<T, float> ? 1 : 2;  // T in 32 bits
  constexpr int kStep = 8 * kWords;                                             // of d, a product
  extern __shared__ __align__(16) char memory[];
  __shared__ float parts[TILES][kRows], top[kRows], inverse[kRows], weights[2][kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  const int b = blockIdx.x / call.heads, h = blockIdx.x % call.heads;
  const int n = call.tokens, dim = call.dim, width = (dim + kStep - 1) / kStep * kStep;
  const int stride = width + 4 * kWords;  // rows begin on other banks
  T* queries = reinterpret_cast<T*>(memory);

  constexpr int kVector = 4 * kWords;  // elements in 16 bytes
  const T* q = static_cast<const T*>(call.q) + b * call.q_strides[0] + h * call.q_strides[1];
  for (int i = threadIdx.x; i < kRows * (width / kVector); i += 32 * TILES) {
    const int row = i / (width / kVector), at = i % (width / kVector) * kVector;
    uint4 vector = {};
    if (row < n && at < dim)
      vector = *reinterpret_cast<const uint4*>(q + row * call.q_strides[2] + at);
    *reinterpret_cast<uint4*>(queries + row * stride + at) = vector;
  }
  __syncthreads();

  // This lane's part of A^T: rows (tokens that are attended to) r0 and r1, of tile t columns
  // (tokens that attend) 8 t + 2 place and the next.
  const int r0 = 16 * warp + group, r1 = r0 + 8;
  const T* k = static_cast<const T*>(call.k) + b * call.k_strides[0] + h * call.k_strides[1];
  const T* k0 = r0 < n ? k + r0 * call.k_strides[2] : nullptr;
  const T* k1 = r1 < n ? k + r1 * call.k_strides[2] : nullptr;
  float e[2 * TILES][4] = {};
  for (int start = 0; start < width; start += kStep) {
    const int left = start + place * kWords, right = left + 4 * kWords;
    const uint32_t keys[4] = {word(k0, left, dim), word(k1, left, dim), word(k0, right, dim),
                              word(k1, right, dim)};
#pragma unroll
    for (int t = 0; t < 2 * TILES; ++t) {
      const T* row = queries + (8 * t + group) * stride;
      const uint32_t both[2] = {word(row, left, width), word(row, right, width)};
      add_exact<T>(e[t], keys, both);
    }
  }

  const float factor = call.scale * kLog2E;
#pragma unroll
  for (int t = 0; t < 2 * TILES; ++t) {
    e[t][0] = r0 < n ? e[t][0] * factor : -INFINITY;
    e[t][1] = r0 < n ? e[t][1] * factor : -INFINITY;
    e[t][2] = r1 < n ? e[t][2] * factor : -INFINITY;
    e[t][3] = r1 < n ? e[t][3] * factor : -INFINITY;
  }
  reduce_columns<Max, TILES>([&](int i) { return fmaxf(e[i / 2][i % 2], e[i / 2][2 + i % 2]); },
                             parts[warp], lane);
  __syncthreads();
  for (int i = threadIdx.x; i < kRows; i += 32 * TILES) {
    float found = parts[0][i];
    for (int w = 1; w < TILES; ++w) found = fmaxf(found, parts[w][i]);
    top[i] = found;
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 2 * TILES; ++t) {
    const float2 most = *reinterpret_cast<const float2*>(top + 8 * t + 2 * place);
    e[t][0] = exp2f(e[t][0] - most.x);
    e[t][1] = exp2f(e[t][1] - most.y);
    e[t][2] = exp2f(e[t][2] - most.x);
    e[t][3] = exp2f(e[t][3] - most.y);
  }
  reduce_columns<Sum, TILES>([&](int i) { return e[i / 2][i % 2] + e[i / 2][2 + i % 2]; },
                             parts[warp], lane);
  __syncthreads();
  const float* init = call.init + b * call.init_strides[0] + h * call.init_strides[1];
  for (int i = threadIdx.x; i < kRows; i += 32 * TILES) {
    float total = parts[0][i];
    for (int w = 1; w < TILES; ++w) total += parts[w][i];
    inverse[i] = i < n ? 1 / total : 0;
    weights[0][i] = i < n ? init[i * call.init_strides[2]] * inverse[i] : 0;
  }
  __syncthreads();

  const float inverse0 = inverse[r0], inverse1 = inverse[r1];
  for (int step = 1; step <= call.iters; ++step) {
    const float* from = weights[(step - 1) % 2];
    float s0[2] = {}, s1[2] = {};
#pragma unroll
    for (int t = 0; t < 2 * TILES; ++t) {
      const float2 weight = *reinterpret_cast<const float2*>(from + 8 * t + 2 * place);
      s0[t % 2] += e[t][0] * weight.x;
      s1[t % 2] += e[t][2] * weight.x;
      s0[t % 2] += e[t][1] * weight.y;
      s1[t % 2] += e[t][3] * weight.y;
    }
    float first = s0[0] + s0[1], second = s1[0] + s1[1];
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      first += __shfl_xor_sync(0xffffffff, first, mask);
      second += __shfl_xor_sync(0xffffffff, second, mask);
    }
    const bool last = step == call.iters;  // whose scores are wanted as they are
    float* to = weights[step % 2];
    if (place == 0) {
      to[r0] = last ? first : first * inverse0;
      to[r1] = last ? second : second * inverse1;
    }
    __syncthreads();
  }

  // The sum is 1 but for rounding, which every iteration carries on.
  const float* scores = weights[call.iters % 2];
  float total = 0;
  for (int i = lane; i < kRows; i += 32) total += scores[i];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) total += __shfl_xor_sync(0xffffffff, total, mask);
  float* out = call.scores + int64_t{blockIdx.x} * n;
  for (int i = threadIdx.x; i < n; i += 32 * TILES) out[i] = scores[i] / total;
}

// Tiles of 16 tokens that the kernel holds.
int tiles_for(int tokens) { return tokens <= 64 ? 4 : tokens <= 112 ? 7 : tokens <= 160 ? 10 : 13; }

// Of the queries, which alone are dynamic.
int query_bytes(int tokens, int dim, Element type) {
  const int words = type == Element::kFloat ? 1 : 2, step = 8 * words;
  const int width = (dim + step - 1) / step * step;
  return 16 * tiles_for(tokens) * (width + 4 * words) * (4 / words);
}

template <typename T, int TILES>
cudaError_t launch_tiles(const Pagerank& call, int bytes, cudaStream_t stream) {
  const auto kernel = pagerank_kernel<T, TILES>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<call.batch * call.heads, 32 * TILES, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Pagerank& call, int bytes, cudaStream_t stream) {
  switch (tiles_for(call.tokens)) {
    case 4:
      return launch_tiles<T, 4>(call, bytes, stream);
    case 7:
      return launch_tiles<T, 7>(call, bytes, stream);
    case 10:
      return launch_tiles<T, 10>(call, bytes, stream);
    default:
      return launch_tiles<T, 13>(call, bytes, stream);
  }
}

}  // namespace

int shared_bytes(int tokens, int dim, Element type) {
  const int tiles = tiles_for(tokens), rows = 16 * tiles;
  return query_bytes(tokens, dim, type) + (tiles + 4) * rows * static_cast<int>(sizeof(float));
}

cudaError_t launch_pagerank(const Pagerank& call, Element type, cudaStream_t stream) {
  static_assert(kMostTokens == 16 * 13);
  const int bytes = query_bytes(call.tokens, call.dim, type);
  if (type == Element::kFloat) return launch<float>(call, bytes, stream);
  if (type == Element::kBFloat16) return launch<__nv_bfloat16>(call, bytes, stream);
  return launch<__half>(call, bytes, stream);
}

}  // namespace pcx
