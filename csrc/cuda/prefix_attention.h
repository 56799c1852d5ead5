// The CUDA kernels of prefix_attention, on raw pointers: kernels and torch compile apart.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pcx {

// Elements from one to the next, of [B, H, tokens, d] or [G, H, m, d] with d contiguous.
struct Strides {
  int64_t batch, head, token;
};

// Head dim 64; every row begins on a multiple of 16 bytes.
struct Forward {
  const void *q, *k, *v, *prefix_k, *prefix_v;
  void* out;               // [B, N, H, d] in memory
  float* lse;              // [H, B, N] in memory
  const int64_t* index;    // [B], or null: set b for sample b, stride 0 where all share one
  const int64_t* lengths;  // [G], or null: m for all
  Strides q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides;
  int batch, heads, queries, keys, prefix, sets;
  float scale;
  bool bfloat16;  // float16 otherwise
};

// On the current device, of compute capability 9.0.
cudaError_t launch_forward(const Forward& call, cudaStream_t stream);

}  // namespace pcx
