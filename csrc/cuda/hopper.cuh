// Warp-group products, barriers in shared memory, and shared memory of a cluster (sm_90a).

#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace pcx {

// The layout that the tensor cores read (128-byte swizzle): rows of 128 bytes in groups of 8, the
// 16-byte pieces of a row permuted by its place in the group. A tile starts on a multiple of 1024
// bytes.
constexpr int kRowBytes = 128;

__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return row * kRowBytes + (piece ^ row % 8) * 16;
}

// Groups of eight rows are 1024 bytes apart, both for keys by d and for d by keys.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | address >> 4;
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int Left>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Left) : "memory");
}

// Keeps the compiler from reading the results of products before they are waited for.
template <int Tiles>
__device__ __forceinline__ void hold(float (&c)[Tiles][4]) {
#pragma unroll
  for (auto& tile : c)
    asm volatile("" : "+f"(tile[0]), "+f"(tile[1]), "+f"(tile[2]), "+f"(tile[3])::"memory");
}

// Makes copies of other threads to shared memory visible to this thread's products.
__device__ __forceinline__ void see_copies() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// One wgmma of 64 rows and N columns. A: the left factor's place among the operands, and its
// operands; the right factor is operand B, then follow "add" and whether b is transposed.
#define PCX_PRODUCT(TYPE, N, REGISTERS, A, B, ADD, TURNS, OPERANDS, ...)             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD                         \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" REGISTERS "}, " A ", %" #B ", add, 1, 1, " TURNS ";\n}\n"        \
               : __VA_ARGS__                                                         \
               : OPERANDS, "l"(b), "r"(int{add}), "n"(Transposed))
#define PCX_TILE(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define PCX_TILES2 PCX_TILE(0), PCX_TILE(1)
#define PCX_TILES4 PCX_TILES2, PCX_TILE(2), PCX_TILE(3)
#define PCX_TILES6 PCX_TILES4, PCX_TILE(4), PCX_TILE(5)
#define PCX_TILES8 PCX_TILES6, PCX_TILE(6), PCX_TILE(7)
#define PCX_TILES12 PCX_TILES8, PCX_TILE(8), PCX_TILE(9), PCX_TILE(10), PCX_TILE(11)
#define PCX_TILES14 PCX_TILES12, PCX_TILE(12), PCX_TILE(13)
#define PCX_TILES16 PCX_TILES14, PCX_TILE(14), PCX_TILE(15)
#define PCX_TILES18 PCX_TILES16, PCX_TILE(16), PCX_TILE(17)
#define PCX_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PCX_R16 PCX_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PCX_R24 PCX_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PCX_R32 PCX_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PCX_R48 \
  PCX_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PCX_R56 PCX_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PCX_R64 PCX_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PCX_R72 PCX_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PCX_IN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define PCX_PRODUCTS(TYPE)                                                                  \
  if constexpr (Tiles == 2) {                                                               \
    PCX_PRODUCT(TYPE, 16, PCX_R8, "{%8, %9, %10, %11}", 12, 13, "%14", PCX_IN_REGISTERS,    \
                PCX_TILES2);                                                                \
  } else if constexpr (Tiles == 4) {                                                        \
    PCX_PRODUCT(TYPE, 32, PCX_R16, "{%16, %17, %18, %19}", 20, 21, "%22", PCX_IN_REGISTERS, \
                PCX_TILES4);                                                                \
  } else if constexpr (Tiles == 6) {                                                        \
    PCX_PRODUCT(TYPE, 48, PCX_R24, "{%24, %25, %26, %27}", 28, 29, "%30", PCX_IN_REGISTERS, \
                PCX_TILES6);                                                                \
  } else {                                                                                  \
    static_assert(Tiles == 8);                                                              \
    PCX_PRODUCT(TYPE, 64, PCX_R32, "{%32, %33, %34, %35}", 36, 37, "%38", PCX_IN_REGISTERS, \
                PCX_TILES8);                                                                \
  }
