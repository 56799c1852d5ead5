// A linear map among a few channels of rows, or of the sums of rows, and the LayerNorm behind it.
//
// A block keeps the matrix in shared memory and computes one group of rows after another. A warp
// holds a row of the group in registers from its read to its write, so that x crosses memory once
// each way. The channels go through shared memory: u to the product, and what is added from it.
// Each column knows its place among the channels, so that no row is gathered from memory.

#include <type_traits>

#include "rows.cuh"
#include "salient_linear.h"
#include "tiles.cuh"

namespace pcx {
namespace {

constexpr int kRows = 16, kThreads = 32 * kRows;  // of a group, a warp each; small calls take half

// Where a block's shared memory holds what, in bytes. Offsets are multiples of 16.
struct Layout {
  int padded;   // channels, up to a multiple of 16
  int u;        // [kRows, padded + 8] in 16 bits, [count, kRows] in float
  int delta;    // [kRows, padded + 4] float
  int matrix;   // [padded, padded + 8] in 16 bits, its transpose [count, count | 1] in float
  int bias;     // [padded] float
  int place;    // [dim] int16_t: a column's place among the channels, or -1
  int u_bytes;  // of u
  int bytes;

  __host__ __device__ Layout(int count, int dim, bool wide) {
    padded = (count + 15) / 16 * 16;
    u = 0;
    u_bytes = wide ? 4 * kRows * count : 2 * kRows * (padded + 8);
    delta = u + u_bytes;
    matrix = delta + 4 * kRows * (padded + 4);
    const int numbers = wide ? 4 * count * (count | 1) : 2 * padded * (padded + 8);
    bias = matrix + (numbers + 15) / 16 * 16;
    place = bias + 4 * padded;
    bytes = place + (2 * dim + 15) / 16 * 16;
  }
};

__device__ __forceinline__ float rounded(float x, Element type) {
  if (type == Element::kBFloat16) return __bfloat162float(__float2bfloat16_rn(x));
  if (type == Element::kHalf) return __half2float(__float2half_rn(x));
  return x;
}

template <typename T>
__device__ __forceinline__ T number_of(float x);
template <>
__device__ __forceinline__ float number_of<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 number_of<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half number_of<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ float number(const Rows& from, int at) {
  if (from.type == Element::kFloat) return static_cast<const float*>(from.data)[at];
  if (from.type == Element::kBFloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(from.data)[at]);
  return __half2float(static_cast<const __half*>(from.data)[at]);
}

// Four numbers from `at`, of which `left` are there; others are 0. `dense`: all or none are there,
// and they begin on a multiple of their size.
__device__ __forceinline__ void read_four(float (&to)[4], const Rows& from, int at, int left,
                                          bool dense) {
  to[0] = to[1] = to[2] = to[3] = 0;
  if (left <= 0) return;
  if (!dense) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) to[i] = number(from, at + i);
  } else if (from.type == Element::kFloat) {
    const float4 four = static_cast<const float4*>(from.data)[at / 4];
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else if (from.type == Element::kBFloat16) {
    read_pairs<__nv_bfloat16>(to, static_cast<const uint2*>(from.data)[at / 4]);
  } else {
    read_pairs<__half>(to, static_cast<const uint2*>(from.data)[at / 4]);
  }
}

template <typename T>
struct Block {
  static constexpr bool kWide = std::is_same_v<T, float>;
  const SalientLinear& call;
  const Layout layout;
  T *u, *matrix;
  float *delta, *bias;
  int16_t* place;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  __device__ Block(const SalientLinear& call, unsigned char* memory)
      : call(call),
        layout(call.count, call.dim, kWide),
        u(reinterpret_cast<T*>(memory + layout.u)),
        matrix(reinterpret_cast<T*>(memory + layout.matrix)),
        delta(reinterpret_cast<float*>(memory + layout.delta)),
        bias(reinterpret_cast<float*>(memory + layout.bias)),
        place(reinterpret_cast<int16_t*>(memory + layout.place)) {}

