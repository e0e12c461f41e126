// Features of compute capability 9.0: bulk copies of boxes, and products by warpgroups.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kRows = 64, kDepth = 16, kMaxColumns = 128;
constexpr std::uint64_t kMagic = 0x7e2502a9;

// Within 2^bits chunks of 16 bytes, bits 7 and above of a byte's address change its chunk.
std::uint32_t swizzled(std::uint32_t address, int bits) {
  return address ^ (address >> 7 & ((1u << bits) - 1)) << 4;
}

// ---- boxes

struct Map {
  std::uint64_t magic;
  const unsigned char* address;
  std::uint64_t sizes[3], strides[3];  // strides in bytes
  std::uint32_t box[3];
  int swizzle_bits;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

void copy_now(const Map& map, std::uint32_t to, std::uint64_t* state, const std::array<std::int64_t, 3>& at) {
  const auto inside = [&](int axis, std::int64_t i) {
    return i >= 0 && static_cast<std::uint64_t>(i) < map.sizes[axis];
  };
  std::uint32_t address = to;
  for (std::uint32_t z = 0; z < map.box[2]; ++z) {
    for (std::uint32_t y = 0; y < map.box[1]; ++y) {
      const bool row_inside = inside(1, at[1] + y) && inside(2, at[2] + z);
      for (std::uint32_t x = 0; x < map.box[0]; x += 8, address += 16) {
        std::uint16_t chunk[8] = {};
        for (std::uint32_t i = 0; row_inside && i < 8; ++i) {
          const std::int64_t column = at[0] + x + i;
          if (!inside(0, column)) continue;
          std::memcpy(&chunk[i],
                      map.address + column * 2 + (at[1] + y) * static_cast<std::int64_t>(map.strides[1]) +
                          (at[2] + z) * static_cast<std::int64_t>(map.strides[2]),
                      2);
        }
        unsigned char* const byte = at_shared(swizzled(address, map.swizzle_bits), 16);
        std::memcpy(byte, chunk, 16);
        std::memcpy(seen_by_hardware(byte), chunk, 16);
      }
    }
  }
  deliver(state, address - to);
}

}  // namespace

void copy_box(void* shared, const CUtensorMap* map_given, std::uint64_t* state, int x, int y, int z) {
  Map map;
  std::memcpy(&map, map_given, sizeof(map));
  if (map.magic != kMagic) fail("copy_box by something that is not a map");
  check_barrier(state);
  const std::uint32_t to = shared_address(shared);
  if (to % 128 != 0) fail("copy_box to an address that 128 does not divide");
  const std::array<std::int64_t, 3> at = {x, y, z};
  if (late) {
    defer(Work::copy, [=] { copy_now(map, to, state, at); });
  } else {
    copy_now(map, to, state, at);
  }
  overtake();
}

// ---- products

namespace {

struct Issued {
  Product product;
  int lanes = 0;
  float left[kRows][kDepth], right[kDepth][kMaxColumns];  // read when the first lane issues, unless late
  struct Lane {
    float* d;
    const std::uint32_t* a;
  } lane[kWarpgroup];
};

struct Group {
  int end;  // one past its last product
  int committed = 0, waited_for = 0;
};

struct Warpgroup {
  std::deque<Issued> issued;  // not finished
  std::deque<Group> groups;   // likewise
  int first = 0, first_group = 0;
  std::vector<Thread*> waiting;
};
std::array<Warpgroup, kMaxThreads / kWarpgroup> warpgroups;

// An operand in shared memory, see "Matrix descriptor" in the PTX ISA and the canonical layouts in CUTLASS's
// mma_traits_sm90_gmma.hpp.
struct Operand {
  std::uint32_t start, leading, stride;
  int swizzle_bits;

