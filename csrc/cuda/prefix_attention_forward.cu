// The forward of prefix_attention on Hopper, head dim 64, 16 bits.
//
// The algorithm is FlashAttention-3 (arXiv:2407.08608) without its ping-pong, over the sequence of
// sequence.cuh. The keys left over by stages of 64 are computed in tiles of 16.
//
// A row's reference maximum moves only if it would grow by more than 2^kSlack. This is exact, since
// any reference gives the same quotient, and avoids most rescaling.

#include "sequence.cuh"

namespace pcx {
namespace {

constexpr float kSlack = 8.0f;
constexpr float kLowest = -1e30f;  // finite, so that nothing subtracts infinities

// The state of one warp's queries: 16 queries, a row of an accumulator's tile each, or with Turned
// 8 queries, a column each.
template <bool Turned>
struct State {
  float out[Turned ? kDim / 16 : kDim / 8][4];
  float top[2], sum[2];  // for the two queries that this lane's elements belong to

  __device__ State() : out{}, top{kLowest, kLowest}, sum{} {}

  __device__ static constexpr int query(int e) { return Turned ? e % 2 : e / 2; }
  __device__ static int key(int tile, int e, int lane) {
    return Turned ? tile * 16 + e / 2 * 8 + lane / 4 : tile * 8 + lane % 4 * 2 + e % 2;
  }

