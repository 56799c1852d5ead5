// The gradients of keys and values of prefix_attention on Hopper, head dim 64, 16 bits: for each
// key the sum over all rows of queries that use it.
//
// A block holds up to 200 keys and values in shared memory; those of samples lie beside those of
// its next item. The stages hold queries and output gradients. The first products are of keys by
// queries. Weights and slopes therefore come out in the layout of the left factors of the last
// products: dV = P^T dO, dK = dS^T Q.
//
// There are no atomics and the order of sums is fixed, so every run gives the same bits.

#include "ring.cuh"

namespace pcx {
namespace {

constexpr int kPart = 32;  // queries per step

// Places for keys and values. A block has one part of a prefix, which needs one place. It has
// several samples, and fetches the next one into a second place while it computes.
template <bool Partial>
constexpr int kPlaces = Partial ? 1 : 2;

// With one copying warp, three blocks fit a processor if one group holds all of a prefix.
inline Plan plan_of(int keys, bool partial) {
  return Plan(keys, partial && keys <= 64 ? 1 : kCopiers);
}

struct Item {
  int index, h, block, first, end;  // rows of the folded axis

  __device__ Item(const KeyGradients& call, const Plan& plan, int i) {
    block = i % plan.blocks;
    h = i / plan.blocks % call.heads;
    index = i / plan.blocks / call.heads;
    first = index * call.rows_per_item;
    end = min(first + call.rows_per_item, call.rows);
  }

