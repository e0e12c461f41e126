// Packed attention backward for compute capability 9.0: dq by tiles of queries, dk and dv by tiles of keys.
//
//     p_ij = 2^(s_ij log2 e - lse_i),   delta_i = dout_i . out_i,   ds_ij = p_ij (dout_i . v_j - delta_i)
//     dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dout_i
//
// Both kernels have the same structure: a block holds a tile in shared memory, one warp fetches the other side's
// tokens with bulk copies, a block at a time, and warpgroups of 64 rows each consume them. One range of queries sees
// a tile of keys, so a prompt's gradients are summed over its completions in registers, in a fixed order, without
// atomics. If several query heads share a key head, each writes its own dk and dv, which the caller sums. The dq
// kernel runs first and stores delta.
//
// The kernel of dk and dv computes scores transposed. So in both kernels probabilities and their derivatives serve
// as left operands straight from the registers that they were computed in.
//
// Operations: 14 D per visible pair and head; scores and dout . v are computed twice. Bytes: as in
// attention/triton_backward.py. Nothing was measured.
//
// Source: FlashAttention-2, arXiv:2307.08691, and -3, arXiv:2407.08608.

#include <ptx.cuh>

#include <cstring>

#include "common.cuh"
#include "sm90.cuh"

namespace geo_r1 {
namespace {

constexpr const char* kName = "packed_attention_backward";
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kZeroing = 1;  // number of the meeting after rows were zeroed

struct Parameters {
  HeadMaps tile_a, tile_b, block_a, block_b;  // dq: q, dout and k, v; dk and dv: k, v and q, dout
  const void *out, *d_out;
  const float* lse;
  float* delta;
  void *dq, *dk, *dv;
  const int* tiles;
  std::int64_t num_tokens, stride_do_t, stride_do_h;
  int num_heads, num_shared;
  float scale, scale_log2;
  bool causal;
};

// Two warpgroups of consumers: tiles of 128, one block per SM, 129 KiB at D = 128. One warpgroup: tiles of 64 for
// segments of at most 64 tokens, such as windows of a vision tower; one to three blocks per SM.
template <int D, int num_consumers>
struct Shape {
  static constexpr int tile = kProductRows * num_consumers;
  static constexpr int block = 32 * num_consumers;  // tokens fetched at a time
  static constexpr int stages = 2;
  static constexpr int producers = num_consumers == 1 ? kWarp : kWarpgroup;  // only a warpgroup can give up registers
  static constexpr int threads = kWarpgroup * num_consumers + producers;
  static constexpr int blocks_sm = num_consumers == 2 || D > 96 ? 1 : D > 32 ? 2 : 3;
  static constexpr int tile_size = tile_bytes<D>(tile);
  static constexpr int block_size = tile_bytes<D>(block);
  static constexpr int row_size = 4 * block;  // of lse and of delta
  static constexpr int bytes =
      kTileAlignment + 2 * tile_size + 2 * stages * (block_size + row_size) + 8 * (1 + 2 * stages);
  static_assert(tile_size % kTileAlignment == 0 && block_size % kTileAlignment == 0, "every tile starts a swizzle");
  static_assert(blocks_sm * (bytes + 1024) <= kSharedLimit + 1024, "the device reserves 1 KiB a block");
};

// The layout of a block's shared memory.
template <int D, int num_consumers>
struct Memory {
  using S = Shape<D, num_consumers>;
  unsigned char *tile_a, *tile_b, *block_a, *block_b;
  float *lse, *delta;  // of the queries of a block, for dk and dv
  Barrier *tile_full, *full, *empty;

  __device__ __forceinline__ explicit Memory(unsigned char* shared)
      : tile_a(align_tile(shared)),
        tile_b(tile_a + S::tile_size),
        block_a(tile_b + S::tile_size),
        block_b(block_a + S::stages * S::block_size),
        lse(reinterpret_cast<float*>(block_b + S::stages * S::block_size)),
        delta(lse + S::stages * S::block),
        tile_full(reinterpret_cast<Barrier*>(delta + S::stages * S::block)),
        full(tile_full + 1),
        empty(full + S::stages) {}

