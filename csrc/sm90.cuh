// Tiles of [T, heads, D] tensors on compute capability 9.0: their layout in shared memory, the bulk copies that fill
// them, and the products that read them.
//
// A tile is some tokens of one head, in 16-bit numbers. Its D columns are cut into panels of 64 and one of the rest
// (80 = 64 + 16). A panel is stored token after token, and swizzled within each token's 128, 64 or 32 bytes, in a way
// that both copies and products support. So a tile of `rows` tokens takes 2 D rows bytes, and zeroing whole rows works
// with any swizzle.
//
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Tensor swizzling modes"; the canonical
// layouts of operands as in CUTLASS's mma_sm90_desc.hpp.
#pragma once

#include <ptx.cuh>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common.cuh"

namespace geo_r1 {

constexpr int kPanel = 64;             // columns of a whole panel
constexpr int kWarpgroup = 128;        // threads that make a product together
constexpr int kProductRows = 64;       // rows of that product
constexpr int kTileAlignment = 1024;   // bytes after which a swizzle repeats
constexpr int kSharedLimit = 227 * 1024;

// The columns of a head: whole panels and the rest.
template <int D>
struct Head {
  static constexpr int whole = D / kPanel * kPanel;
  static constexpr int rest = D % kPanel;
  static_assert(whole == 0 || whole == kPanel || whole == 2 * kPanel, "a product is 64 or 128 columns wide");
  static_assert(rest == 0 || rest == 16 || rest == 32, "a panel is 16, 32 or 64 columns wide");
};

// The warpgroup of this thread, computed so that the compiler knows it is the same for a whole warp.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

template <int D>
__host__ __device__ constexpr int tile_bytes(int rows) {
  return 2 * D * rows;
}

__device__ __forceinline__ unsigned char* align_tile(unsigned char* shared) {
  return shared + (kTileAlignment - shared_address(shared) % kTileAlignment) % kTileAlignment;
}

// Calls function(T{}, D, num_consumers) with the dtype and, as constants, the head size and the number of warpgroups
// of 64 rows in a tile: one or two.
template <typename Function>
void with_configuration(const char* launcher, const Attention& x, std::int64_t tile_rows, Function&& function) {
  if (tile_rows != kProductRows && tile_rows != 2 * kProductRows) {
    throw std::runtime_error(std::string(launcher) + ": no kernel for tiles of " + std::to_string(tile_rows));
  }
  with_dtype<__half, __nv_bfloat16>(x.dtype, launcher, [&](auto t) {
    const auto is = [&](auto size) {
      if (x.head_size != decltype(size)::value) return false;
      tile_rows == kProductRows ? function(t, size, std::integral_constant<int, 1>{})
                                : function(t, size, std::integral_constant<int, 2>{});
      return true;
    };
    const auto any = [&](auto... sizes) { return (is(sizes) || ...); };
    if (!any(std::integral_constant<int, 16>{}, std::integral_constant<int, 32>{}, std::integral_constant<int, 64>{},
             std::integral_constant<int, 80>{}, std::integral_constant<int, 96>{},
             std::integral_constant<int, 128>{})) {
      throw std::runtime_error(std::string(launcher) + ": no kernel for heads of " + std::to_string(x.head_size));
    }
  });
}

// ---- copies

// The maps for copies from a [T, heads, D] tensor.
struct HeadMaps {
  CUtensorMap whole, rest;
};

// Describes boxes of `rows` tokens and `columns` columns of one head. Throws if the driver refuses.
inline CUtensorMap box_map(const char* launcher, DType dtype, void* address, std::int64_t num_tokens,
                           std::int64_t num_heads, std::int64_t head_size, std::int64_t stride_t,
                           std::int64_t stride_h, int columns, int rows) {
  static const auto encode = [launcher] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          launcher);
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string(launcher) + ": the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(head_size), static_cast<cuuint64_t>(num_heads),
                               static_cast<cuuint64_t>(num_tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(2 * stride_h), static_cast<cuuint64_t>(2 * stride_t)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map, dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, address,
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
      : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                      : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(launcher) + ": cuTensorMapEncodeTiled failed with " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

// For tiles of `rows` tokens, at most 256.
template <int D>
HeadMaps head_maps(const char* launcher, DType dtype, Pointer x, std::int64_t num_tokens, std::int64_t num_heads,
                   std::int64_t stride_t, std::int64_t stride_h, int rows) {
  HeadMaps maps = {};
  if constexpr (Head<D>::whole != 0) {
    maps.whole =
        box_map(launcher, dtype, x.address, num_tokens, num_heads, D, stride_t, stride_h, kPanel, rows);
  }
  if constexpr (Head<D>::rest != 0) {
    maps.rest =
        box_map(launcher, dtype, x.address, num_tokens, num_heads, D, stride_t, stride_h, Head<D>::rest, rows);
  }
  return maps;
}

template <int D>
__device__ __forceinline__ void prefetch_maps(const HeadMaps& maps) {
  if constexpr (Head<D>::whole != 0) prefetch_map(&maps.whole);
  if constexpr (Head<D>::rest != 0) prefetch_map(&maps.rest);
}

// Called by one thread: copies tokens [token, token + rows) of a head, with zeros past the tensor's last token.
template <int D, int rows>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const HeadMaps& maps, Barrier* full, int head,
                                          int token) {
#pragma unroll
  for (int column = 0; column < Head<D>::whole; column += kPanel) {
    copy_box(tile + tile_bytes<kPanel>(rows) * (column / kPanel), &maps.whole, full, column, head, token);
  }
  if constexpr (Head<D>::rest != 0) {
    copy_box(tile + tile_bytes<Head<D>::whole>(rows), &maps.rest, full, Head<D>::whole, head, token);
  }
}

// Called by `num_threads` threads: writes zeros to rows [first, rows) of a tile. These rows belong to other sequences,
// so their probabilities are zero, but zero times NaN is NaN.
template <int D, int rows>
__device__ __forceinline__ void zero_rows(unsigned char* tile, int first, int i_thread, int num_threads) {
  const auto zero_panel = [=](unsigned char* panel, int row_bytes) {
    for (int at = first * row_bytes + 16 * i_thread; at < rows * row_bytes; at += 16 * num_threads) {
      *reinterpret_cast<uint4*>(panel + at) = uint4{0, 0, 0, 0};
    }
  };
#pragma unroll
  for (int column = 0; column < Head<D>::whole; column += kPanel) {
    zero_panel(tile + tile_bytes<kPanel>(rows) * (column / kPanel), 2 * kPanel);
  }
  if constexpr (Head<D>::rest != 0) zero_panel(tile + tile_bytes<Head<D>::whole>(rows), 2 * Head<D>::rest);
}

// ---- products

// The descriptor of an operand in a panel of `columns`. `group_bytes` is the step between groups of 8 tokens, and
// `panel_bytes` the step between panels, for operands with columns in several. The operand n bytes further on is
// the descriptor + n / 16; making a new one would cost more than the product.
template <int columns>
__device__ __forceinline__ std::uint64_t operand(const unsigned char* start, int panel_bytes) {
  constexpr std::uint64_t swizzle = columns == 64 ? 1 : columns == 32 ? 2 : 3;  // 128, 64, 32 bytes
  constexpr std::uint64_t group_bytes = 8 * 2 * columns;
  return (shared_address(start) & 0x3ffff) >> 4 | static_cast<std::uint64_t>(panel_bytes >> 4) << 16 |
         (group_bytes >> 4) << 32 | swizzle << 62;
}

// d [64, N] = a b transposed, over D columns: 64 tokens of tile a, from `a_row` on, and N tokens of tile b.
template <typename T, int D, int N, int a_rows, int b_rows>
__device__ __forceinline__ void multiply_transposed(float (&d)[N / 2], const unsigned char* a, int a_row,
                                                    const unsigned char* b) {
  if constexpr (Head<D>::whole != 0) {
    const std::uint64_t a_operand = operand<kPanel>(a + tile_bytes<kPanel>(a_row), 16);
    const std::uint64_t b_operand = operand<kPanel>(b, 16);
#pragma unroll
    for (int column = 0; column < Head<D>::whole; column += 16) {
      const int panel = column / kPanel, inside = 2 * (column % kPanel);
      Product<T, N>::shared(d, a_operand + (tile_bytes<kPanel>(a_rows) * panel + inside) / 16,
                            b_operand + (tile_bytes<kPanel>(b_rows) * panel + inside) / 16, column != 0);
    }
  }
  if constexpr (Head<D>::rest != 0) {
    constexpr int rest = Head<D>::rest;
    const std::uint64_t a_operand =
        operand<rest>(a + tile_bytes<Head<D>::whole>(a_rows) + tile_bytes<rest>(a_row), 16);
    const std::uint64_t b_operand = operand<rest>(b + tile_bytes<Head<D>::whole>(b_rows), 16);
#pragma unroll
    for (int column = 0; column < rest; column += 16) {
      Product<T, N>::shared(d, a_operand + column / 8, b_operand + column / 8, Head<D>::whole != 0 || column != 0);
    }
  }
}

// A sum [64, D] in the registers of a warpgroup, see `Product`.
template <int D>
struct Sums {
  float whole[Head<D>::whole == 0 ? 1 : Head<D>::whole / 2];
  float rest[Head<D>::rest == 0 ? 1 : Head<D>::rest / 2];

