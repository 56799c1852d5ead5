// Functions that the kernels over attention graphs share: tokens' rows in shared memory, products
// of rows, and sums of rows that are spread over a warp or a block.

#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "weighted_pagerank.h"

namespace pcx {

// An attribute of the current device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Allows a kernel's blocks all shared memory of the device. The limit is the same in every call,
// since other threads launch the same kernel.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel) {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(found.sharedSizeBytes));
}

// A product reads 32 bytes of a row; eight rows at a time begin on different banks.
constexpr int kStepBytes = 32;

__host__ __device__ constexpr int steps_of(int dim, int element_bytes) {
  return (dim * element_bytes + kStepBytes - 1) / kStepBytes;
}

__host__ __device__ constexpr int row_bytes(int dim, int element_bytes) {
  return steps_of(dim, element_bytes) * kStepBytes + 16;
}

// One multiplication of 32-bit numbers; strides of 64 bits would take six.
template <typename T>
__device__ __forceinline__ const T* row_of(const T* from, uint32_t stride, int row) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) +
                                    uint64_t{static_cast<uint32_t>(row)} * stride);
}

// Copies the rows of `tokens` of a head to shared memory, one after the other, `stride` bytes
// apart. Zeros stand for a negative token and beyond `dim`.
template <typename T, int ROWS, int THREADS>
__device__ void copy_dense(uint32_t to, const T* from, uint32_t stride, const int* tokens,
                           int dim) {
  constexpr int kVector = 16 / sizeof(T);
  const int pieces = 2 * steps_of(dim, sizeof(T)), bytes = row_bytes(dim, sizeof(T));
  const int down = THREADS / pieces, along = THREADS % pieces;
  int row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
  while (row < ROWS) {
    const bool inside = tokens[row] >= 0 && piece * kVector < dim;
    copy_async(to + row * bytes + 16 * piece,
               inside ? row_of(from, stride, tokens[row]) + piece * kVector : from, inside);
    row += down;
    piece += along;
    if (piece >= pieces) {
      piece -= pieces;
      ++row;
    }
  }
}

// The same for rows of 128 bytes, swizzled as wgmma reads them. A thread keeps its piece of a row.
template <typename T, int ROWS, int THREADS>
__device__ __forceinline__ void copy_swizzled(uint32_t to, const T* from, uint32_t stride,
                                              const int* tokens) {
  constexpr int kPieces = kRowBytes / 16, kDown = THREADS / kPieces;
  static_assert(kDown % 8 == 0);  // so that swizzled pieces lie in one column
  const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  to += swizzled(first, piece);
  from += piece * (16 / sizeof(T));
  constexpr int kRows = (ROWS + kDown - 1) / kDown;
  const auto has = [&](int i) { return (i + 1) * kDown <= ROWS || first + i * kDown < ROWS; };
  int token[kRows];  // all are read before the first copy; otherwise each read would wait for a
                     // copy
#pragma unroll
  for (int i = 0; i < kRows; ++i) token[i] = has(i) ? tokens[first + i * kDown] : -1;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (has(i))
      copy_async(to + i * kDown * kRowBytes, row_of(from, stride, max(token[i], 0)), token[i] >= 0);
}

template <typename T, int ROWS, int THREADS, bool SWIZZLED>
__device__ __forceinline__ void copy_rows(uint32_t to, const T* from, int64_t stride,
                                          const int* tokens, int dim) {
  const uint32_t bytes = static_cast<uint32_t>(stride) * static_cast<uint32_t>(sizeof(T));
  if constexpr (SWIZZLED)
    copy_swizzled<T, ROWS, THREADS>(to, from, bytes, tokens);
  else
    copy_dense<T, ROWS, THREADS>(to, from, bytes, tokens, dim);
}

// The token that is the i-th of a sample's graph, -1 beyond the last. An index out of range is
// clamped, so that nothing else is read.
__device__ __forceinline__ int token_at(const Pagerank& call, int sample, int i) {
  if (i >= call.nodes) return -1;
  if (!call.among) return i;
  const int64_t token = call.among[sample * call.among_stride + i];
  return static_cast<int>(min(max(token, int64_t{0}), int64_t{call.tokens - 1}));
}

__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Splits x into two TF32 numbers: the nearest one, found by integer operations, and the remainder,
// of which products use as many bits and drop the rest. (cvt.rna checks for infinities and takes
// twice as long. A NaN or an infinity leaves a NaN.)
template <int N>
__device__ __forceinline__ void split(const uint32_t (&x)[N], uint32_t (&high)[N],
                                      uint32_t (&low)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    high[i] = (x[i] + 0x1000) & ~0x1fffu;
    low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
  }
}

// Two products of 16 rows by 8; b holds both right factors. For float, each is three products of
// TF32 parts, which is float to about 2^-20.
template <typename T>
__device__ __forceinline__ void multiply_add_both(float (&first)[4], float (&second)[4],
                                                  const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
    split(a, a_high, a_low);
    split(b, b_high, b_low);
    multiply_add_tf32(first, a_low, b_high[0], b_high[1]);
    multiply_add_tf32(second, a_low, b_high[2], b_high[3]);
    multiply_add_tf32(first, a_high, b_low[0], b_low[1]);
    multiply_add_tf32(second, a_high, b_low[2], b_low[3]);
    multiply_add_tf32(first, a_high, b_high[0], b_high[1]);
    multiply_add_tf32(second, a_high, b_high[2], b_high[3]);
  } else {
    multiply_add<T>(first, a, b[0], b[1]);
    multiply_add<T>(second, a, b[2], b[3]);
  }
}

