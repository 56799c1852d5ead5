// The CUDA kernels of prefix_attention, on raw pointers, so that they compile without torch.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pcx {

// Strides in elements of [B, H, tokens, d] or [G, H, m, d], with d contiguous.
struct Strides {
  int64_t batch, head, token;
};

// The head dim is 64. Every row begins on a multiple of 16 bytes.
struct Attention {
  const void *q, *k, *v, *prefix_k, *prefix_v;
  const int64_t* index;    // [B], or null: sample b uses set b; stride 0 if all share one
  const int64_t* lengths;  // [G], or null: m for all
  Strides q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides;
  int batch, heads, queries, keys, prefix, sets;
  float scale;
  bool bfloat16;  // float16 otherwise
};

struct Forward {
  Attention inputs;
  void* out;   // [B, N, H, d] in memory
  float* lse;  // [H, B, N] in memory
};

struct QueryGradient {
  Attention inputs;
  const void *out, *grad_out;
  const float* lse;       // [H, B, N] in memory
  const float* grad_lse;  // or null
  Strides out_strides, grad_strides, grad_lse_strides;
  void* dq;      // [B, N, H, d] in memory
  float* delta;  // [H, B, N]: rowsum(dO * O) - dLSE
};

// The gradients of keys and values, computed item by item. Samples and their queries are folded
// into one axis of B * N rows. The keys of item i are used by rows_per_item rows, from row i *
// rows_per_item on. A sample's own keys are an item of N rows. A prefix is cut by the batch into
// items of more rows, which share its keys.
struct KeyGradients {
  const void *q, *grad_out, *keys, *values;
  const float *lse, *delta;            // [H, B * N]
  void *dk, *dv;                       // of equal strides; partial sums in float32 for a prefix
  Strides q_strides, grad_strides;     // of samples
  Strides key_strides, value_strides;  // of items, 0 if they share their keys
  Strides out_strides;                 // of items
  int items, heads, queries, count;    // count: keys of an item
  int rows, rows_per_item;             // B * N, and how many of them an item has
  float scale;
  bool bfloat16;
  bool partial;  // dk and dv are float32
};

// All launches run on the current device, of compute capability 9.0.
cudaError_t launch_forward(const Forward& call, cudaStream_t stream);
cudaError_t launch_query_gradient(const QueryGradient& call, cudaStream_t stream);
cudaError_t launch_key_gradients(const KeyGradients& call, cudaStream_t stream);

// The number of items to cut a prefix of m keys into, so that they fill the device once.
cudaError_t cut_prefix(int heads, int m, int rows, int* items);

// Sums parts [n, 2, count] in their order into 16-bit dk and dv [count]; count is a multiple of 4.
cudaError_t launch_sums(const float* parts, int n, int64_t count, void* dk, void* dv, bool bfloat16,
                        cudaStream_t stream);

}  // namespace pcx
