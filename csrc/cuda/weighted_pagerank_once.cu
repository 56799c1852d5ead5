// One iteration of Weighted PageRank, A^T s with A = softmax(q k^T scale), in 16 bits. A block
// computes one head of a sample, some tiles of 16 queries after others. Only one tile of A exists
// at a time. Its rows are normalised within four lanes. Its columns are added to sums that stay in
// registers until the last tile. Lanes and warps then add these sums in a fixed order. If sums
// overflow or vanish, the head is computed again with maxima subtracted.

#include "attention_graph.cuh"

namespace pcx {
namespace {

template <int TILES>
constexpr int kFewest = fewest_nodes(TILES);

// Turns a tile's logits times `factor` into attention, in place; columns beyond the keys get none.
// Adds the sums of its columns, each row multiplied by `start`, to `sums`. Returns whether the sums
// of rows show that maxima must be subtracted. Warps without rows only wait for their group's
// products.
template <bool HOPPER, int TILES>
__device__ __forceinline__ bool vote(float (&e)[2 * TILES][4], float (&sums)[2 * TILES][2],
                                     float factor, float start0, float start1, int n, bool has_rows,
                                     bool maxima) {
  const int place = threadIdx.x % 4;
  float top0 = 0, top1 = 0;
  const auto mask = [&](int t) {
    if (t < kFewest<TILES> / 8) return;
    if (8 * t + 2 * place >= n) e[t][0] = e[t][2] = -INFINITY;
    if (8 * t + 2 * place + 1 >= n) e[t][1] = e[t][3] = -INFINITY;
  };
  if (maxima) {
    if constexpr (HOPPER) finish_products(e);
    if (has_rows) {
      top0 = top1 = -INFINITY;
#pragma unroll
      for (int t = 0; t < 2 * TILES; ++t) {
        mask(t);
        top0 = fmaxf(top0, fmaxf(e[t][0], e[t][1]));
        top1 = fmaxf(top1, fmaxf(e[t][2], e[t][3]));
      }
      top0 = -factor * over_row<Max>(top0);
      top1 = -factor * over_row<Max>(top1);
    }
  }
  float z0[2] = {}, z1[2] = {};
  each_tile<HOPPER>(e, has_rows, [&](int t) {
    mask(t);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      e[t][j] = power_of_2(fmaf(e[t][j], factor, top0));
      e[t][2 + j] = power_of_2(fmaf(e[t][2 + j], factor, top1));
      z0[j] += e[t][j];
      z1[j] += e[t][2 + j];
    }
  });
  if (!has_rows) return false;
  const float total0 = over_row<Sum>(z0[0] + z0[1]), total1 = over_row<Sum>(z1[0] + z1[1]);
  const float weight0 = start0 / total0, weight1 = start1 / total1;
#pragma unroll
  for (int t = 0; t < 2 * TILES; ++t) {
    sums[t][0] = fmaf(e[t][2], weight1, fmaf(e[t][0], weight0, sums[t][0]));
    sums[t][1] = fmaf(e[t][3], weight1, fmaf(e[t][1], weight0, sums[t][1]));
  }
  return !within_range(total0) || !within_range(total1);
}

// With HOPPER, products are a warp group's, of 64 queries and head dim 64. Which warp computes
// which 16 queries rotates with the block, since the last 64 are seldom complete. Sums keep the
// order of the queries.
template <typename T, int TILES, int BLOCKS, bool HOPPER>
__global__ void __launch_bounds__(128, BLOCKS) once_kernel(const Pagerank call) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (HOPPER) return;
#endif
  constexpr int kColumns = 16 * TILES, kRows = (TILES + 3) / 4 * 64, kThreads = 128;
  extern __shared__ __align__(1024) char memory[];
  __shared__ float parts[4][kColumns], start[kRows], scores[kColumns];
  __shared__ int key_tokens[kColumns], query_tokens[kRows];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int b = blockIdx.x / call.heads, h = blockIdx.x % call.heads, n = call.nodes;
  const int bytes = HOPPER ? kRowBytes : row_bytes(call.dim, sizeof(T));
  const int steps = steps_of(call.dim, sizeof(T));
  const uint32_t queries = shared_address(memory), keys = queries + kRows * bytes;