  __device__ Rows rows(const void* tensor, const Strides& strides) const {
    return {static_cast<const char*>(tensor) + 2 * (index * strides.batch + h * strides.head),
            static_cast<int>(2 * strides.token)};
  }
};

// Copies 64 rows of queries and output gradients, and their LSE and delta, by one warp.
__device__ __forceinline__ void copy_stage(uint32_t to, uint32_t stats, const KeyGradients& call,
                                           const Item& item, int first, int lane) {
  const char* q = static_cast<const char*>(call.q) + 2 * item.h * call.q_strides.head;
  const char* g = static_cast<const char*>(call.grad_out) + 2 * item.h * call.grad_strides.head;
  const int piece = lane % 8;
  int b = (first + lane / 8) / call.queries, n = (first + lane / 8) % call.queries;
#pragma unroll 4
  for (int row = lane / 8; row < kStage; row += 4) {
    const bool inside = first + row < item.end;
    const int64_t at_b = inside ? b : 0, at_n = inside ? n : 0;
    copy_async(to + swizzled(row, piece),
               q + 2 * (at_b * call.q_strides.batch + at_n * call.q_strides.token) + piece * 16,
               inside);
    copy_async(
        to + kHalf + swizzled(row, piece),
        g + 2 * (at_b * call.grad_strides.batch + at_n * call.grad_strides.token) + piece * 16,
        inside);
    for (n += 4; n >= call.queries; n -= call.queries) ++b;
  }
  const int64_t row_of_head = int64_t{item.h} * call.rows;
#pragma unroll
  for (int row = lane; row < kStage; row += 32) {
    const bool inside = first + row < item.end;
    const int64_t at = row_of_head + (inside ? first + row : 0);
    copy_number_async(stats + row * 4, call.lse + at, inside);
    copy_number_async(stats + (kStage + row) * 4, call.delta + at, inside);
  }
}

// Weights and slopes from keys' scores with two queries and dP, rounded, two in a register.
template <typename T>
__device__ __forceinline__ void differentiate(const float (&scores)[4], const float (&inner)[4],
                                              const float (&lse)[4], const float (&delta)[4],
                                              float factor, uint32_t (&weights)[2],
                                              uint32_t (&slopes)[2]) {
  float p[4], s[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    p[e] = power_of_2(fmaf(scores[e], factor, -lse[e]));
    s[e] = p[e] * (inner[e] - delta[e]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] = pack<T>(p[2 * i], p[2 * i + 1]);
    slopes[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
}

// Computes 8 Tiles queries, kPart at most, from row `start` of a stage, for four warps' 64 keys.
template <typename T, int Tiles>
__device__ __forceinline__ void add_queries(float (&dk)[kDim / 8][4], float (&dv)[kDim / 8][4],
                                            uint64_t keys, uint64_t values, uint64_t queries,
                                            const float* stats, float factor, int lane) {
  constexpr int kTile = kHalf / 16;  // in descriptors
  float scores[Tiles][4], inner[Tiles][4];
  begin_products();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    start_product<T, Tiles, 0>(scores, keys + i * 2, queries + i * 2, i > 0);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    start_product<T, Tiles, 0>(inner, values + i * 2, queries + kTile + i * 2, i > 0);
  commit_products();
  wait_for_products<0>();
  uint32_t weights[Tiles][2], slopes[Tiles][2];
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    const float2 lse = *reinterpret_cast<const float2*>(stats + j * 8 + lane % 4 * 2);
    const float2 sums = *reinterpret_cast<const float2*>(stats + kStage + j * 8 + lane % 4 * 2);
    const float low = lse.x * kLog2E, high = lse.y * kLog2E;
    differentiate<T>(scores[j], inner[j], {low, high, low, high}, {sums.x, sums.y, sums.x, sums.y},
                     factor, weights[j], slopes[j]);
  }
  begin_products();
#pragma unroll
  for (int i = 0; i < Tiles / 2; ++i) {
    const uint64_t rows = queries + i * 16 * kRowBytes / 16;
    const uint32_t p[4] = {weights[2 * i][0], weights[2 * i][1], weights[2 * i + 1][0],
                           weights[2 * i + 1][1]};
    const uint32_t s[4] = {slopes[2 * i][0], slopes[2 * i][1], slopes[2 * i + 1][0],
                           slopes[2 * i + 1][1]};
    start_product<T, kDim / 8, 1>(dv, p, rows + kTile, true);
    start_product<T, kDim / 8, 1>(dk, s, rows, true);
  }
  commit_products();
  wait_for_products<0>();
}

// Computes 16 queries from row `start` of a stage for one warp's 8 keys, which k and v hold as
// right factors. The products are of queries by keys, then of d by keys.
template <typename T>
__device__ __forceinline__ void add_queries_turned(float (&dk)[kDim / 16][4],
                                                   float (&dv)[kDim / 16][4],
                                                   const uint32_t (&k)[4][2],
                                                   const uint32_t (&v)[4][2], uint32_t queries,
                                                   const float* stats, int start, float factor,
                                                   int lane) {
  float scores[4] = {}, inner[4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    uint32_t rows[4];
    const uint32_t at = swizzled(start + lane % 16, 2 * i + lane / 16);
    load_matrices(rows, queries + at);
    multiply_add<T>(scores, rows, k[i][0], k[i][1]);
    load_matrices(rows, queries + kHalf + at);
    multiply_add<T>(inner, rows, v[i][0], v[i][1]);
  }
  const float *lse = stats + start + lane / 4, *sums = lse + kStage;
  const float low = lse[0] * kLog2E, high = lse[8] * kLog2E;
  uint32_t weights[2], slopes[2];
  differentiate<T>(scores, inner, {low, low, high, high}, {sums[0], sums[0], sums[8], sums[8]},
                   factor, weights, slopes);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] = transposed(weights[i]);
    slopes[i] = transposed(slopes[i]);
  }
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
    uint32_t rows[4];
    const uint32_t at = swizzled(start + lane / 16 * 8 + lane % 8, 2 * n + lane / 8 % 2);
    load_transposed(rows, queries + kHalf + at);
    multiply_add<T>(dv[n], rows, weights[0], weights[1]);
    load_transposed(rows, queries + at);
    multiply_add<T>(dk[n], rows, slopes[0], slopes[1]);
  }
}

