// The gradient of the queries of prefix_attention on Hopper, head dim 64, 16 bits, over the
// sequence of sequence.cuh. The kernel also computes delta = rowsum(dO * O) - dLSE, which the other
// gradients use.
//
// A block holds its queries and output gradients in shared memory, beside those of its next item.
// The tensor cores read them there as left factors. The first two products give dS, the weights
// times (dO V^T - delta), in the layout of the left factor of the last product: dQ = dS K.

#include "sequence.cuh"

namespace pcx {
namespace {

// The numbers of the two queries that a lane's elements of a tile belong to. A query is one of 16
// rows, or with Turned one of 8 columns.
struct Known {
  float lse[2];  // log2
  float delta[2];
};

// The sums over d of x * y for 8 rows of two tiles; lane i gets the sum of row i / 4.
template <typename T>
__device__ __forceinline__ float sums_of_products(const char* x, const char* y, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = swizzled(lane / 4, lane % 4 * 2 + i);
    const uint4 a = *reinterpret_cast<const uint4*>(x + at);
    const uint4 b = *reinterpret_cast<const uint4*>(y + at);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 l = unpack<T>(left[j]), r = unpack<T>(right[j]);
      sum = fmaf(l.x, r.x, fmaf(l.y, r.y, sum));
    }
  }
  sum += __shfl_xor_sync(0xffffffff, sum, 1);
  return sum + __shfl_xor_sync(0xffffffff, sum, 2);
}

// Computes and writes delta for a warp's rows, from `first` to below `limit`.
template <typename T, bool Turned>
__device__ __forceinline__ Known learn(const QueryGradient& call, const Item& item, int first,
                                       int limit, const char* out, const char* gradients,
                                       const float* lse, int lane) {
  float delta[2] = {};
#pragma unroll
  for (int i = 0; i < (Turned ? 1 : 2); ++i) {
    const int row = first + i * 8 + lane / 4, at = i * 8 * kRowBytes;
    delta[i] = sums_of_products<T>(out + at, gradients + at, lane);
    if (row < limit) {
      const Strides& strides = call.grad_lse_strides;
      if (call.grad_lse)
        delta[i] -=
            call.grad_lse[item.b * strides.batch + item.h * strides.head + row * strides.token];
      if (lane % 4 == 0) call.delta[item.row(call.inputs) + row] = delta[i];
    }
  }
  Known known;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = Turned ? lane % 4 * 2 + i : i * 8 + lane / 4;
    known.lse[i] = lse[row] * kLog2E;
    known.delta[i] = Turned ? __shfl_sync(0xffffffff, delta[0], row * 4) : delta[i];
  }
  return known;
}