  // Reads the matrix, the bias and the index, and zeroes what pads u and the matrix.
  __device__ __forceinline__ void set_up() {
    for (int i = threadIdx.x; i < layout.u_bytes / 4; i += blockDim.x)
      reinterpret_cast<uint32_t*>(u)[i] = 0;
    for (int i = threadIdx.x; i < call.dim; i += blockDim.x) place[i] = -1;
    for (int i = threadIdx.x; i < layout.padded; i += blockDim.x)
      bias[i] = i < call.count ? rounded(number(call.bias, i), call.product) : 0;
    const bool dense = call.count % 4 == 0;
    const int stride = layout.padded + 8;
#pragma unroll 4
    for (int j = warp; j < layout.padded; j += warps)
      for (int k = 4 * lane; k < layout.padded; k += 128) {
        float four[4];
        read_four(four, call.matrix, j * call.count + k, j < call.count ? call.count - k : 0,
                  dense);
        if constexpr (kWide) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (j < call.count && k + i < call.count)
              matrix[(k + i) * (call.count | 1) + j] = four[i];
        } else {
          *reinterpret_cast<uint2*>(matrix + j * stride + k) =
              make_uint2(pack<T>(four[0], four[1]), pack<T>(four[2], four[3]));
        }
      }
    __syncthreads();
    for (int k = threadIdx.x; k < call.count; k += blockDim.x) {
      const int64_t column = call.index[k];
      if (column >= 0 && column < call.dim) place[column] = static_cast<int16_t>(k);
    }
    __syncthreads();
  }

  __device__ __forceinline__ T& u_at(int row, int channel) const {
    return kWide ? u[channel * kRows + row] : u[row * (layout.padded + 8) + channel];
  }

  __device__ __forceinline__ float& delta_at(int row, int channel) const {
    return delta[row * (layout.padded + 4) + channel];
  }

  // The places of the four columns of a lane's group.
  __device__ __forceinline__ short4 places(int four) const {
    return reinterpret_cast<const short4*>(place)[four];
  }

  // delta = scale * (u W^T + b) of the group, one warp for 16 channels of all rows.
  __device__ __forceinline__ void multiply_narrow() const {
    const int stride = layout.padded + 8;
    const T* factor = matrix + lane % 16 * stride + lane / 16 * 8;
    const T* rows = u + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
    for (int first = 16 * warp; first < layout.padded; first += 16 * warps) {
      float sums[2][4] = {};  // of rows 0 to 7 and 8 to 15
#pragma unroll 2
      for (int k = 0; k < layout.padded; k += 16) {
        uint32_t a[4], b[4];
        load_matrices(a, shared_address(factor + first * stride + k));
        load_matrices(b, shared_address(rows + k));
        multiply_add<T>(sums[0], a, b[0], b[1]);
        multiply_add<T>(sums[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int channel = first + lane / 4 + i / 2 * 8, row = 8 * half + lane % 4 * 2 + i % 2;
          delta_at(row, channel) = (sums[half][i] + bias[channel]) * call.scale;
        }
    }
  }

  // The same in float: one warp for 32 channels of 4 rows.
  __device__ __forceinline__ void multiply_wide() const {
    const int fours = warps / 4, stride = call.count | 1;
    for (int task = warp; task < (call.count + 31) / 32 * fours; task += warps) {
      const int channel = task / fours * 32 + lane, row = task % fours * 4;
      const T* factor = matrix + min(channel, call.count - 1);
      float sums[4] = {};
      for (int k = 0; k < call.count; ++k) {
        const float4 four = *reinterpret_cast<const float4*>(u + k * kRows + row);
        const float by = factor[k * stride];
        sums[0] += four.x * by, sums[1] += four.y * by;
        sums[2] += four.z * by, sums[3] += four.w * by;
      }
      if (channel < call.count)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          delta_at(row + i, channel) = (sums[i] + bias[channel]) * call.scale;
    }
  }
};

template <int kFours>
__device__ __forceinline__ void normalise(const SalientLinear& call, float (&values)[kFours][4],
                                          int row) {
  const int lane = threadIdx.x % 32, fours = call.dim / 4;
  float total = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) total += values[i][j];
  const float mean = over_warp(total) / call.dim;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (lane + 32 * i < fours) squares += (values[i][j] - mean) * (values[i][j] - mean);
  const float inverse = rsqrtf(over_warp(squares) / call.dim + call.eps);
  if (call.mean && lane == 0) call.mean[row] = mean, call.rstd[row] = inverse;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) values[i][j] = (values[i][j] - mean) * inverse;
  float affine[kFours][4];
  if (call.norm_weight.data) {
    read(affine, call.norm_weight, 0, fours);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] *= affine[i][j];
  }
  if (call.norm_bias.data) {
    read(affine, call.norm_bias, 0, fours);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] += affine[i][j];
  }
  const int64_t start = int64_t{row} * fours;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
    if (lane + 32 * i < fours)
      write(call.normed, call.normed_type, start + lane + 32 * i, values[i]);
}