  __device__ __forceinline__ void init_barriers(int filling_arrivals, int num_active) {
    if (threadIdx.x == 0) {
      barrier_init(tile_full, 1);
      for (int i = 0; i < S::stages; ++i) {
        barrier_init(full + i, filling_arrivals);
        barrier_init(empty + i, num_active * kWarpgroup / kWarp);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void copy_tiles(const Parameters& p, int head, int token) {
    barrier_arrive_expect(tile_full, 2 * S::tile_size);
    copy_tile<D, S::tile>(tile_a, p.tile_a, tile_full, head, token);
    copy_tile<D, S::tile>(tile_b, p.tile_b, tile_full, head, token);
  }

  __device__ __forceinline__ void wait_empty(int i) { barrier_wait(empty + i % S::stages, i / S::stages % 2 ^ 1); }

  __device__ __forceinline__ void copy_blocks(const Parameters& p, int i, int head, int token) {
    const int stage = i % S::stages;
    barrier_arrive_expect(full + stage, 2 * S::block_size);
    copy_tile<D, S::block>(block_a + stage * S::block_size, p.block_a, full + stage, head, token);
    copy_tile<D, S::block>(block_b + stage * S::block_size, p.block_b, full + stage, head, token);
  }

  // Consumers wait for block i, whose first `valid` tokens belong to the sequence.
  __device__ __forceinline__ void wait_full(int i, int valid, int num_active) {
    const int stage = i % S::stages;
    barrier_wait(full + stage, i / S::stages % 2);
    if (valid < S::block) {  // the same for all consumers
      zero_rows<D, S::block>(block_a + stage * S::block_size, valid, threadIdx.x, kWarpgroup * num_active);
      zero_rows<D, S::block>(block_b + stage * S::block_size, valid, threadIdx.x, kWarpgroup * num_active);
      fence_shared_writes();
      meeting_sync(kZeroing, kWarpgroup * num_active);
    }
  }

  __device__ __forceinline__ void release(int i) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty + i % S::stages);
  }
};

// Starts the products of tile a (scores) and of tile b with a block, each in its own group.
template <typename T, int D, int num_consumers>
__device__ __forceinline__ void start_products(const Memory<D, num_consumers>& memory, int i, int group_row,
                                               float (&s)[Shape<D, num_consumers>::block / 2],
                                               float (&dp)[Shape<D, num_consumers>::block / 2]) {
  using S = Shape<D, num_consumers>;
  const int at = i % S::stages * S::block_size;
  pin(s), pin(dp);
  product_fence();
  multiply_transposed<T, D, S::block, S::tile, S::block>(s, memory.tile_a, group_row, memory.block_a + at);
  product_commit();
  multiply_transposed<T, D, S::block, S::tile, S::block>(dp, memory.tile_b, group_row, memory.block_b + at);
  product_commit();
}

// Starts sum += left x, for block x, in its own group.
template <typename T, int D, int steps>
__device__ __forceinline__ void start_sum(Sums<D>& sum, std::uint32_t (&left)[steps][4], const unsigned char* x) {
  sum.pin_all(), pin_all(left);
  product_fence();
  multiply_add<T, D, 16 * steps, 16 * steps>(sum, left, x);
  product_commit();
}

template <int D>
__device__ __forceinline__ void set_zero(Sums<D>& sum) {
  sum.for_each([](float& x, int) { x = 0; });
}

// dout . out of a token, the same on all four lanes that hold its row.
template <typename T, int D>
__device__ __forceinline__ float token_delta(const Parameters& p, int head, int token, bool valid) {
  float sum = 0;
  if (valid) {
    const T* const out = static_cast<const T*>(p.out) + (token * static_cast<std::int64_t>(p.num_heads) + head) * D;
    const T* const d_out = static_cast<const T*>(p.d_out) + token * p.stride_do_t + head * p.stride_do_h;
    for (int i = threadIdx.x % 4 * 8; i < D; i += 32) {
      alignas(16) T x[8], y[8];  // 16 bytes at once
      std::memcpy(x, __builtin_assume_aligned(out + i, 16), sizeof x);
      std::memcpy(y, __builtin_assume_aligned(d_out + i, 16), sizeof y);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(to_float(x[j]), to_float(y[j]), sum);
    }
  }
  return warp_sum<4>(sum);
}

template <typename T, int D, int num_consumers>
__device__ void consume_keys(const Parameters& p, const KeyBlocks<Shape<D, num_consumers>::tile,
                             Shape<D, num_consumers>::block>& blocks, int head,
                             Memory<D, num_consumers>& memory, int num_active) {
  using S = Shape<D, num_consumers>;
  const int group_row = warpgroup() * kProductRows;
  const Place place(threadIdx.x);
  const int query = blocks.first + group_row + place.row;
  float lse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool valid = query + 8 * r < blocks.end;
    const std::int64_t at = head * p.num_tokens + query + 8 * r;
    delta[r] = token_delta<T, D>(p, head, query + 8 * r, valid);
    lse[r] = valid ? p.lse[at] : 0;
    if (valid && place.column == 0) p.delta[at] = delta[r];
  }