// Computes one stage for four warps' 64 queries; `left` of its 8 Tiles keys exist.
template <typename T, int Tiles, bool Masked>
__device__ __forceinline__ void add_keys(float (&dq)[kDim / 8][4], const Known& known,
                                         uint64_t queries, uint64_t gradients, uint64_t keys,
                                         float factor, int left, int lane) {
  float scores[Tiles][4], inner[Tiles][4];
  begin_products();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    start_product<T, Tiles, 0>(scores, queries + i * 2, keys + i * 2, i > 0);
  commit_products();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    start_product<T, Tiles, 0>(inner, gradients + i * 2, keys + kHalf / 16 + i * 2, i > 0);
  commit_products();
  wait_for_products<1>();
#pragma unroll
  for (int j = 0; j < Tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[j][e] = power_of_2(fmaf(scores[j][e], factor, -known.lse[e / 2]));
      if (Masked && j * 8 + lane % 4 * 2 + e % 2 >= left) scores[j][e] = 0.0f;
    }
  wait_for_products<0>();
  uint32_t slopes[Tiles][2];
#pragma unroll
  for (int j = 0; j < Tiles; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      slopes[j][i] = pack<T>(scores[j][2 * i] * (inner[j][2 * i] - known.delta[i]),
                             scores[j][2 * i + 1] * (inner[j][2 * i + 1] - known.delta[i]));
  begin_products();
#pragma unroll
  for (int i = 0; i < Tiles / 2; ++i) {
    const uint32_t a[4] = {slopes[2 * i][0], slopes[2 * i][1], slopes[2 * i + 1][0],
                           slopes[2 * i + 1][1]};
    start_product<T, kDim / 8, 1>(dq, a, keys + i * 16 * kRowBytes / 16, true);
  }
  commit_products();
  wait_for_products<0>();
}

// Computes 16 keys from row `start` of a stage, of which `left` exist, for one warp's 8 queries. q
// and g hold the queries and their gradients as right factors. The products are of keys by queries,
// then of d by queries.
template <typename T>
__device__ __forceinline__ void add_keys_turned(float (&dq)[kDim / 16][4], const Known& known,
                                                const uint32_t (&q)[4][2],
                                                const uint32_t (&g)[4][2], uint32_t keys, int start,
                                                float factor, int left, int lane) {
  float scores[4] = {}, inner[4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    uint32_t rows[4];
    const uint32_t at = swizzled(start + lane % 16, 2 * i + lane / 16);
    load_matrices(rows, keys + at);
    multiply_add<T>(scores, rows, q[i][0], q[i][1]);
    load_matrices(rows, keys + kHalf + at);
    multiply_add<T>(inner, rows, g[i][0], g[i][1]);
  }
  float slopes[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float weight = power_of_2(fmaf(scores[e], factor, -known.lse[e % 2]));
    const bool inside = e / 2 * 8 + lane / 4 < left;
    slopes[e] = inside ? weight * (inner[e] - known.delta[e % 2]) : 0.0f;
  }
  const uint32_t low = transposed(pack<T>(slopes[0], slopes[1]));
  const uint32_t high = transposed(pack<T>(slopes[2], slopes[3]));
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
    uint32_t rows[4];
    load_transposed(rows, keys + swizzled(start + lane / 16 * 8 + lane % 8, 2 * n + lane / 8 % 2));
    multiply_add<T>(dq[n], rows, low, high);
  }
}