// Writes the rows of a warp's accumulators as float32.
template <bool Turned, int Tiles>
__device__ __forceinline__ void store_partial(const float (&from)[Tiles][4], float scale, float* to,
                                              int64_t pitch, int rows, int lane) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Turned) {
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e)
          if (lane % 4 * 2 + e % 2 < rows)
            to[(lane % 4 * 2 + e % 2) * pitch + n * 16 + i * 8 + lane / 4] = from[n][e] * scale;
      } else if (i * 8 + lane / 4 < rows) {
        *reinterpret_cast<float2*>(to + (i * 8 + lane / 4) * pitch + n * 8 + lane % 4 * 2) =
            make_float2(from[n][2 * i] * scale, from[n][2 * i + 1] * scale);
      }
    }
}

template <typename T, bool Partial, bool Turned, int Tiles>
__device__ __forceinline__ void store(const KeyGradients& call, const Item& item, void* tensor,
                                      const float (&from)[Tiles][4], float scale, int first,
                                      char* staging, int lane) {
  const Strides& strides = call.out_strides;
  const int64_t at = item.index * strides.batch + item.h * strides.head + first * strides.token;
  const int rows = call.count - first;
  if constexpr (Partial) {
    store_partial<Turned>(from, scale, static_cast<float*>(tensor) + at, strides.token, rows, lane);
  } else {
    store_rows<T, Turned>(from, {scale, scale}, static_cast<char*>(tensor) + 2 * at,
                          2 * strides.token, rows, staging, lane);
  }
}

template <typename T, bool Partial>
__global__ void __launch_bounds__(512, 1)
    key_gradients_kernel(const KeyGradients call, const Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t barriers[2 * kMaxStages + 4];
  __shared__ float stats[kMaxStages][2 * kStage];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int readers = plan.readers();
  const int items = call.items * call.heads * plan.blocks;
  const uint32_t stages = shared_address(memory);
  const uint32_t held = stages + plan.stages * 2 * kHalf;  // keys, then values, in each place
  const uint32_t held_bytes = plan.slots() * kRowBytes;
  Ring ring(stages, shared_address(barriers), plan);
  const uint32_t held_full = ring.full + 16 * kMaxStages, held_empty = held_full + 16;
  if (threadIdx.x == 0) {
    ring.make_barriers(readers);
    for (int i = 0; i < kPlaces<Partial>; ++i) {
      make_barrier(held_full + 8 * i, 32);
      make_barrier(held_empty + 8 * i, readers * kReleases);
    }
  }
  __syncthreads();

  Turn place;  // for keys and values
  if (warp >= readers) {
    int until_mine = warp - readers;
    for (int i = blockIdx.x; i < items; i += gridDim.x, place.next(kPlaces<Partial>)) {
      const Item item(call, plan, i);
      if (warp == readers) {  // this warp alone, so that it sees every phase of the barrier
        const Rows k = item.rows(call.keys, call.key_strides);
        const Rows v = item.rows(call.values, call.value_strides);
        const uint32_t to = held + place.stage * 2 * held_bytes;
        wait(held_empty + 8 * place.stage, place.parity ^ 1);
        copy_held(to, k, plan, item.block, call.count, lane);
        copy_held(to + held_bytes, v, plan, item.block, call.count, lane);
        arrive_after_copies(held_full + 8 * place.stage);
      }
      ring.fill(item.first, item.end, until_mine, [&](int first) {
        copy_stage(ring.stage(), shared_address(stats[ring.turn.stage]), call, item, first, lane);
      });
    }
    commit_copies();
    wait_for_copies<0>();
    return;
  }

  const float factor = call.scale * kLog2E;
  const bool turned = warp == plan.groups * 4;
  char* const staging =
      memory + plan.stages * 2 * kHalf + 2 * kPlaces<Partial> * held_bytes + warp * 16 * kRowBytes;
  for (int i = blockIdx.x; i < items; i += gridDim.x, place.next(kPlaces<Partial>)) {
    const Item item(call, plan, i);
    const int tile = item.block * plan.groups + warp / 4;
    const bool idle = turned ? item.block + 1 < plan.blocks : tile >= plan.tiles;
    const uint32_t keys_at = held + place.stage * 2 * held_bytes + warp / 4 * kHalf;
    wait(held_full + 8 * place.stage, place.parity);
    if (idle) {
      ring.pass(item.end - item.first, lane);
    } else if (turned) {
      uint32_t k[kDim / 16][2], v[kDim / 16][2];
      load_right(k, keys_at, lane);
      load_right(v, keys_at + held_bytes, lane);
      float dk[kDim / 16][4] = {}, dv[kDim / 16][4] = {};
      ring.read(item.end - item.first, lane, [&](int left) {
#pragma unroll
        for (int start = 0; start < kStage; start += 16)
          if (start < left)
            add_queries_turned<T>(dk, dv, k, v, ring.stage(), stats[ring.turn.stage], start, factor,
                                  lane);
        __syncwarp();
      });
      store<T, Partial, true>(call, item, call.dk, dk, call.scale, plan.tiles * 64, staging, lane);
      store<T, Partial, true>(call, item, call.dv, dv, 1.0f, plan.tiles * 64, staging, lane);
    } else {
      see_copies();
      const uint64_t keys = descriptor(keys_at), values = descriptor(keys_at + held_bytes);
      float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
      ring.read(item.end - item.first, lane, [&](int left) {
        const uint64_t queries = descriptor(ring.stage());
        see_copies();
        for (int start = 0; start < min(left, kStage); start += kPart) {
          const uint64_t part = queries + start * kRowBytes / 16;
          if (left - start > 16)
            add_queries<T, 4>(dk, dv, keys, values, part, stats[ring.turn.stage] + start, factor,
                              lane);
          else
            add_queries<T, 2>(dk, dv, keys, values, part, stats[ring.turn.stage] + start, factor,
                              lane);
        }
        __syncwarp();
      });
      const int first = tile * 64 + warp % 4 * 16;
      store<T, Partial, false>(call, item, call.dk, dk, call.scale, first, staging, lane);
      store<T, Partial, false>(call, item, call.dv, dv, 1.0f, first, staging, lane);
    }
    __syncwarp();
    release(held_empty + 8 * place.stage, lane);
  }
#endif
}

