// The CUDA kernel of salient_linear, on raw pointers, so that it compiles without torch.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "rows.h"

namespace pcx {

constexpr int kMostChannels = 256;

struct SalientLinear {
  Rows x;    // [rows, dim], dense
  Rows y;    // [rows, dim], dense, added to x; or null
  void* to;  // [rows, dim], dense: the changed x + y; it may be x itself
  Element to_type;
  const int64_t* index;  // [count]
  Rows matrix, bias;     // [count, count] and [count], dense
  float scale;
  Element product;              // type in which the matrix product is computed
  Rows norm_weight, norm_bias;  // [dim], or null
  float eps;
  void* normed;  // [rows, dim], dense, or null
  Element normed_type;
  void* u;             // [rows, count] of the type `product`, or null
  float *mean, *rstd;  // [rows], or null
  int rows, dim, count;
  int processors;  // of the GPU
};

// Bytes of shared memory of a block.
int salient_bytes(int count, int dim, Element product);

cudaError_t launch_salient_linear(const SalientLinear& call, cudaStream_t stream);

}  // namespace pcx
