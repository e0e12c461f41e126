// Replaces CUDA's header of the same name: the parts of the language and the runtime that csrc/ uses, on a host.
#pragma once

#include <math.h>  // isnan and similar functions, also outside std

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Both `__shared__ float x[4];` in a function and `extern __shared__ float x[];` are then C++, and blocks run
// one at a time in one thread of the host.
#define __shared__ thread_local

using std::max;
using std::min;

// ---- built-in types and variables

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- threads together

inline void __syncthreads() { emulator::meeting_sync(0, static_cast<int>(blockDim.x)); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0, -1); }

namespace emulator {

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x % 32), source = lane ^ lane_mask;
  return emulator::shuffle(mask, value, source / width > lane / width ? lane : source);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulator::shuffle(mask, value, lane / width * width + (source & (width - 1)));
}

inline std::size_t __cvta_generic_to_shared(const void* shared) { return emulator::shared_address(shared); }

// ---- runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
// After cudaErrorLaunchFailure it describes the error of the latest launch.
const char* cudaGetErrorString(cudaError_t);

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1,
};
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found = nullptr);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::kSharedLimit ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<void (*)(Parameters...), Parameters...> call(kernel,
                                                                std::forward<Arguments>(arguments)...);
  const auto thread = [](const void* of) {
    std::apply([](auto kernel, const auto&... parameters) { kernel(parameters...); },
               *static_cast<decltype(&call)>(of));
  };
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (grid.x < 1 || grid.y != 1 || grid.z != 1 || block.x < 1 || block.x > emulator::kMaxThreads ||
      block.y != 1 || block.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > emulator::kSharedLimit) return cudaErrorInvalidValue;
  const bool ended = emulator::run(grid.x, block.x, config->dynamicSmemBytes, thread, &call);
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}