template <typename T, bool Partial>
cudaError_t launch(const KeyGradients& call, cudaStream_t stream) {
  Plan plan = plan_of(call.count, Partial);
  const int held = 2 * kPlaces<Partial> * plan.slots() * kRowBytes;
  const int bytes = plan.share_memory(held + (Partial ? 0 : plan.staging_bytes()));
  return plan.launch(key_gradients_kernel<T, Partial>, call, call.items * call.heads, bytes,
                     stream);
}

// Sums four neighbouring elements of dK, or of dV, by one thread.
template <typename T>
__global__ void sum_kernel(const float4* parts, int n, int64_t count, uint2* dk, uint2* dv) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= count) return;
  float4 sum = {};
#pragma unroll 8
  for (int i = 0; i < n; ++i) {
    const float4 part = parts[(2 * i + blockIdx.y) * count + at];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  (blockIdx.y ? dv : dk)[at] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
}

}  // namespace

cudaError_t cut_prefix(int heads, int m, int rows, int* items) {
  const Plan plan = plan_of(m, true);
  int room = 0;
  const cudaError_t error = plan.fill(&room);
  const int most = rows / 256 > 1 ? rows / 256 : 1, filling = room / (heads * plan.blocks);
  *items = filling < 1 ? 1 : filling < most ? filling : most;
  return error;
}

cudaError_t launch_sums(const float* parts, int n, int64_t count, void* dk, void* dv, bool bfloat16,
                        cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t fours = count / 4;
  const dim3 blocks(ceil_divide(fours, kThreads), 2);
  const auto kernel = bfloat16 ? sum_kernel<__nv_bfloat16> : sum_kernel<__half>;
  kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const float4*>(parts), n, fours,
                                          static_cast<uint2*>(dk), static_cast<uint2*>(dv));
  return cudaGetLastError();
}

cudaError_t launch_key_gradients(const KeyGradients& call, cudaStream_t stream) {
  if (call.bfloat16)
    return call.partial ? launch<__nv_bfloat16, true>(call, stream)
                        : launch<__nv_bfloat16, false>(call, stream);
  return call.partial ? launch<__half, true>(call, stream) : launch<__half, false>(call, stream);
}

}  // namespace pcx
