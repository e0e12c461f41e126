// Small kernels, right and wrong ones, by which test_emulator.py tests the emulator.
#include <ptx.cuh>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common.cuh"

namespace geo_r1 {
namespace {

constexpr int kThreads = 128;
constexpr int kAlignment = 1024;

__device__ unsigned char* align_by_hand(unsigned char* shared) {
  return shared + (kAlignment - shared_address(shared) % kAlignment) % kAlignment;
}

// ---- threads

__global__ void block_sum_kernel(const float* x, float* out, bool with_barrier) {
  __shared__ float parts[kThreads / kWarp];
  const float sum = warp_sum(x[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = sum;
  if (with_barrier) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}

// Each lane's value goes to the lane before it, the first lane's to the last; then the first value of each half goes
// to all of that half.
__global__ void shuffle_kernel(const double* x, double* out) {
  const int lane = threadIdx.x % kWarp;
  const double next = __shfl_sync(kAllLanes, x[threadIdx.x], (lane + 1) % kWarp);
  out[threadIdx.x] = __shfl_sync(kAllLanes, next, 0, kWarp / 2);
}

// Two groups of threads pass a number back and forth, one arriving where the other waits.
__global__ void turns_kernel(int* out) {
  __shared__ int number;
  const bool first = threadIdx.x < kThreads / 2;
  if (threadIdx.x == 0) number = 1;
  if (first) meeting_arrive(1, kThreads);
  if (!first) meeting_sync(1, kThreads);
  if (threadIdx.x == kThreads - 1) number *= 5;
  if (!first) meeting_arrive(2, kThreads);
  if (first) meeting_sync(2, kThreads);
  if (threadIdx.x == 0) *out = number + 2;
}

// ---- copies by every thread for itself

__global__ void copy_kernel(const float* x, float* out, int count, int waited_groups) {
  extern __shared__ unsigned char shared_memory[];
  float* const mine = reinterpret_cast<float*>(shared_memory) + 8 * threadIdx.x;
  const int first = 8 * static_cast<int>(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    const int left = count - first - 4 * half;
    copy_16(mine + 4 * half, x + first + 4 * half, 4 * max(0, min(4, left)));
    copy_commit();
  }
  if (waited_groups == 1) copy_wait<1>();
  if (waited_groups == 2) copy_wait<0>();
  for (int i = 0; i < 8; ++i) out[first + i] = mine[i];
}

// ---- barriers and boxes: one thread fetches tiles of one head, the others copy them out

enum class Bug { none, full_not_awaited, empty_not_awaited };

// Returned by argument, since g++ does not always align results.
void encode(CUtensorMap& map, const void* x, int num_tokens, int num_heads, int head_size, int columns,
            int rows, int swizzle) {
  check(cudaSetDevice(0), "toy");  // gives this thread the context that the driver's function needs
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
      "toy");
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(head_size), static_cast<cuuint64_t>(num_heads),
                               static_cast<cuuint64_t>(num_tokens)};
  const cuuint64_t strides[2] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(x), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("toy: no map");
}

constexpr int kStages = 2, kRows = 24;

__global__ void ring_kernel(const __grid_constant__ CUtensorMap map, std::uint16_t* out, int num_tiles,
                            int head_size, int columns, int swizzle, Bug bug) {
  extern __shared__ unsigned char shared_memory[];
  unsigned char* const tiles = align_by_hand(shared_memory);
  const int row_bytes = 2 * columns, tile_bytes = kRows * row_bytes;
  const int pitch = (tile_bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* const full = reinterpret_cast<Barrier*>(tiles + kStages * pitch);
  auto* const empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kThreads - kWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int panels = head_size / columns;
  if (threadIdx.x < kWarp) {
    if (threadIdx.x != 0) return;
    prefetch_map(&map);
    for (int i = 0; i < num_tiles * panels; ++i) {
      const int stage = i % kStages;
      if (bug != Bug::empty_not_awaited) barrier_wait(&empty[stage], i / kStages % 2 ^ 1);
      barrier_arrive_expect(&full[stage], tile_bytes);
      copy_box(tiles + stage * pitch, &map, &full[stage], i % panels * columns, 1, i / panels * kRows - 3);
    }
    return;
  }
  for (int i = 0; i < num_tiles * panels; ++i) {
    const int stage = i % kStages;
    if (bug != Bug::full_not_awaited) barrier_wait(&full[stage], i / kStages % 2);
    for (int at = threadIdx.x - kWarp; at < kRows * columns; at += kThreads - kWarp) {
      const int row = at / columns, column = at % columns, byte = row * row_bytes + 2 * column;
      // Chunk c of row r of the pattern stands where chunk c xor r belongs; a row of the pattern is 128
      // bytes.
      const int chunk = byte / 16 % 8 ^ (byte / 128 % 8 & ((1 << swizzle) - 1));
      std::uint16_t x;
      std::memcpy(&x, tiles + stage * pitch + byte / 128 * 128 + 16 * chunk + byte % 16, 2);
      out[(i / panels * kRows + row) * head_size + i % panels * columns + column] = x;
    }
    barrier_arrive(&empty[stage]);
  }
}

// ---- products

// The place of byte `at` in swizzled shared memory.
__device__ int swizzled(int at, int swizzle) { return at ^ ((at / 128 % 8 & ((1 << swizzle) - 1)) << 4); }

__device__ std::uint64_t descriptor(const unsigned char* start, int leading, int stride, int swizzle) {
  return static_cast<std::uint64_t>(shared_address(start) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 | static_cast<std::uint64_t>(stride >> 4) << 32 |
         static_cast<std::uint64_t>((4 - swizzle) % 4) << 62;
}

struct Task {
  const std::uint16_t *a, *b;  // [64, K] and, in_shared, [N, K], else [K, N]; K columns fill a swizzled row
  float *d, *early;            // [64, N]; early: d before the wait
  int swizzle;
  bool fenced, overwrites;  // overwrites: of b, before the wait
};

// d = 1 + a b transposed where both are `in_shared`, else d = 1 + a b with a in registers.
template <typename T, int N, bool in_shared>
__global__ void product_kernel(const Task task) {
  extern __shared__ unsigned char shared_memory[];
  const int row_bytes = 16 << task.swizzle, K = row_bytes / 2, width = min(N, K);
  unsigned char* const a = align_by_hand(shared_memory);
  unsigned char* const b = a + 64 * row_bytes;
  const auto write = [&](unsigned char* to, int at, std::uint16_t x) {
    std::memcpy(to + swizzled(at, task.swizzle), &x, 2);
  };
  for (int i = threadIdx.x; i < 64 * K; i += kThreads) write(a, 2 * i, task.a[i]);
  for (int i = threadIdx.x; i < N * K; i += kThreads) {
    const int k = i / N, n = i % N;  // panels of `width` columns of b [K, N], one behind the other
    write(b, in_shared ? 2 * i : n / width * (K * row_bytes) + k * row_bytes + n % width * 2, task.b[i]);
  }
  if (task.fenced) fence_shared_writes();
  __syncthreads();

  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4, column = lane % 4 * 2;
  float d[N / 2], early[N / 2];
  std::uint32_t left[4][4];
  for (int i = 0; i < N / 2; ++i) d[i] = 1;
  for (int k = 0; k < K; k += 16) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&left[k / 16][i], &task.a[(row + i % 2 * 8) * K + k + i / 2 * 8 + column], 4);
    }
  }
  pin(d);
  product_fence();
  for (int k = 0; k < K; k += 16) {
    if constexpr (in_shared) {
      Product<T, N>::shared(d, descriptor(a + 2 * k, 16, 8 * row_bytes, task.swizzle),
                            descriptor(b + 2 * k, 16, 8 * row_bytes, task.swizzle), true);
    } else {
      Product<T, N>::registers(d, left[k / 16],
                               descriptor(b + k * row_bytes, K * row_bytes, 8 * row_bytes, task.swizzle));
    }
  }
  product_commit();
  for (int i = 0; i < N / 2; ++i) early[i] = d[i];
  if (task.overwrites) {
    for (int i = threadIdx.x; i < N * K; i += kThreads) write(b, 2 * i, 0);
    fence_shared_writes();
  }
  product_wait<0>();
  pin(d);
  for (int i = 0; i < N / 2; ++i) {
    const int at = (row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2;
    task.d[at] = d[i];
    task.early[at] = early[i];
  }
}

template <typename T, int N>
void multiply(bool in_shared, const Task& task) {
  const std::size_t bytes = kAlignment + (64 + N) * (16 << task.swizzle) + 64 * 256;
  launch("toy", {}, in_shared ? product_kernel<T, N, true> : product_kernel<T, N, false>, 1, kThreads, bytes,
         task);
}

// ---- mistakes, each of which the launch must report

// The compiler must not see the address: it would refuse.
__device__ void touch(volatile std::uintptr_t address) { *reinterpret_cast<volatile float*>(address) = 0; }

__global__ void mistake_kernel(const std::string* name, const float* global, const CUtensorMap* map) {
  extern __shared__ unsigned char shared_memory[];
  unsigned char* const aligned = align_by_hand(shared_memory);
  auto* const barrier = reinterpret_cast<Barrier*>(shared_memory);
  const bool first = threadIdx.x == 0;
  const auto is = [name](const char* other) { return *name == other; };
  float d[8] = {};
  if (is("exit") && first) return;
  if (is("exit")) __syncthreads();
  if (is("lanes") && threadIdx.x % 2 == 0) __syncwarp();
  if (is("masks")) __shfl_xor_sync(threadIdx.x % kWarp != 31 ? kAllLanes : 0xc0000000u, 1, 1);
  if (is("outside") && first) __shfl_sync(1u, 1, 3);
  if (is("meeting")) meeting_sync(first ? 1 : 2, 64);
  if (is("counts")) meeting_sync(1, threadIdx.x < kWarp ? 64 : 96);
  if (is("shared")) shared_memory[2048 + threadIdx.x] = 0;
  if (is("far") && first) shared_memory[9000] = 0;
  if (is("invalid") && first) touch(16);
  if (is("impossible") && first) touch(1ull << 60);
  if (is("misaligned copy")) copy_16(shared_memory + 8, global, 16);
  if (is("no barrier")) barrier_arrive(barrier);
  if (is("barrier not fenced")) {
    if (first) barrier_init(barrier, kThreads);
    __syncthreads();
    barrier_arrive(barrier);
  }
  if (is("barrier") || is("box") || is("box outside") || is("bytes") || is("arrivals")) {
    if (first) barrier_init(barrier, 2);
    if (first) fence_barrier_init();
    __syncthreads();
    if (is("box") && first) copy_box(aligned + 64, map, barrier, 0, 0, 0);
    if (is("box outside") && first) copy_box(aligned + 1024, map, barrier, 0, 0, 0);
    if (is("bytes") && first) {
      barrier_arrive(barrier);
      barrier_arrive_expect(barrier, 1024);
      copy_box(aligned, map, barrier, 0, 0, 0);
    }
    if (is("arrivals") && first)
      barrier_arrive_expect(barrier, 1), barrier_arrive(barrier), barrier_arrive(barrier);
    barrier_wait(barrier, 0);
  }
  if (is("lost copy") && first) {
    barrier_init(barrier, 1);
    barrier_arrive_expect(barrier, 384);
    copy_box(aligned, map, barrier, 0, 0, 0);
  }
  if (is("no fence")) Product<__half, 16>::shared(d, 0, 0, true);
  product_fence();
  if (is("no wait")) Product<__half, 16>::shared(d, 0, 0, true), product_commit();
  if (is("no commit")) Product<__half, 16>::shared(d, 0, 0, true), product_wait<0>();
  if (is("different products")) {
    Product<__half, 16>::shared(d, first ? 1 : 2, 0, true);
    product_commit();
    product_wait<0>();
  }
  if (is("half a warpgroup") && threadIdx.x < 64) {
    Product<__half, 16>::shared(d, descriptor(aligned, 16, 128, 0), descriptor(aligned, 16, 128, 0), true);
    product_commit();
    product_wait<0>();
  }
  if (is("operand outside")) {
    Product<__half, 16>::shared(d, descriptor(aligned, 16, 4096, 0), descriptor(aligned, 16, 128, 0), true);
    product_commit();
    product_wait<0>();
  }
}

// The message of an exception, or null.
template <typename Function>
const char* reason(Function&& function) {
  static std::string what;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}

}  // namespace
}  // namespace geo_r1

