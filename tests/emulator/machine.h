// Shared by the parts of the emulator: the threads of the running block, and how they take turns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

constexpr int kWarp = 32;

struct Copy16 {
  void* shared;
  const void* global;
  int bytes, group;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool ended = false;
  std::string (*waits_for)(const Thread&) = nullptr;  // for messages
  int number = 0;                                     // of the meeting or barrier that it waits at

  // exchange: what it gave, and then gets
  unsigned mask = 0;
  int source = 0;
  std::uint64_t value = 0;

  std::deque<Copy16> copies;
  int copy_groups = 0;

  // products that it issued, groups of them that it committed, and those of these that it waited for
  int products = 0, product_groups = 0, product_groups_waited = 0;
  bool product_fenced = false;
};

// Whether this thread of the host has the device's context, which functions of the driver need. Only setting the
// device gives it one, even if the device is current already.
extern thread_local bool has_context;

extern Thread* current;  // null if no thread is running
extern bool late;        // if false, asynchronous work happens at once

int num_threads();
Thread& thread_at(int index);

// Ends the launch with an error that names block and thread.
[[noreturn]] void fail(const std::string& what);

// Waits until another thread calls wake().
void sleep(std::string (*waits_for)(const Thread&), int number = 0);
void wake(Thread& thread);

// A point where threads may overtake each other; in shuffled order they sometimes do.
void overtake();

// Work of the hardware, done at the latest when no thread can continue.
enum class Work { copy, product };
void defer(Work work, std::function<void()> function);

// ---- shared memory

// `bytes` at a 32-bit address, which must lie in the block's dynamic memory.
unsigned char* at_shared(std::uint32_t address, std::size_t bytes);

// The same byte as copies and products see it. If `late`, they see threads' writes only after
// fence_shared_writes.
unsigned char* seen_by_hardware(unsigned char* shared);

// ---- the parts

void reset_sync();
void check_barrier(std::uint64_t* state);                // fails if there is none
void deliver(std::uint64_t* state, std::int64_t bytes);  // to a barrier

void reset_products();
void check_products();  // fails unless the current thread has waited for all

}  // namespace emulator
