// Runs a CUDA kernel on the host, to find mistakes. Each thread of a block is a fiber. The hardware's asynchronous
// work is done as late as possible or at once, depending on the adversary's settings, see build.py.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUtensorMap;

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kSharedLimit = 227 * 1024;

// Runs `thread(of)` as every thread of every block, one block after another. Returns false after an error, which
// latest_error() describes: threads that wait for ever, an invalid address, a misused instruction.
bool run(unsigned blocks, unsigned threads, std::size_t shared_bytes, void (*thread)(const void*),
         const void* of);
const char* latest_error();

// The 32-bit address of a byte of dynamic shared memory. Dynamic memory starts 16 bytes behind a multiple of 1024,
// since CUDA promises no better alignment.
std::uint32_t shared_address(const void* shared);

// Waits for all lanes of the mask, then returns the value that lane `source` gave; -1 is __syncwarp.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int source);

// The functions of these names in ptx.cuh. Meeting 0 is __syncthreads.
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
