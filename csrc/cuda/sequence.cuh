// The sequence that kernels holding queries loop over: the prefix's keys and values, then the
// sample's own. It is copied row by row from where the two lie; they are never concatenated.

#pragma once

#include "ring.cuh"

namespace pcx {

// An item of work: one head of one sample, and one of the blocks that share it.
struct Item {
  int b, h, block, prefix, total;
  int64_t set;

  __device__ Item(const Attention& call, const Plan& plan, int index) {
    block = index % plan.blocks;
    h = index / plan.blocks % call.heads;
    b = index / plan.blocks / call.heads;
    set = b;
    if (call.index) set = min(max(call.index[b], int64_t{0}), int64_t{call.sets - 1});
    prefix = call.prefix;
    if (call.lengths)
      prefix = static_cast<int>(max(min(call.lengths[set], int64_t{prefix}), int64_t{0}));
    total = prefix + call.keys;
  }

  __device__ Rows rows(const void* tensor, const Strides& strides, int64_t batch) const {
    return {static_cast<const char*>(tensor) + 2 * (batch * strides.batch + h * strides.head),
            static_cast<int>(2 * strides.token)};
  }

  // The offset of this head's first row in [H, B, N].
  __device__ int64_t row(const Attention& call) const {
    return (int64_t{h} * call.batch + b) * call.queries;
  }

  // Writes a warp's rows, from `first` to below `limit`, to [B, N, H, d].
  template <typename T, bool Turned, int Tiles>
  __device__ __forceinline__ void store(const Attention& call, void* tensor,
                                        const float (&from)[Tiles][4], const float (&scale)[2],
                                        int first, int limit, char* staging, int lane) const {
    const int64_t pitch = int64_t{call.heads} * kRowBytes;
    char* const to =
        static_cast<char*>(tensor) + (int64_t{b} * call.queries + first) * pitch + h * kRowBytes;
    store_rows<T, Turned>(from, scale, to, pitch, limit - first, staging, lane);
  }
};

// The keys and values of an item.
struct Sequence {
  Rows prefix_k, prefix_v, own_k, own_v;

  __device__ Sequence(const Attention& call, const Item& item)
      : prefix_k(item.rows(call.prefix_k, call.prefix_k_strides, item.set)),
        prefix_v(item.rows(call.prefix_v, call.prefix_v_strides, item.set)),
        own_k(item.rows(call.k, call.k_strides, item.b)),
        own_v(item.rows(call.v, call.v_strides, item.b)) {}

  // Copies 64 keys from `first` and their values, by one warp.
  __device__ __forceinline__ void copy_stage(uint32_t to, int first, const Item& item,
                                             int lane) const {
    copy_half(to, prefix_k, own_k, first, item, lane);
    copy_half(to + kHalf, prefix_v, own_v, first, item, lane);
  }

 private:
  __device__ __forceinline__ static void copy_half(uint32_t to, Rows prefix_rows, Rows own_rows,
                                                   int first, const Item& item, int lane) {
    const int piece = lane % 8;
#pragma unroll 4
    for (int row = lane / 8; row < kStage; row += 4) {
      const int key = first + row;
      const bool shared = key < item.prefix, inside = key < item.total;
      const Rows rows = shared ? prefix_rows : own_rows;
      const int place = inside ? (shared ? key : key - item.prefix) : 0;
      copy_async(to + swizzled(row, piece), rows.first + int64_t{place} * rows.stride + piece * 16,
                 inside);
    }
  }
};

}  // namespace pcx