template <typename T>
__global__ void __launch_bounds__(512, 1)
    query_gradient_kernel(const QueryGradient call, const Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t barriers[2 * kMaxStages + 5];
  __shared__ float lse[2][kGroups * 64 + kTail];
  const Attention& inputs = call.inputs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int readers = plan.readers();
  const int items = inputs.batch * inputs.heads * plan.blocks;
  const uint32_t stages = shared_address(memory);
  const int held_bytes = plan.slots() * kRowBytes;
  const int held = plan.stages * 2 * kHalf;  // queries, then output gradients, twice; outputs
  const int out = held + 4 * held_bytes;
  Ring ring(stages, shared_address(barriers), plan);
  const uint32_t held_full = ring.full + 16 * kMaxStages, held_empty = held_full + 16;
  const uint32_t out_empty = held_empty + 16;
  if (threadIdx.x == 0) {
    ring.make_barriers(readers);
    for (int i = 0; i < 2; ++i) {
      make_barrier(held_full + 8 * i, 32);
      make_barrier(held_empty + 8 * i, readers * kReleases);
    }
    make_barrier(out_empty, readers * kReleases);
  }
  __syncthreads();

  Turn place;  // of the two places for queries and output gradients
  if (warp >= readers) {
    int until_mine = warp - readers;
    uint32_t out_parity = 0;
    for (int i = blockIdx.x; i < items; i += gridDim.x, place.next(2), out_parity ^= 1) {
      const Item item(inputs, plan, i);
      const Sequence keys(inputs, item);
      if (warp == readers) {  // this warp alone, so that it sees every phase of the barriers
        const uint32_t to = stages + held + place.stage * 2 * held_bytes;
        wait(held_empty + 8 * place.stage, place.parity ^ 1);
        copy_held(to, item.rows(inputs.q, inputs.q_strides, item.b), plan, item.block,
                  inputs.queries, lane);
        copy_held(to + held_bytes, item.rows(call.grad_out, call.grad_strides, item.b), plan,
                  item.block, inputs.queries, lane);
        copy_held_numbers(shared_address(lse[place.stage]), call.lse + item.row(inputs), plan,
                          item.block, inputs.queries, lane);
        wait(out_empty, out_parity ^ 1);
        copy_held(stages + out, item.rows(call.out, call.out_strides, item.b), plan, item.block,
                  inputs.queries, lane);
        arrive_after_copies(held_full + 8 * place.stage);
      }
      ring.fill(0, item.total, until_mine,
                [&](int first) { keys.copy_stage(ring.stage(), first, item, lane); });
    }
    commit_copies();
    wait_for_copies<0>();
    return;
  }

  const float factor = inputs.scale * kLog2E;
  const bool turned = warp == plan.groups * 4;
  const int mine = warp * 16 * kRowBytes;
  char* const staging = memory + out + held_bytes + mine;
  for (int i = blockIdx.x; i < items; i += gridDim.x, place.next(2)) {
    const Item item(inputs, plan, i);
    const int tile = item.block * plan.groups + warp / 4;
    const bool idle = turned ? item.block + 1 < plan.blocks : tile >= plan.tiles;
    const int first = turned ? plan.tiles * 64 : tile * 64 + warp % 4 * 16;
    const int limit = turned ? inputs.queries : min(inputs.queries, tile * 64 + 64);
    const int queries_at = held + place.stage * 2 * held_bytes;
    const char* const gradients = memory + queries_at + held_bytes + mine;
    wait(held_full + 8 * place.stage, place.parity);
    if (idle) {
      release(out_empty, lane);
      ring.pass(item.total, lane);
    } else if (turned) {
      const Known known = learn<T, true>(call, item, first, limit, memory + out + mine, gradients,
                                         lse[place.stage] + warp * 16, lane);
      __syncwarp();
      release(out_empty, lane);
      uint32_t q[kDim / 16][2], g[kDim / 16][2];
      load_right(q, stages + queries_at + mine, lane);
      load_right(g, stages + queries_at + held_bytes + mine, lane);
      float dq[kDim / 16][4] = {};
      ring.read(item.total, lane, [&](int left) {
#pragma unroll
        for (int start = 0; start < kStage; start += 16)
          if (start < left)
            add_keys_turned<T>(dq, known, q, g, ring.stage(), start, factor, left - start, lane);
        __syncwarp();
      });
      item.template store<T, true>(inputs, call.dq, dq, {inputs.scale, inputs.scale}, first, limit,
                                   staging, lane);
    } else {
      const Known known = learn<T, false>(call, item, first, limit, memory + out + mine, gradients,
                                          lse[place.stage] + warp * 16, lane);
      __syncwarp();
      release(out_empty, lane);
      see_copies();
      const uint64_t q = descriptor(stages + queries_at + warp / 4 * kHalf);
      const uint64_t g = descriptor(stages + queries_at + held_bytes + warp / 4 * kHalf);
      float dq[kDim / 8][4] = {};
      ring.read(item.total, lane, [&](int left) {
        const uint64_t keys = descriptor(ring.stage());
        see_copies();
        if (left >= kStage)
          add_keys<T, 8, false>(dq, known, q, g, keys, factor, left, lane);
        else if (left > 48)
          add_keys<T, 8, true>(dq, known, q, g, keys, factor, left, lane);
        else if (left > 32)
          add_keys<T, 6, true>(dq, known, q, g, keys, factor, left, lane);
        else if (left > 16)
          add_keys<T, 4, true>(dq, known, q, g, keys, factor, left, lane);
        else
          add_keys<T, 2, true>(dq, known, q, g, keys, factor, left, lane);
      });
      item.template store<T, false>(inputs, call.dq, dq, {inputs.scale, inputs.scale}, first, limit,
                                    staging, lane);
    }
    __syncwarp();
    release(held_empty + 8 * place.stage, lane);
  }
#endif
}

template <typename T>
cudaError_t launch(const QueryGradient& call, cudaStream_t stream) {
  Plan plan(call.inputs.queries);
  const int bytes = plan.share_memory(5 * plan.slots() * kRowBytes + plan.staging_bytes());
  return plan.launch(query_gradient_kernel<T>, call, call.inputs.batch * call.inputs.heads, bytes,
                     stream);
}

}  // namespace

cudaError_t launch_query_gradient(const QueryGradient& call, cudaStream_t stream) {
  return call.inputs.bfloat16 ? launch<__nv_bfloat16>(call, stream) : launch<__half>(call, stream);
}

}  // namespace pcx