  explicit Operand(std::uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle_bits(static_cast<int>(4 - (bits >> 62)) % 4) {
    if ((bits >> 49 & 7) != 0) fail("a product's operand with a base offset; none is known here");
  }

  std::uint16_t at(std::uint32_t offset) const {
    std::uint16_t x;
    std::memcpy(&x, seen_by_hardware(at_shared(swizzled(start + offset, swizzle_bits), 2)), 2);
    return x;
  }
  // A row of 16 bytes << swizzle_bits holds one row of the operand, 16 of its columns.
  std::uint16_t at_row_major(std::uint32_t row, std::uint32_t k) const {
    const std::uint32_t chunk = swizzle_bits == 0 ? k / 8 * leading + k % 8 * 2 : k * 2;
    return at(row / 8 * stride + row % 8 * (16u << swizzle_bits) + chunk);
  }
  // It holds one of the operand's 16 columns, 8 << swizzle_bits of its rows.
  std::uint16_t at_column_major(std::uint32_t row, std::uint32_t k) const {
    const std::uint32_t width = 8u << swizzle_bits;
    const std::uint32_t panel = row / width * (swizzle_bits == 0 ? stride : leading);
    return at(panel + row % width * 2 + k % 8 * (2 * width) + k / 8 * (swizzle_bits == 0 ? leading : stride));
  }
};

float number(bool bfloat16, std::uint16_t bits) {
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

void read_operands(Issued& op) {
  const Product& p = op.product;
  const Operand left(p.a), right(p.b);
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    for (std::uint32_t i = 0; !p.registers && i < kRows; ++i) {
      op.left[i][k] = number(p.bfloat16, left.at_row_major(i, k));
    }
    for (std::uint32_t j = 0; j < static_cast<std::uint32_t>(p.columns); ++j) {
      op.right[k][j] =
          number(p.bfloat16, p.registers ? right.at_column_major(j, k) : right.at_row_major(j, k));
    }
  }
}

// Row and column of a lane's pair of numbers: d[2 i] and the next of a sum, a[i] of a left operand.
std::pair<int, int> place(int lane, int i) {
  return {lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8, i / 2 * 8 + lane % 4 * 2};
}

void read_registers(Issued& op, int lane) {
  for (int i = 0; i < 4; ++i) {
    const auto [row, column] = place(lane, i);
    const std::uint32_t pair = op.lane[lane].a[i];
    op.left[row][column] = number(op.product.bfloat16, static_cast<std::uint16_t>(pair));
    op.left[row][column + 1] = number(op.product.bfloat16, static_cast<std::uint16_t>(pair >> 16));
  }
}

void multiply(const Issued& op) {
  static float sum[kRows][kMaxColumns];
  const int columns = op.product.columns;
  for (int i = 0; i < kRows; ++i) {
    std::fill(sum[i], sum[i] + columns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float left = op.left[i][k];
      for (int j = 0; j < columns; ++j) sum[i][j] += left * op.right[k][j];
    }
  }
  for (int lane = 0; lane < kWarpgroup; ++lane) {
    float* const d = op.lane[lane].d;
    for (int i = 0; i < columns / 4; ++i) {
      const auto [row, column] = place(lane, i);
      d[2 * i] = sum[row][column] + (op.product.add ? d[2 * i] : 0);
      d[2 * i + 1] = sum[row][column + 1] + (op.product.add ? d[2 * i + 1] : 0);
    }
  }
}

Warpgroup& own_warpgroup() {
  const int number = current->index / kWarpgroup;
  if ((number + 1) * kWarpgroup > num_threads()) fail("a product by less than a warpgroup");
  return warpgroups[static_cast<std::size_t>(number)];
}

void end_group(Warpgroup& w) {
  const Group group = w.groups.front();
  for (; w.first < group.end; ++w.first) {
    if (late) {
      Issued& op = w.issued.front();
      read_operands(op);
      for (int lane = 0; op.product.registers && lane < kWarpgroup; ++lane) read_registers(op, lane);
      multiply(op);
    }
    w.issued.pop_front();
  }
  w.groups.pop_front();
  ++w.first_group;
  for (Thread* t : std::exchange(w.waiting, {})) wake(*t);
}

}  // namespace

void product(const Product& product, float* d, const std::uint32_t* a) {
  Warpgroup& w = own_warpgroup();
  if (!current->product_fenced) fail("a product without product_fence since registers were last written");
  const auto at = static_cast<std::size_t>(current->products++ - w.first);
  if (at == w.issued.size()) {
    w.issued.emplace_back();
    w.issued.back().product = product;
    if (!late) read_operands(w.issued.back());
  }
  Issued& op = w.issued[at];
  if (!(op.product == product)) fail("lanes of a warpgroup issue different products");
  const int lane = current->index % kWarpgroup;
  op.lane[lane] = {d, a};
  if (!late && product.registers) read_registers(op, lane);
  if (++op.lanes == kWarpgroup && !late) multiply(op);
  overtake();
}

void product_fence() { current->product_fenced = true; }

void product_commit() {
  Warpgroup& w = own_warpgroup();
  const auto at = static_cast<std::size_t>(current->product_groups++ - w.first_group);
  if (at == w.groups.size()) w.groups.push_back({current->products});
  Group& group = w.groups[at];
  if (group.end != current->products) fail("lanes of a warpgroup commit different products");
  if (++group.committed == kWarpgroup && !late) end_group(w);
}

void product_wait(int pending) {
  Warpgroup& w = own_warpgroup();
  overtake();
  const int target = std::max(current->product_groups - pending, current->product_groups_waited);
  for (int& i = current->product_groups_waited; i < target; ++i) {
    if (!late) continue;
    Group& group = w.groups[static_cast<std::size_t>(i - w.first_group)];
    if (++group.waited_for == kWarpgroup) defer(Work::product, [&w] { end_group(w); });
  }
  current->product_fenced = false;
  while (w.first_group < target) {
    w.waiting.push_back(current);
    sleep([](const Thread&) {
      return std::string("wait for products that not all of their warpgroup have reached");
    });
  }
}

void reset_products() { warpgroups.fill({}); }

void check_products() {
  const Warpgroup& w = warpgroups[static_cast<std::size_t>(current->index / kWarpgroup)];
  if (current->products != 0 && current->products != w.first)
    fail("ends with products that it did not wait for");
}

}  // namespace emulator

// Refuses what the driver refuses, and anything this file does not support.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map_made, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!emulator::has_context) return CUDA_ERROR_INVALID_CONTEXT;
  const auto misaligned = [](const void* x, std::uintptr_t to) {
    return reinterpret_cast<std::uintptr_t>(x) % to != 0;
  };
  if (map_made == nullptr || misaligned(map_made, 64) || address == nullptr || misaligned(address, 16) ||
      rank != 3) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  emulator::Map map = {emulator::kMagic, static_cast<unsigned char*>(address), {}, {2, 0, 0}, {}, swizzle};
  for (int i = 0; i < 3; ++i) {
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (sizes[i] == 0 || sizes[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  for (int i = 0; i < 2; ++i) {
    map.strides[i + 1] = strides[i];
    if (strides[i] % 16 != 0 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
  }
  // A row narrower than its swizzle is legal too, but its layout in shared memory is not documented.
  const std::uint32_t row_bytes = 2 * box[0];
  if (row_bytes % 16 != 0 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row_bytes != 16u << swizzle)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(map_made, &map, sizeof(map));
  return CUDA_SUCCESS;
}
