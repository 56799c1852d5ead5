// The CUDA kernels of weighted_pagerank, on raw pointers, so that they compile without torch.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace pcx {

// The most nodes whose attention matrix fits the registers of one block, and of a cluster of two
// blocks on Hopper. One iteration in 16 bits holds only some rows of the matrix at a time.
constexpr int kMostInOneBlock = 208, kMostNodes = 272;

struct Pagerank {
  const void *q, *k;     // [B, H, N, d]; rows dense, on multiples of 16 bytes
  const float* init;     // [B, H, n], of sum 1
  const int64_t* among;  // [B, n]: the tokens that are the graph's n nodes; null for all
  float* scores;         // [B, H, n], dense
  int64_t q_strides[3], k_strides[3], init_strides[3];  // elements: of samples, heads, tokens
  int64_t among_stride;                                 // of samples; tokens are dense
  int batch, heads, tokens, nodes, dim;                 // N, n; dim is a multiple of 8
  int iters;                                            // at least 1
  float scale;                                          // above 0
};

// The number of tiles of 16 nodes that a kernel for so many nodes holds.
constexpr int tiles_for(int nodes) {
  return nodes <= 64    ? 4
         : nodes <= 96  ? 6
         : nodes <= 128 ? 8
         : nodes <= 160 ? 10
         : nodes <= 192 ? 12
         : nodes <= 208 ? 13
                        : 17;
}

// The fewest nodes for which a kernel of so many tiles is chosen.
constexpr int fewest_nodes(int tiles) {
  int nodes = 1;
  while (tiles_for(nodes) != tiles) ++nodes;
  return nodes;
}

// The most shared memory, in bytes, that a block of the kernels without wgmma needs.
int shared_bytes(int nodes, int dim, Element type);

cudaError_t launch_pagerank(const Pagerank& call, Element type, cudaStream_t stream);

// The same for iters = 1 and a type of 16 bits.
cudaError_t launch_pagerank_once(const Pagerank& call, Element type, cudaStream_t stream);

}  // namespace pcx
