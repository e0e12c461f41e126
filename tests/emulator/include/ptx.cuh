// Replaces csrc/ptx.cuh, which documents the functions, on a host.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace geo_r1 {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

template <typename T>
std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(low).bits | static_cast<std::uint32_t>(__float2bfloat16_rn(high).bits) << 16;
  } else {
    static_assert(std::is_same_v<T, __half>);
    return __float2half_rn(low).bits | static_cast<std::uint32_t>(__float2half_rn(high).bits) << 16;
  }
}

inline void copy_16(void* shared, const void* global, int bytes) { emulator::copy_16(shared, global, bytes); }
inline void copy_commit() { emulator::copy_commit(); }
template <int pending>
void copy_wait() {
  emulator::copy_wait(pending);
}

struct alignas(8) Barrier {
  std::uint64_t state;
};

inline std::uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }
inline void barrier_init(Barrier* barrier, int arrivals) {
  emulator::barrier_init(&barrier->state, arrivals);
}
inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void barrier_arrive(Barrier* barrier) { emulator::barrier_arrive(&barrier->state, 0); }
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  emulator::barrier_arrive(&barrier->state, bytes);
}
inline void barrier_wait(Barrier* barrier, int parity) { emulator::barrier_wait(&barrier->state, parity); }

inline void meeting_sync(int number, int threads) { emulator::meeting_sync(number, threads); }
inline void meeting_arrive(int number, int threads) { emulator::meeting_arrive(number, threads); }
inline void fence_shared_writes() { emulator::fence_shared_writes(); }

inline void prefetch_map(const CUtensorMap*) {}
inline void copy_box(void* shared, const CUtensorMap* map, Barrier* barrier, int x, int y, int z) {
  emulator::copy_box(shared, map, &barrier->state, x, y, z);
}

template <int count>
void registers_raise() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}
template <int count>
void registers_lower() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}

inline void product_fence() { emulator::product_fence(); }
inline void product_commit() { emulator::product_commit(); }
template <int pending>
void product_wait() {
  emulator::product_wait(pending);
}

template <int count>
void pin(float (&)[count]) {}
template <int count>
void pin(std::uint32_t (&)[count]) {}

template <typename T, int N>
struct Product {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128);
  static constexpr bool bfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bfloat16 || std::is_same_v<T, __half>);

  static void shared(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool add) {
    emulator::product({bfloat16, false, add, N, a, b}, d, nullptr);
  }
  static void registers(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b) {
    emulator::product({bfloat16, true, true, N, 0, b}, d, a);
  }
};

}  // namespace geo_r1
