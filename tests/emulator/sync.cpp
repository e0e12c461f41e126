// How threads wait: for lanes of their warp, at meetings, for their own copies, at barriers.
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {
namespace {

constexpr int kMeetings = 16;

struct Meeting {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

struct BarrierState {
  std::uint64_t* state;
  int arrivals, pending;
  std::int64_t bytes;  // promised but not arrived
  int parity;
  Thread* maker;
  bool fenced;
  std::vector<Thread*> waiting;
};

std::array<unsigned, kMaxThreads / kWarp> lanes_waiting;  // a bit for each lane of a warp
std::array<Meeting, kMeetings> meetings;
std::vector<BarrierState> barriers;

}  // namespace

void reset_sync() {
  lanes_waiting.fill(0);
  meetings.fill({});
  barriers.clear();
}

// ---- lanes

namespace {

std::string waits_for_lanes(const Thread& thread) {
  char mask[9];
  std::snprintf(mask, sizeof(mask), "%08x", thread.mask);
  return std::string("wait for other lanes of mask ") + mask;
}

}  // namespace

std::uint64_t exchange(unsigned mask, std::uint64_t value, int source) {
  const int lane = current->index % kWarp;
  Thread* const warp = current - lane;
  unsigned& waiting = lanes_waiting[static_cast<std::size_t>(current->index / kWarp)];
  if ((mask >> lane & 1) == 0) fail("a lane outside of the mask that it gives");
  if (source >= 0 && (mask >> source & 1) == 0) fail("a shuffle from a lane outside of the mask");
  current->mask = mask;
  current->source = source;
  current->value = value;
  waiting |= 1u << lane;
  if ((waiting & mask) != mask) {
    sleep(waits_for_lanes);
    return current->value;
  }
  // The last one to arrive gives each its value.
  std::array<std::uint64_t, kWarp> values = {};
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (warp[i].mask != mask) fail("lanes meet with different masks");
    if ((warp[i].source < 0) != (source < 0)) fail("a shuffle meets a __syncwarp");
    values[static_cast<std::size_t>(i)] = warp[i].value;
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (source >= 0) warp[i].value = values[static_cast<std::size_t>(warp[i].source)];
    if (i != lane) wake(warp[i]);
  }
  waiting &= ~mask;
  overtake();
  return current->value;
}

// ---- meetings

namespace {

std::string waits_at_meeting(const Thread& thread) {
  const Meeting& m = meetings[static_cast<std::size_t>(thread.number)];
  return "wait at meeting " + std::to_string(thread.number) + ", where " + std::to_string(m.arrived) +
         " of " + std::to_string(m.expected) + " are";
}

Meeting& arrive(int number, int threads) {
  const std::string name = "meeting " + std::to_string(number);
  if (number < 0 || number >= kMeetings) fail(name + "; there are 0 to 15");
  if (number != 0 && (threads % kWarp != 0 || threads < kWarp || threads > num_threads())) {
    fail(name + " of " + std::to_string(threads) + " threads");
  }
  Meeting& m = meetings[static_cast<std::size_t>(number)];
  if (m.arrived != 0 && m.expected != threads) {
    fail(name + " of " + std::to_string(threads) + " threads, but " + std::to_string(m.expected) +
         " for those who are there");
  }
  m.expected = threads;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    for (Thread* t : std::exchange(m.waiting, {})) wake(*t);
  }
  return m;
}

}  // namespace

void meeting_sync(int number, int threads) {
  Meeting& m = arrive(number, threads);
  if (m.arrived == 0) return overtake();
  m.waiting.push_back(current);
  sleep(waits_at_meeting, number);
}

void meeting_arrive(int number, int threads) {
  arrive(number, threads);
  overtake();
}

// ---- copies by every thread for itself

namespace {

void perform(const Copy16& copy) {
  unsigned char bytes[16] = {};
  std::memcpy(bytes, copy.global, static_cast<std::size_t>(copy.bytes));
  std::memcpy(copy.shared, bytes, 16);
}

}  // namespace

void copy_16(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0)
    fail("copy_16 to an address that 16 does not divide");
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    fail("copy_16 from an address that 16 does not divide");
  if (bytes < 0 || bytes > 16) fail("copy_16 of " + std::to_string(bytes) + " bytes");
  const Copy16 copy = {shared, global, bytes, current->copy_groups};
  late ? current->copies.push_back(copy) : perform(copy);
}

void copy_commit() { ++current->copy_groups; }

void copy_wait(int pending) {
  auto& copies = current->copies;
  for (; !copies.empty() && copies.front().group < current->copy_groups - pending; copies.pop_front()) {
    perform(copies.front());
  }
  overtake();
}

// ---- barriers: the 8 bytes of a barrier hold its number and a mark that shows foreign writes

namespace {

constexpr std::uint64_t kMark = 0xba771e20ull << 32;

BarrierState& barrier_at(std::uint64_t* state) {
  const std::uint64_t number = *state ^ kMark;
  if (number >= barriers.size() || barriers[number].state != state) {
    fail("a barrier that was not initialised, or was overwritten");
  }
  BarrierState& b = barriers[number];
  if (b.maker != current && !b.fenced)
    fail("a barrier that another thread initialised without fence_barrier_init");
  return b;
}

void end_phase(BarrierState& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.pending = b.arrivals;
  for (Thread* t : std::exchange(b.waiting, {})) wake(*t);
}

std::string waits_at_barrier(const Thread& thread) {
  const BarrierState& b = barriers[static_cast<std::size_t>(thread.number)];
  return "wait at barrier " + std::to_string(thread.number) + ", whose phase of parity " +
         std::to_string(b.parity) + " lacks " + std::to_string(b.pending) + " arrivals and " +
         std::to_string(b.bytes) + " bytes";
}

}  // namespace

void check_barrier(std::uint64_t* state) { barrier_at(state); }

void barrier_init(std::uint64_t* state, int arrivals) {
  if (reinterpret_cast<std::uintptr_t>(state) % 8 != 0)
    fail("a barrier at an address that 8 does not divide");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier of " + std::to_string(arrivals) + " arrivals");
  *state = kMark ^ barriers.size();
  barriers.push_back({state, arrivals, arrivals, 0, 0, current, false, {}});
}

void fence_barrier_init() {
  for (BarrierState& b : barriers) b.fenced = b.fenced || b.maker == current;
}

void barrier_arrive(std::uint64_t* state, int promised_bytes) {
  BarrierState& b = barrier_at(state);
  if (b.pending == 0) fail("arrives at a barrier that expects no more arrivals in this phase");
  --b.pending;
  b.bytes += promised_bytes;
  end_phase(b);
  overtake();
}

void deliver(std::uint64_t* state, std::int64_t bytes) {
  BarrierState& b = barrier_at(state);
  b.bytes -= bytes;
  end_phase(b);
}

// Checks again when woken: the next phase may have ended by then, and it keeps waiting, as on hardware.
void barrier_wait(std::uint64_t* state, int parity) {
  if (parity != 0 && parity != 1) fail("a barrier's parity of " + std::to_string(parity));
  overtake();
  for (;;) {
    BarrierState& b = barrier_at(state);
    if (b.parity != parity) return;
    b.waiting.push_back(current);
    sleep(waits_at_barrier, static_cast<int>(&b - barriers.data()));
  }
}

}  // namespace emulator
