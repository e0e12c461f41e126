// Runs a CUDA kernel on the host, to find mistakes: each thread of a block is a fiber, and what hardware does
// some time later happens here as late as it may, or at once, as the adversary is told. See build.py for its
// settings.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUtensorMap;

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kSharedLimit = 227 * 1024;

// Runs `thread(of)` as every thread of every block, one block after another. False if something went wrong,
// which latest_error() tells: threads that wait for ever, an invalid address, a misused instruction.
bool run(unsigned blocks, unsigned threads, std::size_t shared_bytes, void (*thread)(const void*),
         const void* of);
const char* latest_error();

// The 32-bit address of a byte of dynamic shared memory. Dynamic memory starts 16 bytes behind a multiple of
// 1024: nothing else about its alignment is promised.
std::uint32_t shared_address(const void* shared);

// Waits for all lanes of the mask, then returns the value that lane `source` gave; -1 is __syncwarp.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int source);

// What ptx.cuh tells of the functions of these names. Meeting 0 is __syncthreads.
void meeting_sync(int number, int threads);
void meeting_arrive(int number, int threads);

void copy_16(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int pending);

void barrier_init(std::uint64_t* state, int arrivals);
void fence_barrier_init();
void barrier_arrive(std::uint64_t* state, int promised_bytes);
void barrier_wait(std::uint64_t* state, int parity);
void copy_box(void* shared, const CUtensorMap* map, std::uint64_t* state, int x, int y, int z);
void fence_shared_writes();

// One product of a warpgroup, the same for all its lanes.
struct Product {
  bool bfloat16, registers, add;  // numbers are bfloat16, else float16; the left operand is in registers
  int columns;
  std::uint64_t a, b;

  bool operator==(const Product& x) const {
    return bfloat16 == x.bfloat16 && registers == x.registers && add == x.add && columns == x.columns &&
           a == x.a && b == x.b;
  }
};
void product(const Product& product, float* d, const std::uint32_t* a);
void product_fence();
void product_commit();
void product_wait(int pending);

}  // namespace emulator