#define PCX_SHARED_PRODUCTS(TYPE)                                                  \
  if constexpr (Tiles == 2) {                                                      \
    PCX_PRODUCT(TYPE, 16, PCX_R8, "%8", 9, 10, "0, %11", "l"(a), PCX_TILES2);      \
  } else if constexpr (Tiles == 4) {                                               \
    PCX_PRODUCT(TYPE, 32, PCX_R16, "%16", 17, 18, "0, %19", "l"(a), PCX_TILES4);   \
  } else if constexpr (Tiles == 6) {                                               \
    PCX_PRODUCT(TYPE, 48, PCX_R24, "%24", 25, 26, "0, %27", "l"(a), PCX_TILES6);   \
  } else if constexpr (Tiles == 8) {                                               \
    PCX_PRODUCT(TYPE, 64, PCX_R32, "%32", 33, 34, "0, %35", "l"(a), PCX_TILES8);   \
  } else if constexpr (Tiles == 12) {                                              \
    PCX_PRODUCT(TYPE, 96, PCX_R48, "%48", 49, 50, "0, %51", "l"(a), PCX_TILES12);  \
  } else if constexpr (Tiles == 14) {                                              \
    PCX_PRODUCT(TYPE, 112, PCX_R56, "%56", 57, 58, "0, %59", "l"(a), PCX_TILES14); \
  } else if constexpr (Tiles == 16) {                                              \
    PCX_PRODUCT(TYPE, 128, PCX_R64, "%64", 65, 66, "0, %67", "l"(a), PCX_TILES16); \
  } else {                                                                         \
    static_assert(Tiles == 18);                                                    \
    PCX_PRODUCT(TYPE, 144, PCX_R72, "%72", 73, 74, "0, %75", "l"(a), PCX_TILES18); \
  }

// Starts c [64, 8 Tiles] = a [64, 16] b [16, 8 Tiles], plus c if `add`. A row of b's tile in shared
// memory is a column of b, or with Transposed a row.
template <typename T, int Tiles, int Transposed>
__device__ __forceinline__ void start_product(float (&c)[Tiles][4], const uint32_t (&a)[4],
                                              uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PCX_PRODUCTS("bf16")
  } else {
    PCX_PRODUCTS("f16")
  }
}

// The same with `a` in shared memory too, by rows.
template <typename T, int Tiles, int Transposed>
__device__ __forceinline__ void start_product(float (&c)[Tiles][4], uint64_t a, uint64_t b,
                                              bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PCX_SHARED_PRODUCTS("bf16")
  } else {
    PCX_SHARED_PRODUCTS("f16")
  }
}

#undef PCX_SHARED_PRODUCTS
#undef PCX_PRODUCTS
#undef PCX_IN_REGISTERS
#undef PCX_PRODUCT
#undef PCX_TILE
#undef PCX_TILES2
#undef PCX_TILES4
#undef PCX_TILES6
#undef PCX_TILES8
#undef PCX_TILES12
#undef PCX_TILES14
#undef PCX_TILES16
#undef PCX_TILES18
#undef PCX_R8
#undef PCX_R16
#undef PCX_R24
#undef PCX_R32
#undef PCX_R48
#undef PCX_R56
#undef PCX_R64
#undef PCX_R72

// A barrier in shared memory; its phases alternate between parities 0 and 1.
__device__ __forceinline__ void make_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Called by a whole warp, whose lanes are together after the last read of what the barrier guards.
// One lane arrives for all. compute-sanitizer's racecheck does not follow that; with PCX_RACECHECK
// defined every lane arrives.
#ifdef PCX_RACECHECK
constexpr int kReleases = 32;
#else
constexpr int kReleases = 1;
#endif

__device__ __forceinline__ void release(uint32_t barrier, int lane) {
  if (lane < kReleases) arrive(barrier);
}

// Arrives when all copies that this thread has started are finished.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives once, and lets the barrier expect bytes that other blocks send.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Called by a whole warp: waits for the phase of a parity. A waiter must not be two phases behind
// or one ahead. With ACROSS it sees what other blocks of the cluster sent, not only its own.
template <bool ACROSS = false>
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
#define PCX_WAIT(HOW)                                                            \
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity" HOW       \
               ".shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\n" \
               "over:\n}\n" ::"r"(barrier),                                      \
               "r"(parity)                                                       \
               : "memory")
  if constexpr (ACROSS)
    PCX_WAIT(".acquire.cluster");
  else
    PCX_WAIT("");
#undef PCX_WAIT
  __syncwarp();
}

// The same place in shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t address_in(int block, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

__device__ __forceinline__ void store_there(uint32_t to, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(to), "f"(x) : "memory");
}

// The same, counted by a barrier of that block.
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, float x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];\n" ::"r"(to),
      "f"(x), "r"(barrier)
      : "memory");
}

// Waits for all threads of the cluster, and for their stores in it.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
}

}  // namespace pcx
