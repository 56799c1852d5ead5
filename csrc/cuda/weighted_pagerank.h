// The CUDA kernel of weighted_pagerank, on raw pointers: kernels and torch compile apart.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pcx {

constexpr int kMostTokens = 208;  // whose attention matrix lies in the registers of one block

struct Pagerank {
  const void *q, *k;  // [B, H, N, d]; rows dense, on multiples of 16 bytes
  const float* init;  // [B, H, N], of sum 1
  float* scores;      // [B, H, N], dense
  int64_t q_strides[3], k_strides[3], init_strides[3];  // elements: of samples, heads, tokens
  int batch, heads, tokens, dim;                        // dim is a multiple of 8
  int iters;                                            // at least 1
  float scale;
};

enum class Element { kFloat, kBFloat16, kHalf };

// Of shared memory, that a block takes.
int shared_bytes(int tokens, int dim, Element type);

cudaError_t launch_pagerank(const Pagerank& call, Element type, cudaStream_t stream);

}  // namespace pcx
