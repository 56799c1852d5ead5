// Weighted PageRank, s <- A^T s with A = softmax(q k^T scale), for several iterations. A block
// computes one head of a sample after another. A head's whole matrix stays in registers, from the
// products to the last iteration. On Hopper, two blocks of a cluster share a graph that is too
// large for one. One iteration alone is computed by weighted_pagerank_once.cu.
//
// A warp holds 16 rows of A^T, and alone computes the scores of their 16 tokens. An iteration reads
// the scores from shared memory, sums over a row within four lanes, and writes 16 new ones. Rows of
// A are columns of A^T, spread over all warps, and are summed once. Their sums Z divide the scores,
// not the matrix: A^T s = E^T (s / Z) with E = exp(logits). If the sums show that E overflows or
// vanishes, the head is computed again with maxima subtracted. The next head's queries and keys are
// copied while a head iterates.
//
// 16-bit numbers go through the tensor cores as they are. float32 is computed as three products of
// TF32 parts, which is float32 to about 2^-20. All sums have a fixed order.

#include <algorithm>

#include "attention_graph.cuh"

namespace pcx {
namespace {

// The place of the i-th weight: a lane's four of 16, two of either tile, are side by side.
__device__ __forceinline__ int weight_place(int i) {
  return i / 16 * 16 + i % 8 / 2 * 4 + i / 8 % 2 * 2 + i % 2;
}

// Reduces this thread's column over the warps' partial results in `parts`, then over the blocks
// that share a head.
template <typename Op, int WARPS, int SHARES, int COLUMNS>
__device__ __forceinline__ float over_head(const float (&parts)[WARPS][COLUMNS],
                                           float (&of_shares)[SHARES][COLUMNS]) {
  const int thread = threadIdx.x;
  __syncthreads();
  float found = Op::kEmpty;
  if (thread < COLUMNS)
    for (int w = 0; w < WARPS; ++w) found = Op::of(found, parts[w][thread]);
  if constexpr (SHARES > 1) {
    if (thread < COLUMNS)
      for (int s = 0; s < SHARES; ++s)
        store_there(address_in(s, shared_address(&of_shares[blockIdx.x % SHARES][thread])), found);
    sync_cluster();
    found = Op::kEmpty;
    if (thread < COLUMNS)
      for (int s = 0; s < SHARES; ++s) found = Op::of(found, of_shares[s][thread]);
  }
  return found;
}

// With HOPPER, products are those of warp groups, for head dim 64 in 16 bits. Warps beyond TILES,
// which make the number of warps a multiple of four, then have no rows. SHARES blocks of a cluster
// share a head: each has some rows of A^T, and all scores.
template <typename T, int TILES, int WARPS, int BLOCKS, bool HOPPER, int SHARES>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) pagerank_kernel(const Pagerank call) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (HOPPER || SHARES > 1) return;
#endif
  constexpr int kTiles = (TILES + SHARES - 1) / SHARES, kOwn = 16 * kTiles;  // of rows, a block's
  constexpr int kRows = SHARES * kOwn, kColumns = 16 * TILES, kThreads = 32 * WARPS;
  constexpr int kKeys = 16 * WARPS, kTokens = kRows - kOwn + kKeys;  // with warps that have no rows
  static_assert(kColumns <= kRows && kRows <= kTokens && kTokens <= kThreads);
  extern __shared__ __align__(1024) char memory[];
  __shared__ __align__(16) float weights[2][kRows];
  __shared__ float parts[kTiles][kColumns], top[kColumns], inverse[kRows];
  __shared__ float maxima[SHARES][kColumns], sums[SHARES][kColumns];
  __shared__ int tokens[kTokens];
  __shared__ uint64_t arrived[2];  // barriers of the weights that blocks send each other
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, place = lane % 4;
  const int n = call.nodes, heads = call.batch * call.heads;
  const int bytes = HOPPER ? kRowBytes : row_bytes(call.dim, sizeof(T));
  const int steps = steps_of(call.dim, sizeof(T));
  const uint32_t keys = shared_address(memory), queries = keys + kKeys * bytes;
  const int share = blockIdx.x % SHARES, own = share * kOwn;
  const int r0 = own + 16 * warp + lane / 4, r1 = r0 + 8;  // this lane's rows of A^T
  const float factor = call.scale * kLog2E;
  const float shift0 = r0 < n ? 0 : -INFINITY, shift1 = r1 < n ? 0 : -INFINITY;
  const bool has_rows = !HOPPER || warp < kTiles;