using namespace geo_r1;

#define TOY extern "C" __attribute__((visibility("default"))) const char*

TOY block_sum(const float* x, float* out, int blocks, bool with_barrier) {
  return reason([=] { launch("toy", {}, block_sum_kernel, blocks, kThreads, 0, x, out, with_barrier); });
}

TOY shuffle(const double* x, double* out) {
  return reason([=] { launch("toy", {}, shuffle_kernel, 1, kThreads, 0, x, out); });
}

TOY turns(int* out) {
  return reason([=] { launch("toy", {}, turns_kernel, 1, kThreads, 0, out); });
}

TOY copy(const float* x, float* out, int count, int waited_groups) {
  return reason(
      [=] { launch("toy", {}, copy_kernel, 1, kThreads, 32 * kThreads, x, out, count, waited_groups); });
}

TOY ring(const void* x, std::uint16_t* out, int num_tokens, int num_heads, int head_size, int num_tiles,
         int swizzle, int columns, int bug) {
  return reason([=] {
    CUtensorMap map;
    encode(map, x, num_tokens, num_heads, head_size, columns, kRows, swizzle);
    const std::size_t tile = (2 * kRows * columns + kAlignment - 1) / kAlignment * kAlignment;
    launch("toy", {}, ring_kernel, 1, kThreads, kAlignment + kStages * (tile + 16), map, out, num_tiles,
           head_size, columns, swizzle, static_cast<Bug>(bug));
  });
}

