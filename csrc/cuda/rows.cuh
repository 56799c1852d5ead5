// Rows of numbers that a warp keeps in registers: a lane has every 32nd group of four.
//
// Types are known at run time: all threads take the same branch, and memory is what limits the
// kernels.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "rows.h"

namespace pcx {

template <typename T>
__device__ __forceinline__ void read_pairs(float (&to)[4], const uint2 raw);

template <>
__device__ __forceinline__ void read_pairs<__nv_bfloat16>(float (&to)[4], const uint2 raw) {
  to[0] = __uint_as_float(raw.x << 16), to[1] = __uint_as_float(raw.x & 0xffff0000u);
  to[2] = __uint_as_float(raw.y << 16), to[3] = __uint_as_float(raw.y & 0xffff0000u);
}

template <>
__device__ __forceinline__ void read_pairs<__half>(float (&to)[4], const uint2 raw) {
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

// A lane's numbers of a row, whose first group of four is at `start`. Groups beyond the row are 0.
// The type is asked for once, so that all loads are on their way before the first is needed.
template <int kFours>
__device__ __forceinline__ void read(float (&to)[kFours][4], const Rows& from, int64_t start,
                                     int fours) {
  const int lane = threadIdx.x % 32;
  if (from.type == Element::kFloat) {
    const float4* data = static_cast<const float4*>(from.data) + start;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 four = lane + 32 * i < fours ? data[lane + 32 * i] : make_float4(0, 0, 0, 0);
      to[i][0] = four.x, to[i][1] = four.y, to[i][2] = four.z, to[i][3] = four.w;
    }
    return;
  }
  const uint2* data = static_cast<const uint2*>(from.data) + start;
  uint2 raw[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i)
    raw[i] = lane + 32 * i < fours ? data[lane + 32 * i] : make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < kFours; ++i)
    if (from.type == Element::kBFloat16)
      read_pairs<__nv_bfloat16>(to[i], raw[i]);
    else
      read_pairs<__half>(to[i], raw[i]);
}

// Writes four numbers, and leaves in `of` what was written: they are rounded to the type.
__device__ __forceinline__ void write(void* to, Element type, int64_t at, float (&of)[4]) {
  if (type == Element::kFloat) {
    static_cast<float4*>(to)[at] = make_float4(of[0], of[1], of[2], of[3]);
  } else if (type == Element::kBFloat16) {
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(of[0], of[1]),
                               __floats2bfloat162_rn(of[2], of[3])};
    const uint2 raw = *reinterpret_cast<const uint2*>(pairs);
    static_cast<uint2*>(to)[at] = raw;
    read_pairs<__nv_bfloat16>(of, raw);
  } else {
    __half2 pairs[2] = {__floats2half2_rn(of[0], of[1]), __floats2half2_rn(of[2], of[3])};
    const uint2 raw = *reinterpret_cast<const uint2*>(pairs);
    static_cast<uint2*>(to)[at] = raw;
    read_pairs<__half>(of, raw);
  }
}

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  return x;
}

}  // namespace pcx