// kFours: groups of four numbers that a lane keeps of its row.
template <typename T, int kFours>
__global__ void __launch_bounds__(kThreads, kFours <= 6 ? 2 : 1)
    salient_linear_kernel(const SalientLinear call) {
  extern __shared__ __align__(16) unsigned char memory[];
  Block<T> block(call, memory);
  const int lane = block.lane, fours = call.dim / 4, rows = block.warps;
  block.set_up();
  for (int first = blockIdx.x * rows; first < call.rows; first += gridDim.x * rows) {
    const int row = first + block.warp;
    const int64_t start = int64_t{row} * fours;
    float values[kFours][4];
    if (row < call.rows) {
      read(values, call.x, start, fours);
      if (call.y.data) {
        float others[kFours][4];
        read(others, call.y, start, fours);
#pragma unroll
        for (int i = 0; i < kFours; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            values[i][j] = rounded(values[i][j] + others[i][j], call.to_type);
      }
#pragma unroll
      for (int i = 0; i < kFours; ++i)
        if (lane + 32 * i < fours) {
          const short4 at = block.places(lane + 32 * i);
          if (at.x >= 0) block.u_at(block.warp, at.x) = number_of<T>(values[i][0]);
          if (at.y >= 0) block.u_at(block.warp, at.y) = number_of<T>(values[i][1]);
          if (at.z >= 0) block.u_at(block.warp, at.z) = number_of<T>(values[i][2]);
          if (at.w >= 0) block.u_at(block.warp, at.w) = number_of<T>(values[i][3]);
        }
    }
    __syncthreads();
    if (call.u && row < call.rows)
      for (int k = lane; k < call.count; k += 32)
        static_cast<T*>(call.u)[int64_t{row} * call.count + k] = block.u_at(block.warp, k);
    if constexpr (Block<T>::kWide)
      block.multiply_wide();
    else
      block.multiply_narrow();
    __syncthreads();
    if (row >= call.rows) continue;  // in the last group, behind its last barrier
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (lane + 32 * i < fours) {
        const short4 at = block.places(lane + 32 * i);
        const int all[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (all[j] >= 0)
            values[i][j] += rounded(block.delta_at(block.warp, all[j]), call.to_type);
        write(call.to, call.to_type, start + lane + 32 * i, values[i]);
      }
    if (call.normed) normalise(call, values, row);
  }
}

template <typename T, int kFours>
cudaError_t start(const SalientLinear& call, cudaStream_t stream) {
  const int bytes = salient_bytes(call.count, call.dim, call.product);
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        salient_linear_kernel<T, kFours>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  // Few rows are spread over more processors. Many blocks would each read the matrix.
  const int rows = call.rows <= kRows / 2 * call.processors ? kRows / 2 : kRows;
  const int groups = (call.rows + rows - 1) / rows;
  const int most = call.processors * (kFours <= 6 && bytes <= 100 * 1024 ? 2 : 1);
  const int blocks = groups < most ? groups : most;
  salient_linear_kernel<T, kFours><<<blocks, 32 * rows, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <typename T, int kFours>
cudaError_t launch(const SalientLinear& call, cudaStream_t stream) {
  if constexpr (kFours > 1)
    if (call.dim <= 128 * (kFours / 2)) return launch<T, kFours / 2>(call, stream);
  if constexpr (kFours >= 4)  // 3 / 4 of the width: 384, 768, 1536
    if (call.dim <= 32 * 3 * kFours) return start<T, kFours * 3 / 4>(call, stream);
  return start<T, kFours>(call, stream);
}

}  // namespace

int salient_bytes(int count, int dim, Element product) {
  return Layout(count, dim, product == Element::kFloat).bytes;
}

cudaError_t launch_salient_linear(const SalientLinear& call, cudaStream_t stream) {
  constexpr int kWidest = kWidestNorm / 128;
  if (call.product == Element::kBFloat16) return launch<__nv_bfloat16, kWidest>(call, stream);
  if (call.product == Element::kHalf) return launch<__half, kWidest>(call, stream);
  return launch<float, kWidest>(call, stream);
}

}  // namespace pcx