  const float* init = call.init + b * call.init_strides[0] + h * call.init_strides[1];
  const int turn = blockIdx.x % 4, part = (warp + 4 - turn) % 4;  // of 64 queries, by 16
  for (int i = thread; i < kRows; i += kThreads) {
    const int row = i / 64 * 64 + (i + 16 * turn) % 64, token = token_at(call, b, i);
    query_tokens[row] = token;
    if (i < kColumns) key_tokens[i] = token;
    start[row] = i < n ? init[i * call.init_strides[2]] : 0;
  }
  __syncthreads();
  const T* q = static_cast<const T*>(call.q) + b * call.q_strides[0] + h * call.q_strides[1];
  const T* k = static_cast<const T*>(call.k) + b * call.k_strides[0] + h * call.k_strides[1];
  copy_rows<T, kRows, kThreads, HOPPER>(queries, q, call.q_strides[2], query_tokens, call.dim);
  copy_rows<T, kColumns, kThreads, HOPPER>(keys, k, call.k_strides[2], key_tokens, call.dim);
  commit_copies();
  wait_for_copies<0>();
  if constexpr (HOPPER) see_copies();
  __syncthreads();

  const float factor = call.scale * kLog2E;
  float sums[2 * TILES][2];
  for (bool again = false;; again = true) {
#pragma unroll
    for (auto& sum : sums) sum[0] = sum[1] = 0;
    bool lost = false;
    for (int first = 0; first < n; first += 64) {
      const int row = first + 16 * warp;
      const bool has_rows = first + 16 * part < n;
      float e[2 * TILES][4];
      if constexpr (HOPPER) {
        start_products<T>(e, queries + first * bytes, keys);
      } else if (!has_rows) {
        continue;
      } else {
#pragma unroll
        for (auto& tile : e) tile[0] = tile[1] = tile[2] = tile[3] = 0;
        products<T, TILES>(e, queries + row * bytes + left_offset(lane, bytes),
                           keys + right_offset(lane, bytes), bytes, steps);
      }
      lost |= vote<HOPPER, TILES>(e, sums, factor, start[row + lane / 4], start[row + lane / 4 + 8],
                                  n, has_rows, again);
    }
    if (!__syncthreads_or(lost) || again) break;
  }
  reduce_columns<Sum, TILES>([&](int i) { return sums[i / 2][i % 2]; }, parts[part], lane);
  __syncthreads();
  for (int i = thread; i < kColumns; i += kThreads)
    scores[i] = i < n ? parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i] : 0;
  __syncthreads();
  float total = 0;  // 1 up to rounding
  for (int i = lane; i < kColumns; i += 32) total += scores[i];
  total = over_warp(total);
  for (int i = thread; i < n; i += kThreads)
    call.scores[int64_t{blockIdx.x} * n + i] = scores[i] / total;
}

template <typename T, int TILES, int BLOCKS, bool HOPPER>
cudaError_t launch_kernel(const Pagerank& call, cudaStream_t stream) {
  const auto kernel = once_kernel<T, TILES, BLOCKS, HOPPER>;
  const int rows = (TILES + 3) / 4 * 64 + 16 * TILES;
  const int bytes = rows * (HOPPER ? kRowBytes : row_bytes(call.dim, sizeof(T)));
  const cudaError_t error = allow_shared_memory(kernel);
  if (error != cudaSuccess) return error;
  kernel<<<call.batch * call.heads, 128, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <typename T, int TILES, int BLOCKS>
cudaError_t launch_tiles(const Pagerank& call, cudaStream_t stream) {
  if (call.dim == 64 && attribute(cudaDevAttrComputeCapabilityMajor) == 9)
    return launch_kernel<T, TILES, BLOCKS, true>(call, stream);
  return launch_kernel<T, TILES, BLOCKS, false>(call, stream);
}

template <typename T>
cudaError_t launch(const Pagerank& call, cudaStream_t stream) {
  switch (tiles_for(call.nodes)) {  // blocks a processor has registers for
    case 4:
      return launch_tiles<T, 4, 5>(call, stream);
    case 6:
      return launch_tiles<T, 6, 4>(call, stream);
    case 8:
      return launch_tiles<T, 8, 3>(call, stream);
    case 10:
      return launch_tiles<T, 10, 2>(call, stream);
    case 12:
      return launch_tiles<T, 12, 2>(call, stream);
    case 13:
      return launch_tiles<T, 13, 3>(call, stream);
    default:
      return launch_tiles<T, 17, 2>(call, stream);
  }
}

}  // namespace

cudaError_t launch_pagerank_once(const Pagerank& call, Element type, cudaStream_t stream) {
  return type == Element::kBFloat16 ? launch<__nv_bfloat16>(call, stream)
                                    : launch<__half>(call, stream);
}

}  // namespace pcx
