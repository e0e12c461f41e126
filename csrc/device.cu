#include "common.cuh"

namespace geo_r1 {

int device_count() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  check(error, "no CUDA device");  // also if the driver is missing or too old
  return count;
}

}  // namespace geo_r1