  // Calls function(number, its row among the thread's two).
  template <typename Function>
  __device__ __forceinline__ void for_each(Function&& function) {
    if constexpr (Head<D>::whole != 0) {
#pragma unroll
      for (int i = 0; i < Head<D>::whole / 2; ++i) function(whole[i], i % 4 / 2);
    }
    if constexpr (Head<D>::rest != 0) {
#pragma unroll
      for (int i = 0; i < Head<D>::rest / 2; ++i) function(rest[i], i % 4 / 2);
    }
  }

  __device__ __forceinline__ void pin_all() {
    if constexpr (Head<D>::whole != 0) pin(whole);
    if constexpr (Head<D>::rest != 0) pin(rest);
  }
};

// sum [64, D] += p [64, N] x, with N tokens of tile x.
template <typename T, int D, int N, int x_rows>
__device__ __forceinline__ void multiply_add(Sums<D>& sum, const std::uint32_t (&p)[N / 16][4],
                                             const unsigned char* x) {
  constexpr int rest = Head<D>::rest == 0 ? 16 : Head<D>::rest;
  const std::uint64_t whole_operand = operand<kPanel>(x, tile_bytes<kPanel>(x_rows));
  const std::uint64_t rest_operand = operand<rest>(x + tile_bytes<Head<D>::whole>(x_rows), 16);
#pragma unroll
  for (int i = 0; i < N / 16; ++i) {
    if constexpr (Head<D>::whole != 0) {
      Product<T, Head<D>::whole>::registers(sum.whole, p[i], whole_operand + tile_bytes<kPanel>(16 * i) / 16);
    }
    if constexpr (Head<D>::rest != 0) {
      Product<T, rest>::registers(sum.rest, p[i], rest_operand + tile_bytes<rest>(16 * i) / 16);
    }
  }
}

template <int N>
__device__ __forceinline__ void pin_all(std::uint32_t (&p)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pin(p[i]);
}

// Rounds a product's result [64, N] to T, as the left operand of the next product.
template <typename T, int N>
__device__ __forceinline__ void round_to(std::uint32_t (&p)[N / 16][4], const float (&d)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) p[i / 4][i % 4] = pack<T>(d[2 * i], d[2 * i + 1]);
}