  const auto copy_head = [&](int head) {
    const int b = head / call.heads, h = head % call.heads;
    const T* q = static_cast<const T*>(call.q) + b * call.q_strides[0] + h * call.q_strides[1];
    const T* k = static_cast<const T*>(call.k) + b * call.k_strides[0] + h * call.k_strides[1];
    copy_rows<T, kKeys, kThreads, HOPPER>(keys, k, call.k_strides[2], tokens + own, call.dim);
    copy_rows<T, kColumns, kThreads, HOPPER>(queries, q, call.q_strides[2], tokens, call.dim);
    commit_copies();
  };
  const auto start_of = [&](int head) {
    return thread >= n ? 0
                       : call.init[head / call.heads * call.init_strides[0] +
                                   head % call.heads * call.init_strides[1] +
                                   thread * call.init_strides[2]];
  };
  int head = blockIdx.x / SHARES;
  if (thread < kTokens) tokens[thread] = token_at(call, head / call.heads, thread);
  float start = start_of(head);
  uint32_t parities = 0;  // of the barriers
  if constexpr (SHARES > 1) {
    if (thread < 2) make_barrier(shared_address(arrived + thread), 1);
    sync_cluster();  // no block may send before the other one runs
  } else {
    __syncthreads();
  }
  copy_head(head);

  for (; head < heads; head += gridDim.x / SHARES) {
    const int next = head + gridDim.x / SHARES;
    int next_token = -1;
    float next_start = 0;
    if (next < heads) {
      next_token = token_at(call, next / call.heads, thread);
      next_start = start_of(next);
    }
    wait_for_copies<0>();
    if constexpr (HOPPER) see_copies();
    __syncthreads();

    float e[2 * TILES][4];
    const auto exponentiate = [&](float (&x)[4], float2 best) {  // a tile's logits, in place
      x[0] = power_of_2(fmaf(x[0], factor, shift0 - best.x));
      x[1] = power_of_2(fmaf(x[1], factor, shift0 - best.y));
      x[2] = power_of_2(fmaf(x[2], factor, shift1 - best.x));
      x[3] = power_of_2(fmaf(x[3], factor, shift1 - best.y));
    };
    for (bool again = false;; again = true) {
      if constexpr (HOPPER) {
        start_products<T>(e, keys + warp / 4 * 64 * bytes, queries);
      } else {
#pragma unroll
        for (auto& tile : e) tile[0] = tile[1] = tile[2] = tile[3] = 0;
        products<T, TILES>(e, keys + 16 * warp * bytes + left_offset(lane, bytes),
                           queries + right_offset(lane, bytes), bytes, steps);
      }
      if (again) {
        if constexpr (HOPPER) finish_products(e);
        if (has_rows)
          reduce_columns<Max, TILES>(
              [&](int i) {
                return fmaxf(fmaf(e[i / 2][i % 2], factor, shift0),
                             fmaf(e[i / 2][2 + i % 2], factor, shift1));
              },
              parts[warp], lane);
        const float found = over_head<Max>(parts, maxima);
        if (thread < kColumns) top[thread] = found;
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 2 * TILES; ++t)
          exponentiate(e[t], *reinterpret_cast<const float2*>(top + 8 * t + 2 * place));
      } else {
        each_tile<HOPPER>(e, has_rows, [&](int t) { exponentiate(e[t], {0, 0}); });
      }
      if (has_rows)
        reduce_columns<Sum, TILES>([&](int i) { return e[i / 2][i % 2] + e[i / 2][2 + i % 2]; },
                                   parts[warp], lane);
      const float total = over_head<Sum>(parts, sums);
      const bool lost = thread < n && !within_range(total);
      if (thread < kRows) {
        inverse[thread] = thread < n ? 1 / total : 0;  // rows beyond the tokens have weight 0
        weights[0][weight_place(thread)] = start * inverse[thread];
      }
      if (thread < kTokens) tokens[thread] = next_token;
      if (!__syncthreads_or(lost) || again) break;
    }
    if (next < heads) copy_head(next);
    start = next_start;
    // A warp with nothing to send would not hold up a phase, and could miss two.
    if constexpr (SHARES > 1)
      if (!has_rows) continue;

    float inverse0 = has_rows ? inverse[r0] : 0, inverse1 = has_rows ? inverse[r1] : 0;
    float *from = weights[0], *to = weights[1];
    for (int step = 1; step <= call.iters; ++step) {
      const float4* given = reinterpret_cast<const float4*>(from) + place;
      float s0[2] = {}, s1[2] = {};
      if (has_rows) {
#pragma unroll
        for (int u = 0; u < TILES; ++u) {
          const float4 weight = given[4 * u];
          s0[0] += e[2 * u][0] * weight.x;
          s1[0] += e[2 * u][2] * weight.x;
          s0[1] += e[2 * u][1] * weight.y;
          s1[1] += e[2 * u][3] * weight.y;
          s0[0] += e[2 * u + 1][0] * weight.z;
          s1[0] += e[2 * u + 1][2] * weight.z;
          s0[1] += e[2 * u + 1][1] * weight.w;
          s1[1] += e[2 * u + 1][3] * weight.w;
        }
      }
      const float first = over_row<Sum>(s0[0] + s0[1]), second = over_row<Sum>(s1[0] + s1[1]);
      if (step == call.iters) inverse0 = inverse1 = 1;  // the last scores are not divided
      if constexpr (SHARES > 1) {
        // All of it arrives only after all blocks have read the numbers that it replaces.
        const uint32_t barrier = shared_address(arrived + step % 2);
        if (thread == 0) expect_bytes(barrier, sizeof(weights[0]));
        if (place < SHARES) {
          const uint32_t there = address_in(place, barrier);
          send(address_in(place, shared_address(to + weight_place(r0))), there, first * inverse0);
          send(address_in(place, shared_address(to + weight_place(r1))), there, second * inverse1);
        }
        wait<true>(barrier, parities >> step % 2 & 1);
        parities ^= 1u << step % 2;
      } else {
        if (has_rows && place == 0) {
          to[weight_place(r0)] = first * inverse0;
          to[weight_place(r1)] = second * inverse1;
        }
        __syncthreads();
      }
      float* const other = from;
      from = to;
      to = other;
    }

