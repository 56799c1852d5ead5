// The pipeline that the kernels of prefix_attention share: a ring of stages between producer warps,
// which copy, and consumer warps, which compute.
//
// A block stays on its processor and computes item after item. Producer warps run ahead, into the
// stages of the next item. Each group of four consumer warps has a tile of 64 rows, queries or
// keys. Its products run on the tensor cores while other groups compute. Images have k * k + 1
// tokens, and 64 divides k * k for many k. Up to 8 remaining rows therefore go to one more warp,
// whose products are transposed: 197 = 3 * 64 + 5.

#pragma once

#include <cmath>

#include "hopper.cuh"
#include "prefix_attention.h"

namespace pcx {

constexpr int kDim = 64;
constexpr int kStage = 64;  // rows of a stage
constexpr int kMaxStages = 8;
constexpr int kGroups = 3;                 // of 64 rows, at most, in a block
constexpr int kCopiers = 2;                // warps of a block, at most; more made no kernel faster
constexpr int kTail = 8;                   // rows, at most, of the warp of its own
constexpr int kHalf = kStage * kRowBytes;  // bytes of one of a stage's two tiles
constexpr int kSharedBytes = 224 * 1024;   // of a processor, that its blocks may take
constexpr int kStaticBytes = 6 * 1024;     // of that, at most, what a kernel declares itself
constexpr int kWarps = 2048 / 128;         // of a processor, with 128 registers a thread
constexpr int kMostBlocks = 4;             // of a processor
constexpr float kLn2 = 0.6931471805599453f;

inline int ceil_divide(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The plan by which `rows` rows of one head of one sample are cut.
struct Plan {
  int tiles;    // of 64 rows
  int tail;     // rows left over for the warp of its own, 0..8
  int blocks;   // that share the tiles; the last has the tail
  int groups;   // of a block, a tile each
  int copiers;  // warps of a block that copy
  int stages = 0;

  explicit Plan(int rows, int copiers = kCopiers) : copiers(copiers) {
    const int rest = rows % 64;
    tiles = rows / 64 + (rest > kTail);
    tail = rest > kTail ? 0 : rest;
    blocks = tiles ? ceil_divide(tiles, kGroups) : 1;
    groups = ceil_divide(tiles, blocks);
  }

  // The rows that a block has room for, its warps that compute, and all its threads.
  __host__ __device__ int slots() const { return groups * 64 + (tail ? kTail : 0); }
  __host__ __device__ int readers() const { return groups * 4 + (tail ? 1 : 0); }
  __host__ __device__ int threads() const { return 32 * (readers() + copiers); }
  int blocks_per_processor() const {  // by registers, and memory for a few stages each
    const int blocks = kWarps / (readers() + copiers);
    return blocks < kMostBlocks ? blocks : kMostBlocks;
  }

  // The row of a block's slot: its tiles come first, then the rows of the warp of its own.
  __device__ int row(int block, int slot) const {
    return slot < groups * 64 ? block * groups * 64 + slot : tiles * 64 + slot - groups * 64;
  }

  // The bytes that `store_rows` of all readers needs.
  int staging_bytes() const { return readers() * 16 * kRowBytes; }

  // Gives the stages all memory that a block has left beside `taken` bytes. Returns the total.
  int share_memory(int taken) {
    const int left = kSharedBytes / blocks_per_processor() - kStaticBytes - taken;
    stages = left / (2 * kHalf) < kMaxStages ? left / (2 * kHalf) : kMaxStages;
    return stages * 2 * kHalf + taken;
  }

  // The number of blocks that fill the current device.
  cudaError_t fill(int* room) const {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    *room = processors * blocks_per_processor();
    return error;
  }

  template <typename Kernel, typename Call>
  cudaError_t launch(Kernel kernel, const Call& call, int heads, int bytes, cudaStream_t stream) {
    if (stages < copiers) return cudaErrorInvalidConfiguration;  // else a parity could mislead one
    int room = 0;
    cudaError_t error = fill(&room);
    if (error == cudaSuccess)  // always the same: other threads launch the same kernel
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kSharedBytes - kStaticBytes);
    if (error != cudaSuccess) return error;
    const int64_t items = int64_t{heads} * blocks;
    kernel<<<static_cast<int>(items < room ? items : room), threads(), bytes, stream>>>(call,
                                                                                        *this);
    return cudaGetLastError();
  }
};

struct Rows {
  const char* first;
  int stride;  // bytes
};

// Copies the rows of a block, by one warp; `count` rows exist.
__device__ __forceinline__ void copy_held(uint32_t to, Rows rows, const Plan& plan, int block,
                                          int count, int lane) {
  const int slots = plan.slots();
  for (int slot = lane / 8; slot < slots; slot += 4) {
    const int row = plan.row(block, slot);
    const bool inside = row < count;
    copy_async(to + swizzled(slot, lane % 8),
               rows.first + int64_t{inside ? row : 0} * rows.stride + lane % 8 * 16, inside);
  }
}

// Copies one number for each of these rows.
__device__ __forceinline__ void copy_held_numbers(uint32_t to, const float* numbers,
                                                  const Plan& plan, int block, int count,
                                                  int lane) {
  const int slots = plan.slots();
  for (int slot = lane; slot < slots; slot += 32) {
    const int row = plan.row(block, slot);
    copy_number_async(to + slot * 4, numbers + (row < count ? row : 0), row < count);
  }
}

// Loads eight rows at `from` as the right factor of a warp's products over d.
__device__ __forceinline__ void load_right(uint32_t (&to)[kDim / 16][2], uint32_t from, int lane) {
#pragma unroll
  for (int j = 0; j < kDim / 16; j += 2) {
    uint32_t two[4];
    load_matrices(two, from + swizzled(lane % 8, 2 * j + lane / 8));
    to[j][0] = two[0], to[j][1] = two[1], to[j + 1][0] = two[2], to[j + 1][1] = two[3];
  }
}

// A place in the ring; producers and consumers each go around it at their own pace.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The ring as one warp goes around it: the stages, and for each stage a barrier that says that it
// is full and one that says that it is empty.
struct Ring {
  uint32_t stages, full, empty;
  int count, copiers;
  Turn turn;

