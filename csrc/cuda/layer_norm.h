// The CUDA kernel of add_layer_norm, on raw pointers, so that it compiles without torch.

#pragma once

#include <cuda_runtime_api.h>

#include "rows.h"

namespace pcx {

struct AddLayerNorm {
  Rows x, y;          // [rows, dim], dense; the sum has the type of x
  Rows weight, bias;  // [dim]
  void* sum;          // [rows, dim] of the type of x; null without y
  void* normed;       // [rows, dim]
  Element type;       // of normed
  float eps;
  int rows, dim;
};

cudaError_t launch_add_layer_norm(const AddLayerNorm& call, cudaStream_t stream);

}  // namespace pcx
