// Adds two tensors and normalises the rows of the sum, in one pass over memory.
//
// A warp computes a row and keeps it in registers. Mean and variance are sums over the warp.

#include "layer_norm.h"
#include "rows.cuh"

namespace pcx {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// kFours: groups of four numbers that a lane keeps of its row.
template <int kFours>
__global__ void __launch_bounds__(kThreads) add_layer_norm_kernel(const AddLayerNorm call) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= call.rows) return;
  const int fours = call.dim / 4;
  const int64_t start = int64_t{row} * fours;
  float values[kFours][4], total = 0;
  read(values, call.x, start, fours);
  if (call.y.data) {
    float others[kFours][4];
    read(others, call.y, start, fours);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] += others[i][j];
      if (lane + 32 * i < fours) write(call.sum, call.x.type, start + lane + 32 * i, values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) total += values[i][j];
  const float mean = over_warp(total) / call.dim;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (lane + 32 * i < fours) squares += (values[i][j] - mean) * (values[i][j] - mean);
  const float inverse = rsqrtf(over_warp(squares) / call.dim + call.eps);
  float scale[kFours][4];
  if (call.weight.data) read(scale, call.weight, 0, fours);
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      values[i][j] = (values[i][j] - mean) * inverse * (call.weight.data ? scale[i][j] : 1);
  if (call.bias.data) {
    read(scale, call.bias, 0, fours);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] += scale[i][j];
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i)
    if (lane + 32 * i < fours) write(call.normed, call.type, start + lane + 32 * i, values[i]);
}

template <int kFours>
cudaError_t launch(const AddLayerNorm& call, cudaStream_t stream) {
  if constexpr (kFours > 1)
    if (call.dim <= 128 * (kFours / 2)) return launch<kFours / 2>(call, stream);
  const int blocks = (call.rows + kWarps - 1) / kWarps;
  if constexpr (kFours >= 4)  // 3 / 4 of the width: 384, 768, 1536
    if (call.dim <= 32 * 3 * kFours) {
      add_layer_norm_kernel<kFours * 3 / 4><<<blocks, kThreads, 0, stream>>>(call);
      return cudaGetLastError();
    }
  add_layer_norm_kernel<kFours><<<blocks, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_add_layer_norm(const AddLayerNorm& call, cudaStream_t stream) {
  return launch<kWidestNorm / 128>(call, stream);
}

}  // namespace pcx