TOY product(bool bfloat16, int n, bool in_shared, const void* a, const void* b, float* d, float* early,
            int swizzle, bool fenced, bool overwrites) {
  const Task task = {static_cast<const std::uint16_t*>(a),
                     static_cast<const std::uint16_t*>(b),
                     d,
                     early,
                     swizzle,
                     fenced,
                     overwrites};
  return reason([=] {
    const auto of_type = [&](auto t) {
      using T = decltype(t);
      if (n == 16) multiply<T, 16>(in_shared, task);
      if (n == 32) multiply<T, 32>(in_shared, task);
      if (n == 64) multiply<T, 64>(in_shared, task);
      if (n == 128) multiply<T, 128>(in_shared, task);
    };
    bfloat16 ? of_type(__nv_bfloat16{}) : of_type(__half{});
  });
}

TOY mistake(const char* given, const void* global) {
  return reason([=] {
    const std::string name = given;
    CUtensorMap map;
    encode(map, global, 8, 1, 16, 16, 12, CU_TENSOR_MAP_SWIZZLE_32B);
    launch("toy", {}, mistake_kernel, 2, kThreads, 2048, &name, static_cast<const float*>(global), &map);
  });
}

TOY encodable(const void* x, int head_size, int columns, int rows, int swizzle) {
  return reason([=] {
    CUtensorMap map;
    encode(map, x, 100, 2, head_size, columns, rows, swizzle);
  });
}

TOY too_much_shared(int bytes) {
  return reason([=] { launch("toy", {}, turns_kernel, 1, kThreads, bytes, static_cast<int*>(nullptr)); });
}
