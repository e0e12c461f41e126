// Threads of control that hand over to each other, each on its own stack.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

// Saves the registers that a function must preserve and its stack in *from, and continues `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

class Fiber {
 public:
  // Starts with entry(), which never returns. `top` is 16-byte aligned.
  void prepare(unsigned char*, unsigned char* top, void (*entry)()) {
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    stack_ = stack;
  }
  void go_to(Fiber& other) { emulator_switch(&stack_, other.stack_); }

 private:
  void* stack_;
};

#else

class Fiber {
 public:
  void prepare(unsigned char* bottom, unsigned char* top, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = static_cast<std::size_t>(top - bottom);
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void go_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

// Stacks for fibers, allocated once; below each is a page that faults.
class Stacks {
 public:
  explicit Stacks(int count) : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), step_(kBytes + page_) {
    void* at = mmap(nullptr, step_ * static_cast<std::size_t>(count), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(at);
    for (int i = 0; i < count; ++i) mprotect(memory_ + step_ * static_cast<std::size_t>(i), page_, PROT_NONE);
  }
  unsigned char* bottom(int i) const { return memory_ + step_ * static_cast<std::size_t>(i) + page_; }
  // Tops have different offsets in their pages; with one offset they would evict each other from the cache.
  unsigned char* top(int i) const { return bottom(i) + kBytes - 64 * (i % 32); }

 private:
  static constexpr std::size_t kBytes = 64 * 1024;
  std::size_t page_, step_;
  unsigned char* memory_;
};

}  // namespace emulator
