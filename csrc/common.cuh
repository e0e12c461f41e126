// Shared by all kernels: checked launches, a device guard, numbers of any dtype, sums over warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "ops.h"

namespace geo_r1 {

inline void check(cudaError_t error, const char* launcher) {
  if (error == cudaSuccess) return;
  // A missing driver and one that is too old have error codes of their own.
  const bool none = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  throw std::runtime_error(std::string(launcher) + (none ? ": no CUDA device: " : ": ") + cudaGetErrorString(error));
}

// Makes a device the current one until the end of the scope. It is set even if it is current already: this gives
// the thread a context, which an autograd thread may lack and which the driver's own functions need.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* launcher) {
    check(cudaGetDevice(&previous_), launcher);
    check(cudaSetDevice(device), launcher);
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* launcher) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), launcher);
  return value;
}

// Starts a kernel on the queue; its device must be the current one.
template <typename... Parameters, typename... Arguments>
void launch(const char* launcher, Queue queue, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
            std::size_t shared_bytes, Arguments&&... arguments) {
  if (blocks < 1 || blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(launcher) + ": a grid of " + std::to_string(blocks) + " blocks");
  }
  if (shared_bytes > 48 * 1024) {  // more than this must be allowed for each kernel
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          launcher);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), launcher);
}

// Calls function(T{}) with the type of a dtype, one of those listed.
template <typename... Ts, typename Function>
void with_dtype(DType dtype, const char* launcher, Function&& function) {
  const auto is = [dtype](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, __half>) return dtype == DType::float16;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return dtype == DType::bfloat16;
    if constexpr (std::is_same_v<T, float>) return dtype == DType::float32;
    if constexpr (std::is_same_v<T, double>) return dtype == DType::float64;
  };
  if (!((is(Ts{}) && (function(Ts{}), true)) || ...)) {
    throw std::runtime_error(std::string(launcher) + ": a dtype that it does not take");
  }
}

// ---- numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// ---- warps and blocks

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Combines the values of `width` lanes with a binary function, in pairs at a distance of width / 2, ..., 2, 1.
// Every lane gets the same result.
template <int width = kWarp, typename T, typename Function>
__device__ __forceinline__ T warp_reduce(T value, Function&& combine) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <int width = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<width>(value, [](T a, T b) { return a + b; });
}

}  // namespace geo_r1