// The offset of a lane's part of 16 rows: as a product's left factor, and as two right factors.
__device__ __forceinline__ int left_offset(int lane, int bytes) {
  return lane % 16 * bytes + lane / 16 * 16;
}

__device__ __forceinline__ int right_offset(int lane, int bytes) {
  return (lane % 8 + lane / 16 * 8) * bytes + lane / 8 % 2 * 16;
}

// e += left right^T, 16 rows by 16 * TILES, in the layout of the tensor cores: a lane has the rows
// lane / 4 and lane / 4 + 8, and of tile t the columns 8 t + 2 (lane % 4) and the next one.
template <typename T, int TILES>
__device__ __forceinline__ void products(float (&e)[2 * TILES][4], uint32_t left, uint32_t right,
                                         int bytes, int steps) {
  for (int step = 0; step < steps; ++step) {
    uint32_t a[4];
    load_matrices(a, left + step * kStepBytes);
#pragma unroll
    for (int u = 0; u < TILES; ++u) {
      uint32_t b[4];
      load_matrices(b, right + 16 * u * bytes + step * kStepBytes);
      multiply_add_both<T>(e[2 * u], e[2 * u + 1], a, b);
    }
  }
}

// The same by a warp group for its 64 rows, of head dim 64 in 16 bits, swizzled. It is started in
// two parts: the results of the first are used while the tensor cores compute the second. EIGHTS
// counts tiles of eight columns, as in hopper.cuh.
template <int EIGHTS>
constexpr int kFirstPart = EIGHTS / 8 * 4;

template <int FIRST, int EIGHTS, int ALL>
__device__ __forceinline__ auto& part_of(float (&e)[ALL][4]) {
  return reinterpret_cast<float (&)[EIGHTS][4]>(e[FIRST]);
}

template <typename T, int FIRST, int EIGHTS, int ALL>
__device__ __forceinline__ void start_part(float (&e)[ALL][4], uint32_t left, uint32_t right) {
  const uint64_t rows = descriptor(left), columns = descriptor(right + 8 * FIRST * kRowBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    start_product<T, EIGHTS, 0>(part_of<FIRST, EIGHTS>(e), rows + 2 * i, columns + 2 * i, i > 0);
  commit_products();
}

template <typename T, int EIGHTS>
__device__ __forceinline__ void start_products(float (&e)[EIGHTS][4], uint32_t left,
                                               uint32_t right) {
  constexpr int kFirst = kFirstPart<EIGHTS>;
  begin_products();
  start_part<T, 0, kFirst>(e, left, right);
  start_part<T, kFirst, EIGHTS - kFirst>(e, left, right);
}

template <int EIGHTS>
__device__ __forceinline__ void finish_products(float (&e)[EIGHTS][4]) {
  wait_for_products<0>();
  hold(e);
}

// Calls `of(t)` for every tile, with HOPPER as soon as its products are there. Warps without rows
// pass false: all warps of a group must wait for its products, in the same place.
template <bool HOPPER, int EIGHTS, typename Of>
__device__ __forceinline__ void each_tile(float (&e)[EIGHTS][4], bool has_rows, Of of) {
  constexpr int kFirst = HOPPER ? kFirstPart<EIGHTS> : EIGHTS;
  if constexpr (HOPPER) {
    wait_for_products<1>();
    hold(part_of<0, kFirst>(e));
  }
  if (has_rows) {
#pragma unroll
    for (int t = 0; t < kFirst; ++t) of(t);
  }
  if constexpr (HOPPER) {
    finish_products(part_of<kFirst, EIGHTS - kFirst>(e));
    if (has_rows) {
#pragma unroll
      for (int t = kFirst; t < EIGHTS; ++t) of(t);
    }
  }
}

// Whether a row's sum of powers of 2, without a maximum subtracted, is far from overflow and from
// losing its small terms. False for a NaN. (Near the upper end, weights of tokens that score less
// than 1e-8 lose digits.)
__device__ __forceinline__ bool within_range(float sum) { return sum > 1e-18f && sum < 1e30f; }

struct Sum {
  static constexpr float kEmpty = 0;
  __device__ static float of(float a, float b) { return a + b; }
};

struct Max {
  static constexpr float kEmpty = -INFINITY;
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces a warp's rows to one. `value(i)` is this lane's value of its i-th column, of 4 * TILES.
// The eight lanes that share columns exchange halves of each eight columns three times.
template <typename Op, int TILES, typename Value>
__device__ void reduce_columns(Value value, float* row, int lane) {
  constexpr int kValues = 4 * TILES;
  const auto merged = [](bool upper, float first, float second, int mask) {
    return Op::of(upper ? second : first,
                  __shfl_xor_sync(0xffffffff, upper ? first : second, mask));
  };
#pragma unroll
  for (int start = 0; start < kValues; start += 8) {
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int other = start + i + 4;
      half[i] =
          merged(lane & 16, value(start + i), other < kValues ? value(other) : Op::kEmpty, 16);
    }
    const float first = merged(lane & 8, half[0], half[2], 8);
    const float second = merged(lane & 8, half[1], half[3], 8);
    const float found = merged(lane & 4, first, second, 4);
    const int index = start + (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    if (index < kValues) row[8 * (index / 2) + 2 * (lane % 4) + index % 2] = found;
  }
}

// Reduces one row of a tile, which four lanes share.
template <typename Op>
__device__ __forceinline__ float over_row(float x) {
  x = Op::of(x, __shfl_xor_sync(0xffffffff, x, 1));
  return Op::of(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
  return x;
}

}  // namespace pcx
