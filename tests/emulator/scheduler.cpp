// Launches: threads take turns, hardware does its work between them, shared memory is poisoned and guarded.
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStorage = emulator::kSharedLimit / kPage * kPage + 3 * kPage;
constexpr std::size_t kBefore = 16;  // bytes before a block's shared memory, so that its alignment is no better
constexpr std::uint32_t kReserved = 1024;  // 32-bit address of the first of them

}  // namespace

// Dynamic shared memory. Kernels declare it as `shared_memory`; the linker sees a name that includes the
// namespace.
extern "C" {
alignas(kPage) thread_local unsigned char emulator_storage[kStorage];
}
asm(R"(
.globl _ZN6geo_r113shared_memoryE, _ZN6geo_r112_GLOBAL__N_113shared_memoryE
.hidden _ZN6geo_r113shared_memoryE, _ZN6geo_r112_GLOBAL__N_113shared_memoryE
.type _ZN6geo_r113shared_memoryE, @tls_object
.type _ZN6geo_r112_GLOBAL__N_113shared_memoryE, @tls_object
.set _ZN6geo_r113shared_memoryE, emulator_storage + 16
.set _ZN6geo_r112_GLOBAL__N_113shared_memoryE, emulator_storage + 16
)");

namespace emulator {

Thread* current = nullptr;
bool late = true;

namespace {

constexpr unsigned char kPoison = 0xff;  // makes a NaN, or -1
constexpr unsigned char kFence = 0xc5;   // stands around shared memory

enum class Order { forward, backward, shuffled };
enum class Pick { oldest, newest, any };

// The order of the hardware's work when no thread can continue and, one time in `hurry`, earlier. Products before
// copies show reads without a wait; copies before products show writes to operands that are still read.
struct Habit {
  bool copies_first;
  Pick copy;
  unsigned hurry;  // 0: never
};

Order order = Order::forward;
std::mt19937 chance;
std::string error;

// Static shared arrays: the start of each, counted from emulator_storage, and its size in bytes.
std::vector<std::pair<std::ptrdiff_t, std::size_t>> static_arrays;

// The running launch and its block.
struct Machine {
  void (*thread)(const void*);
  const void* of;
  std::size_t shared_bytes;
  std::vector<unsigned char> hidden;  // shared memory as hardware sees it

