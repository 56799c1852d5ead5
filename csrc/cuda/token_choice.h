// The CUDA kernels that choose a pruning layer's tokens, on raw pointers, so that they compile
// without torch.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace pcx {

constexpr int kMostTokens = 1024, kMostHeads = 64;

struct Heads {
  const float* scores;  // [B, H, N], dense; each head sums to 1
  int count;            // H
  float low, high;      // bounds of the variance of N times the scores
};

struct Important {
  Heads heads;
  const int64_t* among;  // [B, N]: indices to return for the tokens; null for 0 to N - 1
  int64_t* out;          // [B, first_patch + keep], dense
  int64_t among_stride;  // of samples; tokens are dense
  int batch, tokens, first_patch, keep;
};

struct Dissimilar {
  Heads heads;
  const void* k;                              // [B, H, N, d]; rows dense, on multiples of 16 bytes
  int64_t* out;                               // [B, N - drop], dense
  int64_t k_strides[3];                       // elements: of samples, heads, tokens
  int batch, tokens, first_patch, drop, dim;  // dim is a multiple of 8
};

// Bytes of shared memory: requested by a block of dissimilar tokens, and a bound on the rest it
// has.
int choice_bytes(int tokens, int dim);
constexpr int kOtherBytes = 1024;

cudaError_t launch_important(const Important& call, cudaStream_t stream);
cudaError_t launch_dissimilar(const Dissimilar& call, Element type, cudaStream_t stream);

}  // namespace pcx
