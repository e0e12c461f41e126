// Instructions that C++ cannot express, one function each. Everything else in csrc/ is plain CUDA C++, so a machine
// without a GPU needs substitutes only for this file and the runtime's headers.
//
// Shared memory is addressed by pointers here and by 32-bit offsets in the instructions. Functions from `Barrier`
// on need compute capability 9.0, the products (wgmma) and register counts exactly 9.0 ("sm_90a").
//
// Source: PTX ISA 8.x, the sections named at each function.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace geo_r1 {

// ---- numbers

// 2^x, to 2 units in the last place; results below 2^-126 are 0. ex2
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger number, or NaN if either is NaN; fmaxf drops a NaN. max
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Two numbers rounded to T in one word, the first in the lower half. cvt
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  std::uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
  std::uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// ---- copies by every thread for itself, from compute capability 8.0

// Copies 16 bytes to shared memory; the first `bytes` are read, the others become zeros. cp.async
__device__ __forceinline__ void copy_16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// This thread's copies since the last call form a group. cp.async.commit_group
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the latest `pending` groups of this thread are under way. cp.async.wait_group
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- barriers in shared memory: a phase ends once all threads and all promised bytes have arrived

struct alignas(8) Barrier {
  std::uint64_t state;
};

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Called by one thread; others may use the barrier after fence_barrier_init and __syncthreads. mbarrier.init
__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and promises bytes that bulk copies will bring. mbarrier.arrive.expect_tx
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of a parity; the first phase has parity 0. On a fresh barrier the phase before the
// first, of parity 1, has ended. mbarrier.try_wait
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A meeting of `threads` threads, a multiple of 32, numbered 1 to 15; 0 is __syncthreads. bar.sync
__device__ __forceinline__ void meeting_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Arrives at a meeting without waiting for it. bar.arrive
__device__ __forceinline__ void meeting_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Makes this thread's writes to shared memory visible to products and bulk copies that follow a barrier.
// fence.proxy.async
__device__ __forceinline__ void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- bulk copies (TMA)

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Called by one thread: copies a box of the map at (x, y, z), the innermost first, to shared memory. Elements outside
// the tensor become zeros; the barrier counts their bytes too. cp.async.bulk.tensor
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, Barrier* barrier, int x, int y,
                                         int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// ---- registers of a warpgroup, multiples of 8. setmaxnreg

template <int count>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- products by a warpgroup (wgmma): 128 threads together
//
// d [64, N] float32: thread t = 32 w + l of the warpgroup holds, for each 8 columns j, four numbers d[4 j ..]:
// rows r = 16 w + l / 4 and r + 8, columns c = 8 j + 2 (l % 4) and c + 1, row r first.
// a [64, 16] in registers: four pairs of T, with rows and columns as in 16 columns of d, in the order row 1 of the
// first 8, row 2, then both rows of the last 8.
// Operands in shared memory are named by a 64-bit descriptor, see `operand` in sm90.cuh.

// Needed before the first product, and before a product whose registers have been written since. wgmma.fence
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the latest `pending` committed groups are under way.
template <int pending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving uses of registers across it; placed before products start and after they end.
template <int count>
__device__ __forceinline__ void pin(float (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int count>
__device__ __forceinline__ void pin(std::uint32_t (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Registers of an accumulator, as operands of an instruction.
#define GEO_R1_FROM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GEO_R1_FROM16(i) GEO_R1_FROM4(i), GEO_R1_FROM4(i + 4), GEO_R1_FROM4(i + 8), GEO_R1_FROM4(i + 12)
#define GEO_R1_REGISTERS8 GEO_R1_FROM4(0), GEO_R1_FROM4(4)
#define GEO_R1_REGISTERS16 GEO_R1_FROM16(0)
#define GEO_R1_REGISTERS32 GEO_R1_REGISTERS16, GEO_R1_FROM16(16)
#define GEO_R1_REGISTERS64 GEO_R1_REGISTERS32, GEO_R1_FROM16(32), GEO_R1_FROM16(48)
#define GEO_R1_NAMES8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define GEO_R1_NAMES16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GEO_R1_NAMES32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GEO_R1_NAMES64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `shared`: d [64, N] = a [64, 16] b [N, 16] transposed, both in shared memory; with `add`, d += that product.
// `registers`: d [64, N] += a [64, 16] b [16, N], with a in registers. wgmma.mma_async
template <typename T, int N>
struct Product;

#define GEO_R1_PRODUCT(T, TYPE, N, R, A0, A1, A2, A3, A4)                                                            \
  template <>                                                                                                        \
  struct Product<T, N> {                                                                                             \
    __device__ __forceinline__ static void shared(float (&d)[R], std::uint64_t a, std::uint64_t b, bool add) {       \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " A2 ", 0;\n"                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" GEO_R1_NAMES##R "}, " A0     \
                   ", " A1 ", add, 1, 1, 0, 0;\n}"                                                                   \
                   : GEO_R1_REGISTERS##R                                                                                     \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                    \
    }                                                                                                                \
    __device__ __forceinline__ static void registers(float (&d)[R], const std::uint32_t (&a)[4], std::uint64_t b) {  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" GEO_R1_NAMES##R "}, {" A0    \
                   ", " A1 ", " A2 ", " A3 "}, " A4 ", 1, 1, 1, 1;\n"                                                \
                   : GEO_R1_REGISTERS##R                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }                                                                                                                \
  };

#define GEO_R1_PRODUCTS(T, TYPE)                                       \
  GEO_R1_PRODUCT(T, TYPE, 16, 8, "%8", "%9", "%10", "%11", "%12")      \
  GEO_R1_PRODUCT(T, TYPE, 32, 16, "%16", "%17", "%18", "%19", "%20")   \
  GEO_R1_PRODUCT(T, TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36")   \
  GEO_R1_PRODUCT(T, TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68")

GEO_R1_PRODUCTS(__nv_bfloat16, "bf16")
GEO_R1_PRODUCTS(__half, "f16")

#undef GEO_R1_PRODUCTS
#undef GEO_R1_PRODUCT

}  // namespace geo_r1