    // The sum is 1 up to rounding, which accumulates over the iterations.
    const float* scores = from;
    float total = 0;
    for (int i = lane; i < kRows; i += 32) total += scores[i];
    total = over_warp(total);
    if (thread < n && thread / kOwn == share)
      call.scores[int64_t{head} * n + thread] = scores[weight_place(thread)] / total;
  }
}

template <typename T, int TILES, int WARPS, int BLOCKS, bool HOPPER, int SHARES = 1>
cudaError_t launch_kernel(const Pagerank& call, cudaStream_t stream) {
  const auto kernel = pagerank_kernel<T, TILES, WARPS, BLOCKS, HOPPER, SHARES>;
  const int bytes = 16 * (WARPS + TILES) * (HOPPER ? kRowBytes : row_bytes(call.dim, sizeof(T)));
  cudaError_t error = allow_shared_memory(kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {.id = cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim = {SHARES, 1, 1};
  cudaLaunchConfig_t config = {.gridDim = SHARES,
                               .blockDim = 32 * WARPS,
                               .dynamicSmemBytes = static_cast<size_t>(bytes),
                               .stream = stream,
                               .attrs = &cluster,
                               .numAttrs = SHARES > 1 ? 1u : 0u};
  int resident = 0;  // heads computed at a time
  if constexpr (SHARES > 1) {
    error = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * WARPS, bytes);
    resident *= attribute(cudaDevAttrMultiProcessorCount);
  }
  if (error != cudaSuccess) return error;
  config.gridDim.x = SHARES * std::min(call.batch * call.heads, resident);
  return cudaLaunchKernelEx(&config, kernel, call);
}

// As many blocks as a processor has registers for.
template <typename T, int TILES, int BLOCKS, int ON_HOPPER = BLOCKS>
cudaError_t launch_tiles(const Pagerank& call, cudaStream_t stream) {
  // Thirteen tiles in sixteen warps would leave wgmma no registers beside the matrix.
  if constexpr (!std::is_same_v<T, float> && TILES <= 12)
    if (call.dim == 64 && attribute(cudaDevAttrComputeCapabilityMajor) == 9)
      return launch_kernel<T, TILES, (TILES + 3) / 4 * 4, ON_HOPPER, true>(call, stream);
  return launch_kernel<T, TILES, TILES, BLOCKS, false>(call, stream);
}

// Seventeen tiles are more than a block has registers for; two blocks of a cluster share them.
template <typename T>
cudaError_t launch_shared(const Pagerank& call, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>)
    if (call.dim == 64) return launch_kernel<T, 17, 12, 1, true, 2>(call, stream);
  return launch_kernel<T, 17, 9, 1, false, 2>(call, stream);
}

template <typename T>
cudaError_t launch(const Pagerank& call, cudaStream_t stream) {
  switch (tiles_for(call.nodes)) {
    case 4:
      return launch_tiles<T, 4, 4>(call, stream);
    case 6:
      return launch_tiles<T, 6, 2, 3>(call, stream);
    case 8:
      return launch_tiles<T, 8, 2>(call, stream);
    case 10:
      return launch_tiles<T, 10, 1>(call, stream);
    case 12:
      return launch_tiles<T, 12, 1>(call, stream);
    case 13:
      return launch_tiles<T, 13, 1>(call, stream);
    default:
      return launch_shared<T>(call, stream);
  }
}

}  // namespace

int shared_bytes(int nodes, int dim, Element type) {
  const int tiles = tiles_for(nodes), columns = 16 * tiles, rows = (tiles + 3) / 4 * 64;
  const int own = nodes > kMostInOneBlock ? (tiles + 1) / 2 * 16 : columns;
  const int bytes = row_bytes(dim, type == Element::kFloat ? 4 : 2);
  // Shared memory that the kernel declares itself is rounded up to a kilobyte.
  const auto declared = [](int numbers) { return (4 * numbers + 1023) / 1024 * 1024; };
  const int several = (own + columns) * bytes + declared((tiles + 5) * columns);
  const int once = (rows + columns) * bytes + declared(6 * columns + 2 * rows);
  return type == Element::kFloat ? several : std::max(several, once);
}

cudaError_t launch_pagerank(const Pagerank& call, Element type, cudaStream_t stream) {
  if (type == Element::kFloat) return launch<float>(call, stream);
  if (type == Element::kBFloat16) return launch<__nv_bfloat16>(call, stream);
  return launch<__half>(call, stream);
}

}  // namespace pcx