  Sums<D> dq;
  set_zero(dq);
  float s[S::block / 2], dp[S::block / 2];
  std::uint32_t ds[S::block / 16][4];
  barrier_wait(memory.tile_full, 0);
  for (int i = 0; i < blocks.count; ++i) {
    const bool masked = blocks.masked(i);
    const int key = blocks.block_start(i), end = masked ? blocks.block_end(i) : key + S::block;
    memory.wait_full(i, end - key, num_active);
    start_products<T>(memory, i, group_row, s, dp);
    product_wait<2>();  // the sum of the previous block
    dq.pin_all(), pin_all(ds);
    if (i > 0) memory.release(i - 1);
    product_wait<1>();
    pin(s);
#pragma unroll
    for (int j = 0; j < S::block / 2; ++j) s[j] = exp2_fast(fmaf(s[j], p.scale_log2, -lse[j % 4 / 2]));
    if (masked) {  // this branch keeps ptxas from moving the exponentials behind the wait
      const int column = key + place.column;
#pragma unroll
      for (int j = 0; j < S::block / 2; ++j) {
        const int limit = p.causal ? min(end, query + j % 4 / 2 * 8 + 1) : end;
        if (column + j / 4 * 8 + j % 2 >= limit) s[j] = 0;
      }
    }
    product_wait<0>();
    pin(dp);
#pragma unroll
    for (int j = 0; j < S::block / 2; ++j) s[j] *= dp[j] - delta[j % 4 / 2];
    round_to<T, S::block>(ds, s);
    start_sum<T>(dq, ds, memory.block_a + i % S::stages * S::block_size);
  }
  product_wait<0>();
  dq.pin_all();
  store_sum<T, D>(static_cast<T*>(p.dq) + head * D, static_cast<std::int64_t>(p.num_heads) * D, dq, place,
                  blocks.first + group_row, blocks.end, p.scale, p.scale);
}

template <typename T, int D, int num_consumers>
__global__ void __launch_bounds__(Shape<D, num_consumers>::threads, Shape<D, num_consumers>::blocks_sm)
    query_gradient_kernel(const __grid_constant__ Parameters p) {
  using S = Shape<D, num_consumers>;
  extern __shared__ unsigned char shared_memory[];
  Memory<D, num_consumers> memory(shared_memory);
  const int i_tile = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const KeyBlocks<S::tile, S::block> blocks(p.tiles + 5 * static_cast<std::int64_t>(i_tile), p.causal);
  // Warpgroups whose rows are all past the segment's end have nothing to do.
  const int num_active = min(num_consumers, (blocks.end - blocks.first + kProductRows - 1) / kProductRows);
  memory.init_barriers(1, num_active);

  const int group = warpgroup();
  if (group == num_consumers) {
    if constexpr (num_consumers == 2) registers_lower<24>();
    if (threadIdx.x == num_consumers * kWarpgroup) {
      prefetch_maps<D>(p.tile_a), prefetch_maps<D>(p.tile_b);
      prefetch_maps<D>(p.block_a), prefetch_maps<D>(p.block_b);
      memory.copy_tiles(p, head, blocks.first);
      for (int i = 0; i < blocks.count; ++i) {
        memory.wait_empty(i);
        memory.copy_blocks(p, i, head / p.num_shared, blocks.block_start(i));
      }
    }
  } else {
    if constexpr (num_consumers == 2) registers_raise<240>();
    if (group < num_active) consume_keys<T>(p, blocks, head, memory, num_active);
  }
}

// The queries that see a tile of keys.
template <int block>
struct Queries {
  int first, end, start, stop, count;  // first key, end of its segment; range of queries