  Fiber scheduler;
  std::array<Thread, kMaxThreads> threads;
  Thread hardware;
  std::bitset<kMaxThreads> ready;
  int num_ended;
  Habit habit;
  std::deque<std::function<void()>> copies, products;
};
Machine machine;

unsigned char* shared_base() { return emulator_storage + kBefore; }

unsigned char* page_behind(const unsigned char* at) {
  return emulator_storage + (static_cast<std::size_t>(at - emulator_storage) + kPage - 1) / kPage * kPage;
}

bool flip(unsigned one_in) { return one_in != 0 && chance() % one_in == 0; }

Habit habit_of(Order order) {
  if (order == Order::forward) return {false, Pick::oldest, 0};
  if (order == Order::backward) return {true, Pick::newest, 0};
  return {flip(2), static_cast<Pick>(chance() % 3), 1u << chance() % 8};
}

std::string shared_size() { return std::to_string(machine.shared_bytes) + " bytes of shared memory"; }

std::string where() {
  std::string text = "block " + std::to_string(blockIdx.x) + " of " + std::to_string(gridDim.x);
  const bool in_thread = current != nullptr && current != &machine.hardware;
  if (in_thread) text += ", thread " + std::to_string(current->index);
  return text + ": ";
}

void thread_main() {
  machine.thread(machine.of);
  check_products();
  current->ended = true;
  ++machine.num_ended;
  current->fiber.go_to(machine.scheduler);
}

// In a fiber of its own, so that fail() and invalid addresses end it like threads.
void hardware_main() {
  for (;;) {
    auto& copies = machine.copies;
    const bool is_copy = machine.products.empty() || (machine.habit.copies_first && !copies.empty());
    auto& queue = is_copy ? copies : machine.products;
    auto at = queue.begin();
    const Pick pick = is_copy ? machine.habit.copy : Pick::oldest;
    if (pick == Pick::newest) at = queue.end() - 1;
    if (pick == Pick::any) at += static_cast<std::ptrdiff_t>(chance() % queue.size());
    const std::function<void()> work = std::move(*at);
    queue.erase(at);
    work();
    current->fiber.go_to(machine.scheduler);
  }
}

bool take_turn(Thread& thread) {
  current = &thread;
  threadIdx.x = static_cast<unsigned>(thread.index);
  machine.scheduler.go_to(thread.fiber);
  current = nullptr;
  return error.empty();
}

std::string deadlock() {
  std::map<std::string, int> counts;
  for (int i = 0; i < num_threads(); ++i) {
    const Thread& t = thread_at(i);
    ++counts[t.ended ? "have ended" : t.waits_for(t)];
  }
  std::string text = where() + "nothing can go on";
  for (const auto& [what, count] : counts) text += "; " + std::to_string(count) + " " + what;
  return text;
}

// Gives every thread that can continue a turn, again and again. False on an error.
bool run_threads() {
  std::vector<int> turns;
  while (machine.num_ended < num_threads()) {
    turns.clear();
    for (int i = 0; i < num_threads(); ++i) {
      if (machine.ready[static_cast<std::size_t>(i)]) turns.push_back(i);
    }
    const bool work_left = !machine.copies.empty() || !machine.products.empty();
    if (turns.empty() && !work_left) {
      error = deadlock();
      return false;
    }
    if (turns.empty() || (work_left && flip(machine.habit.hurry))) {
      if (!take_turn(machine.hardware)) return false;
      continue;
    }
    machine.ready.reset();
    if (order == Order::backward) std::reverse(turns.begin(), turns.end());
    if (order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), chance);
    for (const int i : turns) {
      if (!take_turn(thread_at(i))) return false;
    }
  }
  if (machine.copies.empty()) return true;
  error = where() + "ends while " + std::to_string(machine.copies.size()) + " copies of boxes are under way";
  return false;
}

bool is_fence(const unsigned char* from, const unsigned char* to) {
  return std::all_of(from, to, [](unsigned char x) { return x == kFence; });
}

bool run_block(const Stacks& stacks) {
  unsigned char *const shared = shared_base(), *const end = shared + machine.shared_bytes;
  std::memset(emulator_storage, kFence, kBefore);
  std::memset(shared, kPoison, machine.shared_bytes);
  std::memset(end, kFence, static_cast<std::size_t>(page_behind(end) - end));
  for (const auto& [start, bytes] : static_arrays) std::memset(emulator_storage + start, kPoison, bytes);
  machine.hidden.assign(machine.shared_bytes, kPoison);

  machine.copies.clear();
  machine.products.clear();
  machine.num_ended = 0;
  machine.habit = habit_of(order);
  reset_sync();
  reset_products();
  machine.ready.reset();
  for (int i = 0; i < num_threads(); ++i) {
    thread_at(i) = {};
    thread_at(i).index = i;
    thread_at(i).fiber.prepare(stacks.bottom(i), stacks.top(i), thread_main);
    wake(thread_at(i));
  }
  machine.hardware.fiber.prepare(stacks.bottom(kMaxThreads), stacks.top(kMaxThreads), hardware_main);

  if (!run_threads()) return false;
  if (is_fence(emulator_storage, shared) && is_fence(end, page_behind(end))) return true;
  error = where() + "wrote outside of its " + shared_size();
  return false;
}

// During a launch, an invalid address ends the launch and not the process.
class Signals {
 public:
  Signals() : stack_(1 << 16) {
    stack_t own = {};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = caught;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~Signals() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr std::array<int, 3> kSignals = {SIGSEGV, SIGBUS, SIGFPE};

  static void caught(int number, siginfo_t* info, void*) {
    if (current == nullptr) {  // not caused by a kernel
      signal(number, SIG_DFL);
      return;
    }
    if (number == SIGFPE) fail("divides by zero");
    const auto* const at = static_cast<unsigned char*>(info->si_addr);
    if (at >= shared_base() && at < emulator_storage + kStorage) {
      fail("touches byte " + std::to_string(at - shared_base()) + " of its " + shared_size());
    }
    // Of an address that is none of 48 bits, and of a misaligned one, the processor does not say which.
    if (info->si_code == SI_KERNEL) fail("touches an address that is misaligned or too large for any memory");
    char address[32];
    std::snprintf(address, sizeof(address), "0x%zx", reinterpret_cast<std::uintptr_t>(info->si_addr));
    fail(std::string("touches the address ") + address + ", which is invalid, or overflows its stack");
  }

  std::vector<unsigned char> stack_;
  stack_t old_stack_;
  std::array<struct sigaction, kSignals.size()> old_;
};

}  // namespace

int num_threads() { return static_cast<int>(blockDim.x); }

Thread& thread_at(int index) { return machine.threads[static_cast<std::size_t>(index)]; }

void fail(const std::string& what) {
  error = where() + what;
  current->fiber.go_to(machine.scheduler);
  __builtin_unreachable();
}

void sleep(std::string (*waits_for)(const Thread&), int number) {
  current->waits_for = waits_for;
  current->number = number;
  current->fiber.go_to(machine.scheduler);
}

void wake(Thread& thread) { machine.ready.set(static_cast<std::size_t>(thread.index)); }

void overtake() {
  if (order != Order::shuffled || !flip(4)) return;
  wake(*current);
  sleep(nullptr);
}

void defer(Work work, std::function<void()> function) {
  (work == Work::copy ? machine.copies : machine.products).push_back(std::move(function));
}

bool run(unsigned blocks, unsigned threads, std::size_t shared_bytes, void (*thread)(const void*),
         const void* of) {
  static const Stacks stacks(kMaxThreads + 1);
  const Signals signals;
  machine.thread = thread;
  machine.of = of;
  machine.shared_bytes = shared_bytes;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  threadIdx = blockIdx = {};
  error.clear();
  unsigned char* const guard = page_behind(shared_base() + shared_bytes);
  const auto guarded = static_cast<std::size_t>(emulator_storage + kStorage - guard);
  mprotect(guard, guarded, PROT_NONE);
  bool right = true;
  for (; right && blockIdx.x < blocks; ++blockIdx.x) right = run_block(stacks);
  mprotect(guard, guarded, PROT_READ | PROT_WRITE);
  return right;
}

const char* latest_error() { return error.c_str(); }

// ---- shared memory

std::uint32_t shared_address(const void* shared) {
  const auto offset = static_cast<const unsigned char*>(shared) - emulator_storage;
  if (offset < 0 || static_cast<std::size_t>(offset) > kBefore + machine.shared_bytes) {
    fail("the 32-bit address of something that is not in dynamic shared memory");
  }
  return kReserved + static_cast<std::uint32_t>(offset);
}

unsigned char* at_shared(std::uint32_t address, std::size_t bytes) {
  const std::int64_t first =
      static_cast<std::int64_t>(address) - kReserved - static_cast<std::int64_t>(kBefore);
  if (first < 0 || first + bytes > machine.shared_bytes) {
    fail("a copy or product reaches byte " + std::to_string(first) + " of its " + shared_size());
  }
  return shared_base() + first;
}

unsigned char* seen_by_hardware(unsigned char* shared) {
  return late ? machine.hidden.data() + (shared - shared_base()) : shared;
}

void fence_shared_writes() {
  if (late) std::memcpy(machine.hidden.data(), shared_base(), machine.shared_bytes);
}

}  // namespace emulator

// ---- settings, see build.py

extern "C" __attribute__((visibility("default"))) void emulator_adversary(int late, int order,
                                                                          unsigned seed) {
  emulator::late = late != 0;
  emulator::order = static_cast<emulator::Order>(order);
  emulator::chance.seed(seed);
}

extern "C" __attribute__((visibility("default"))) void emulator_static_array(long start,
                                                                             unsigned long bytes) {
  emulator::static_arrays.emplace_back(start, bytes);
}