  // Reduces over the lanes that hold elements of the same query.
  template <typename Operation>
  __device__ __forceinline__ static float reduce(float x, Operation operation) {
#pragma unroll
    for (int step = Turned ? 4 : 1; step < (Turned ? 32 : 4); step *= 2)
      x = operation(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
  }

  // Turns the scores of keys below `left` into weights, two in a register.
  template <typename T, bool Masked, int Tiles>
  __device__ __forceinline__ void weigh(float (&scores)[Tiles][4], uint32_t (&weights)[Tiles][2],
                                        float factor, int left, int lane) {
    if (Masked) {
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (key(j, e, lane) >= left) scores[j][e] = -INFINITY;
    }
    float found[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < Tiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) found[query(e)] = fmaxf(found[query(e)], scores[j][e]);
    if (__any_sync(0xffffffff,
                   found[0] * factor > top[0] + kSlack || found[1] * factor > top[1] + kSlack)) {
      float decay[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float most = reduce(found[i], [](float x, float y) { return fmaxf(x, y); });
        const float moved = fmaxf(top[i], most * factor);
        decay[i] = power_of_2(top[i] - moved);
        top[i] = moved;
        sum[i] *= decay[i];
      }
      for (auto& tile : out)
#pragma unroll
        for (int e = 0; e < 4; ++e) tile[e] *= decay[query(e)];
    }
#pragma unroll
    for (int j = 0; j < Tiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float low = power_of_2(fmaf(scores[j][e], factor, -top[query(e)]));
        const float high = power_of_2(fmaf(scores[j][e + 1], factor, -top[query(e + 1)]));
        sum[query(e)] += low;
        sum[query(e + 1)] += high;
        weights[j][e / 2] = pack<T>(low, high);
      }
  }

  // Writes the rows from `first` to below `limit`.
  template <typename T>
  __device__ __forceinline__ void store(const Forward& call, const Item& item, int first, int limit,
                                        char* staging, int lane) {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float denominator = reduce(sum[i], [](float x, float y) { return x + y; });
      inverse[i] = 1.0f / denominator;
      const int row = Turned ? lane % 4 * 2 + i : i * 8 + lane / 4;
      if ((Turned ? lane / 4 : lane % 4) == 0 && first + row < limit)
        call.lse[item.row(call.inputs) + first + row] = (top[i] + log2f(denominator)) * kLn2;
    }
    item.template store<T, Turned>(call.inputs, call.out, out, inverse, first, limit, staging,
                                   lane);
  }
};

// Computes one stage for four warps' 64 queries; `left` of its 8 Tiles keys exist. The products are
// finished on return: leaving the second unfinished makes the compiler serialise all of them.
template <typename T, int Tiles, bool Masked>
__device__ __forceinline__ void attend(State<false>& state, const uint32_t (&q)[4][4],
                                       uint64_t keys, float factor, int left, int lane) {
  float scores[Tiles][4];
  begin_products();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) start_product<T, Tiles, 0>(scores, q[i], keys + i * 2, i > 0);
  commit_products();
  wait_for_products<0>();
  uint32_t weights[Tiles][2];
  state.template weigh<T, Masked, Tiles>(scores, weights, factor, left, lane);
  begin_products();
#pragma unroll
  for (int i = 0; i < Tiles / 2; ++i) {
    const uint32_t a[4] = {weights[2 * i][0], weights[2 * i][1], weights[2 * i + 1][0],
                           weights[2 * i + 1][1]};
    start_product<T, kDim / 8, 1>(state.out, a, keys + (kHalf + i * 16 * kRowBytes) / 16, true);
  }
  commit_products();
  wait_for_products<0>();
}

// Computes one stage for one warp's 8 queries, by transposed products: keys by queries, then d by
// queries. q holds the queries as the right factor.
template <typename T, bool Masked>
__device__ __forceinline__ void attend_turned(State<true>& state, const uint32_t (&q)[4][2],
                                              uint32_t keys, float factor, int left, int lane) {
  constexpr int kTiles = kStage / 16;
  float scores[kTiles][4] = {};
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      uint32_t k[4];
      load_matrices(k, keys + swizzled(j * 16 + lane % 16, 2 * i + lane / 16));
      multiply_add<T>(scores[j], k, q[i][0], q[i][1]);
    }
  uint32_t weights[kTiles][2];
  state.template weigh<T, Masked, kTiles>(scores, weights, factor, left, lane);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const uint32_t low = transposed(weights[j][0]), high = transposed(weights[j][1]);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t v[4];
      load_transposed(
          v, keys + kHalf + swizzled(j * 16 + lane / 16 * 8 + lane % 8, 2 * n + lane / 8 % 2));
      multiply_add<T>(state.out[n], v, low, high);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(512, 1) forward_kernel(const Forward call, const Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Attention& inputs = call.inputs;
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t barriers[2 * kMaxStages + 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slots = plan.slots(), readers = plan.readers();
  const int items = inputs.batch * inputs.heads * plan.blocks;
  const uint32_t stages = shared_address(memory);
  const uint32_t queries = stages + plan.stages * 2 * kHalf;
  Ring ring(stages, shared_address(barriers), plan);
  const uint32_t queries_full = ring.full + 16 * kMaxStages, queries_empty = queries_full + 8;
  if (threadIdx.x == 0) {
    ring.make_barriers(readers);
    make_barrier(queries_full, 32);
    make_barrier(queries_empty, readers * kReleases);
  }
  __syncthreads();

  uint32_t queries_parity = 0;
  if (warp >= readers) {  // copies its share of the stages
    int until_mine = warp - readers;
    for (int i = blockIdx.x; i < items; i += gridDim.x, queries_parity ^= 1) {
      const Item item(inputs, plan, i);
      const Sequence keys(inputs, item);
      if (warp == readers) {  // this warp alone, so that it sees every phase of the barrier
        const Rows q = item.rows(inputs.q, inputs.q_strides, item.b);
        wait(queries_empty, queries_parity ^ 1);
        copy_held(queries, q, plan, item.block, inputs.queries, lane);
        arrive_after_copies(queries_full);
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
  char* const staging =
      memory + plan.stages * 2 * kHalf + slots * kRowBytes + warp * 16 * kRowBytes;
  for (int i = blockIdx.x; i < items; i += gridDim.x, queries_parity ^= 1) {
    const Item item(inputs, plan, i);
    const int tile = item.block * plan.groups + warp / 4;
    const bool idle = turned ? item.block + 1 < plan.blocks : tile >= plan.tiles;
    wait(queries_full, queries_parity);
    if (idle) {
      release(queries_empty, lane);
      ring.pass(item.total, lane);
    } else if (turned) {
      uint32_t q[kDim / 16][2];
      load_right(q, queries + warp * 16 * kRowBytes, lane);
      __syncwarp();
      release(queries_empty, lane);
      State<true> state;
      ring.read(item.total, lane, [&](int left) {
        const uint32_t keys = ring.stage();
        if (left >= kStage)
          attend_turned<T, false>(state, q, keys, factor, left, lane);
        else
          attend_turned<T, true>(state, q, keys, factor, left, lane);
        __syncwarp();
      });
      state.template store<T>(call, item, plan.tiles * 64, inputs.queries, staging, lane);
    } else {
      uint32_t q[kDim / 16][4];
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j)
        load_matrices(q[j], queries + swizzled(warp * 16 + lane % 16, 2 * j + lane / 16));
      __syncwarp();
      release(queries_empty, lane);
      State<false> state;
      ring.read(item.total, lane, [&](int left) {
        const uint64_t keys = descriptor(ring.stage());
        see_copies();
        if (left >= kStage)
          attend<T, 8, false>(state, q, keys, factor, left, lane);
        else if (left > 48)
          attend<T, 8, true>(state, q, keys, factor, left, lane);
        else if (left > 32)
          attend<T, 6, true>(state, q, keys, factor, left, lane);
        else if (left > 16)
          attend<T, 4, true>(state, q, keys, factor, left, lane);
        else
          attend<T, 2, true>(state, q, keys, factor, left, lane);
      });
      state.template store<T>(call, item, tile * 64 + warp % 4 * 16,
                              min(inputs.queries, tile * 64 + 64), staging, lane);
    }
  }
#endif
}

template <typename T>
cudaError_t launch(const Forward& call, cudaStream_t stream) {
  Plan plan(call.inputs.queries);
  const int bytes = plan.share_memory(plan.slots() * kRowBytes + plan.staging_bytes());
  return plan.launch(forward_kernel<T>, call, call.inputs.batch * call.inputs.heads, bytes, stream);
}

}  // namespace

cudaError_t launch_forward(const Forward& call, cudaStream_t stream) {
  return call.inputs.bfloat16 ? launch<__nv_bfloat16>(call, stream) : launch<__half>(call, stream);
}

}  // namespace pcx