// The place of a thread's numbers in a product: the first of its two rows, the second being 8 below, and in each 8
// columns the first of its two.
struct Place {
  int row, column;

  __device__ __forceinline__ explicit Place(int i_thread)
      : row(i_thread % kWarpgroup / kWarp * 16 + i_thread % kWarp / 4), column(i_thread % 4 * 2) {}
};

// Writes the rows of a sum [64, D] before token `end`, starting at token `first`, each times its scale.
template <typename T, int D>
__device__ __forceinline__ void store_sum(T* x, std::int64_t stride_t, const Sums<D>& sum, Place place, int first,
                                          int end, float scale_0, float scale_1) {
  const auto store = [&](const auto& numbers, int columns, int from) {
#pragma unroll
    for (int i = 0; i < columns / 8; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = first + place.row + 8 * r;
        const float scale = r == 0 ? scale_0 : scale_1;
        if (token < end) {
          *reinterpret_cast<std::uint32_t*>(x + token * stride_t + from + 8 * i + place.column) =
              pack<T>(numbers[4 * i + 2 * r] * scale, numbers[4 * i + 2 * r + 1] * scale);
        }
      }
    }
  };
  if constexpr (Head<D>::whole != 0) store(sum.whole, Head<D>::whole, 0);
  if constexpr (Head<D>::rest != 0) store(sum.rest, Head<D>::rest, Head<D>::whole);
}

// ---- the blocks of keys that a tile of queries sees, see layout/tiles.py and attention/triton_forward.py

// First the blocks that need no mask, of the prefix and then of the segment, then the remaining ones of both.
template <int tile_rows, int block_rows>
struct KeyBlocks {
  int first, start, end;  // first query, its segment
  int prefix, prefix_end, key_end, rest, num_prefix, num_full, num_prefix_rest, count;

  __device__ __forceinline__ KeyBlocks(const int* tile, bool causal)
      : first(tile[0]), start(tile[1]), end(tile[2]), prefix(tile[3]), prefix_end(tile[4]) {
    static_assert(tile_rows % block_rows == 0, "blocks that need no mask end where the tile starts");
    key_end = causal ? min(first + tile_rows, end) : end;
    rest = causal ? first : end - (end - start) % block_rows;
    num_prefix = (prefix_end - prefix) / block_rows;
    num_full = num_prefix + (rest - start) / block_rows;
    num_prefix_rest = (prefix_end - prefix) % block_rows != 0;
    count = num_full + num_prefix_rest + (key_end - rest + block_rows - 1) / block_rows;
  }

  __device__ __forceinline__ bool masked(int i) const { return i >= num_full; }

  __device__ __forceinline__ int block_start(int i) const {
    if (i < num_prefix) return prefix + i * block_rows;
    if (i < num_full) return start + (i - num_prefix) * block_rows;
    i -= num_full;
    return i < num_prefix_rest ? prefix + num_prefix * block_rows : rest + (i - num_prefix_rest) * block_rows;
  }

  // The end of a masked block's keys.
  __device__ __forceinline__ int block_end(int i) const {
    return i - num_full < num_prefix_rest ? prefix_end : key_end;
  }
};

}  // namespace geo_r1