  __device__ Ring(uint32_t stages, uint32_t barriers, const Plan& plan)
      : stages(stages),
        full(barriers),
        empty(barriers + 8 * kMaxStages),
        count(plan.stages),
        copiers(plan.copiers) {}

  // Called by one thread.
  __device__ __forceinline__ void make_barriers(int readers) const {
    for (int i = 0; i < count; ++i) {
      make_barrier(full + 8 * i, 32);
      make_barrier(empty + 8 * i, readers * kReleases);
    }
  }

  __device__ uint32_t stage() const { return stages + turn.stage * 2 * kHalf; }

  // Called by a copying warp: fills its own among the stages of rows `first` to `end`. `until_mine`
  // counts the stages of other warps until its next one, from item to item.
  template <typename Copy>
  __device__ __forceinline__ void fill(int first, int end, int& until_mine, Copy copy) {
    for (; first < end; first += kStage, turn.next(count)) {
      if (until_mine--) continue;
      until_mine = copiers - 1;
      wait(empty + 8 * turn.stage, turn.parity ^ 1);
      copy(first);
      arrive_after_copies(full + 8 * turn.stage);
    }
  }

  // Called by a reading warp: calls `use` for each stage with the number of rows that are left. On
  // return the warp's lanes are together.
  template <typename Use>
  __device__ __forceinline__ void read(int rows, int lane, Use use) {
    for (int left = rows; left > 0; left -= kStage, turn.next(count)) {
      wait(full + 8 * turn.stage, turn.parity);
      use(left);
      release(empty + 8 * turn.stage, lane);
    }
  }

  // Called by a reading warp that does not need the stages.
  __device__ __forceinline__ void pass(int rows, int lane) {
    read(rows, lane, [](int) {});
  }
};

// Scales up to 16 rows of a warp's accumulators and writes them to rows at `to`. They pass through
// 2 KB at `staging`, so that a row is written in whole pieces. With Turned it is up to 8 rows, from
// accumulators of d by rows.
template <typename T, bool Turned, int Tiles>
__device__ __forceinline__ void store_rows(const float (&from)[Tiles][4], const float (&scale)[2],
                                           char* to, int64_t pitch, int rows, char* staging,
                                           int lane) {
  static_assert(Tiles == (Turned ? kDim / 16 : kDim / 8));
  if constexpr (Turned) {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        *reinterpret_cast<uint16_t*>(staging + swizzled(lane % 4 * 2 + e % 2, 2 * n + e / 2) +
                                     lane / 4 * 2) =
            static_cast<uint16_t>(pack<T>(from[n][e] * scale[e % 2], 0.0f));
  } else {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<uint32_t*>(staging + swizzled(i * 8 + lane / 4, n) + lane % 4 * 4) =
            pack<T>(from[n][2 * i] * scale[i], from[n][2 * i + 1] * scale[i]);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < (Turned ? 8 : 16) * 8; i += 32)
    if (i / 8 < rows)
      *reinterpret_cast<int4*>(to + i / 8 * pitch + i % 8 * 16) =
          *reinterpret_cast<const int4*>(staging + swizzled(i / 8, i % 8));
  __syncwarp();
}

}  // namespace pcx