  __device__ __forceinline__ Queries(const int* tile, bool causal)
      : first(tile[0]), end(tile[1]), start(causal ? tile[0] : tile[2]), stop(tile[3]) {
    count = (stop - start + block - 1) / block;
  }
};

template <typename T, int D, int num_consumers>
__device__ void consume_queries(const Parameters& p, const Queries<Shape<D, num_consumers>::block>& queries, int head,
                                Memory<D, num_consumers>& memory, int num_active) {
  using S = Shape<D, num_consumers>;
  const int group_row = warpgroup() * kProductRows;
  const Place place(threadIdx.x);
  Sums<D> dk, dv;
  set_zero(dk), set_zero(dv);
  float s[S::block / 2], dp[S::block / 2];
  std::uint32_t probability[S::block / 16][4], ds[S::block / 16][4];
  barrier_wait(memory.tile_full, 0);
  for (int i = 0; i < queries.count; ++i) {
    const int query = queries.start + i * S::block, stage = i % S::stages;
    memory.wait_full(i, queries.stop - query, num_active);
    product_wait<1>();  // dv of the previous block: there are too few registers to keep its operand
    dv.pin_all(), pin_all(probability);
    start_products<T>(memory, i, group_row, s, dp);
    product_wait<2>();  // dk of the previous block
    dk.pin_all(), pin_all(ds);
    if (i > 0) memory.release(i - 1);
    product_wait<1>();
    pin(s);
    const float* const lse = memory.lse + stage * S::block + place.column;
#pragma unroll
    for (int j = 0; j < S::block / 2; ++j) s[j] = exp2_fast(fmaf(s[j], p.scale_log2, -lse[j / 4 * 8 + j % 2]));
    if (p.causal && query < queries.first + S::tile) {
      const int behind = query + place.column - (queries.first + group_row + place.row);  // the key
#pragma unroll
      for (int j = 0; j < S::block / 2; ++j) {
        if (j / 4 * 8 + j % 2 + behind < j % 4 / 2 * 8) s[j] = 0;
      }
    }
    round_to<T, S::block>(probability, s);
    start_sum<T>(dv, probability, memory.block_b + stage * S::block_size);
    product_wait<1>();
    pin(dp);
    const float* const delta = memory.delta + stage * S::block + place.column;
#pragma unroll
    for (int j = 0; j < S::block / 2; ++j) s[j] *= dp[j] - delta[j / 4 * 8 + j % 2];
    round_to<T, S::block>(ds, s);
    start_sum<T>(dk, ds, memory.block_a + stage * S::block_size);
  }
  product_wait<0>();
  dk.pin_all(), dv.pin_all();
  const std::int64_t stride_t = static_cast<std::int64_t>(p.num_heads) * D;
  const int first = queries.first + group_row;
  store_sum<T, D>(static_cast<T*>(p.dk) + head * D, stride_t, dk, place, first, queries.end, p.scale, p.scale);
  store_sum<T, D>(static_cast<T*>(p.dv) + head * D, stride_t, dv, place, first, queries.end, 1, 1);
}

template <typename T, int D, int num_consumers>
__global__ void __launch_bounds__(Shape<D, num_consumers>::threads, Shape<D, num_consumers>::blocks_sm)
    key_gradient_kernel(const __grid_constant__ Parameters p) {
  using S = Shape<D, num_consumers>;
  extern __shared__ unsigned char shared_memory[];
  Memory<D, num_consumers> memory(shared_memory);
  const int i_tile = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const Queries<S::block> queries(p.tiles + 4 * static_cast<std::int64_t>(i_tile), p.causal);
  const int num_active = min(num_consumers, (queries.end - queries.first + kProductRows - 1) / kProductRows);
  memory.init_barriers(kWarp, num_active);

  const int group = warpgroup();
  if (group == num_consumers) {
    if constexpr (num_consumers == 2) registers_lower<24>();
    const int lane = threadIdx.x - num_consumers * kWarpgroup;
    if (lane >= kWarp) return;
    if (lane == 0) {
      prefetch_maps<D>(p.tile_a), prefetch_maps<D>(p.tile_b);
      prefetch_maps<D>(p.block_a), prefetch_maps<D>(p.block_b);
      memory.copy_tiles(p, head / p.num_shared, queries.first);
    }
    for (int i = 0; i < queries.count; ++i) {
      const int stage = i % S::stages, query = queries.start + i * S::block;
      memory.wait_empty(i);
      for (int j = lane; j < S::block; j += kWarp) {  // infinity past the last query: a probability of 2^-inf
        const bool valid = query + j < queries.stop;
        const std::int64_t at = head * p.num_tokens + query + j;
        memory.lse[stage * S::block + j] = valid ? p.lse[at] : INFINITY;
        memory.delta[stage * S::block + j] = valid ? p.delta[at] : 0;
      }
      if (lane == 0) {
        memory.copy_blocks(p, i, head, query);
      } else {
        barrier_arrive(memory.full + stage);
      }
    }
  } else {
    if constexpr (num_consumers == 2) registers_raise<240>();
    if (group < num_active) consume_queries<T>(p, queries, head, memory, num_active);
  }
}

template <typename T, int D, int num_consumers>
void backward(Queue queue, const Attention& x, const AttentionBackward& y) {
  using S = Shape<D, num_consumers>;
  const auto maps = [&](Pointer tensor, std::int64_t heads, std::int64_t stride_t, std::int64_t stride_h, int rows) {
    return head_maps<D>(kName, x.dtype, tensor, x.num_tokens, heads, stride_t, stride_h, rows);
  };
  const auto q = [&](int rows) { return maps(x.q, x.num_heads, x.stride_q_t, x.stride_q_h, rows); };
  const auto k = [&](int rows) { return maps(x.k, x.num_key_heads, x.stride_k_t, x.stride_k_h, rows); };
  const auto v = [&](int rows) { return maps(x.v, x.num_key_heads, x.stride_v_t, x.stride_v_h, rows); };
  const auto d_out = [&](int rows) { return maps(y.d_out, x.num_heads, y.stride_do_t, y.stride_do_h, rows); };
  Parameters p = {};
  p.out = y.out.address, p.d_out = y.d_out.address;
  p.lse = y.lse.as<const float>(), p.delta = y.delta.as<float>();
  p.dq = y.dq.address, p.dk = y.dk.address, p.dv = y.dv.address;
  p.num_tokens = x.num_tokens, p.stride_do_t = y.stride_do_t, p.stride_do_h = y.stride_do_h;
  p.num_heads = static_cast<int>(x.num_heads), p.num_shared = static_cast<int>(x.num_heads / x.num_key_heads);
  p.scale = x.scale, p.scale_log2 = x.scale * kLog2E, p.causal = x.causal;

  p.tiles = y.query_tiles.as<const int>();
  p.tile_a = q(S::tile), p.tile_b = d_out(S::tile), p.block_a = k(S::block), p.block_b = v(S::block);
  launch(kName, queue, query_gradient_kernel<T, D, num_consumers>, y.num_tiles * x.num_heads, S::threads, S::bytes, p);
  p.tiles = y.key_tiles.as<const int>();
  p.tile_a = k(S::tile), p.tile_b = v(S::tile), p.block_a = q(S::block), p.block_b = d_out(S::block);
  launch(kName, queue, key_gradient_kernel<T, D, num_consumers>, y.num_tiles * x.num_heads, S::threads, S::bytes, p);
}

}  // namespace

void packed_attention_backward(Queue queue, const Attention& x, const AttentionBackward& y) {
  if (x.num_tokens == 0) return;
  const DeviceGuard guard(queue.device, kName);
  with_configuration(kName, x, y.tile_rows, [&](auto t, auto head_size, auto num_consumers) {
    backward<decltype(t), decltype(head_size)::value, decltype(num_consumers)::value>(queue, x, y);
  });
}

}  // namespace geo_r1
