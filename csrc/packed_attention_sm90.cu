// Packed attention forward for compute capability 9.0.
//
//     s_ij = scale q_i . k_j,   lse_i = log2 sum_j 2^(s_ij log2 e),   out_i = sum_j 2^(s_ij log2 e - lse_i) v_j
//
// A block has one tile of queries and one head, and walks the same blocks of keys as the Triton kernel: first those of
// the prefix and of its own segment that need no mask, see `KeyBlocks`. One warp fetches keys and values with bulk
// copies, some blocks ahead; warpgroups of 64 queries each consume them. While a warpgroup computes the probabilities
// of a block, it still multiplies those of the previous block by their values. Two warpgroups take turns, so that
// the tensor cores work for one while the other computes exponentials.
//
// Operations: 4 D per visible pair and head. Bytes: q and out once, k and v once per tile of queries, from L2 if
// neighbouring blocks (heads that share keys) have read them. Nothing was measured.
//
// Source: FlashAttention-3, arXiv:2407.08608; the walk, geo_r1/kernels/layout/tiles.py.

#include <ptx.cuh>

#include "common.cuh"
#include "sm90.cuh"

namespace geo_r1 {
namespace {

constexpr const char* kName = "packed_attention_forward";
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kZeroing = 1;  // number of the meeting after rows were zeroed
constexpr int kTurn = 2;     // this one and the next: the warpgroups' turns

struct Parameters {
  HeadMaps q, k, v;
  void* out;
  float* lse;
  const int* tiles;
  std::int64_t num_tokens;
  int num_heads, num_shared;
  float scale_log2;
  bool causal;
};

// Sizes of one configuration. Two warpgroups of consumers: tiles of 128 queries and 128 keys, one block per SM, 160 KiB
// at D = 128. One warpgroup: tiles of 64 for segments of at most 64 tokens, such as windows of a vision tower; two or
// three blocks per SM, whose copies overlap if a tile has only one block of keys.
template <int D, int num_consumers>
struct Shape {
  static constexpr int tile = kProductRows * num_consumers;
  static constexpr int block = tile;
  static constexpr int stages = 2;
  static constexpr int producers = num_consumers == 1 ? kWarp : kWarpgroup;  // only a warpgroup can give up registers
  static constexpr int threads = kWarpgroup * num_consumers + producers;
  static constexpr int blocks_sm = num_consumers == 2 ? 1 : D == 128 ? 2 : 3;
  static constexpr int q_bytes = tile_bytes<D>(tile);
  static constexpr int kv_bytes = tile_bytes<D>(block);
  static constexpr int bytes = kTileAlignment + q_bytes + 2 * stages * kv_bytes + 8 * (1 + 4 * stages);
  static_assert(q_bytes % kTileAlignment == 0 && kv_bytes % kTileAlignment == 0, "every tile starts a swizzle");
  static_assert(blocks_sm * (bytes + 1024) <= kSharedLimit + 1024, "the device reserves 1 KiB a block");
};

template <int stages>
struct Barriers {
  Barrier q_full;
  Barrier k_full[stages], v_full[stages], k_empty[stages], v_empty[stages];
};

// Fetches q, then k and v block by block, each into a free stage.
template <int D, int num_consumers>
__device__ void produce(const Parameters& p, const KeyBlocks<Shape<D, num_consumers>::tile,
                        Shape<D, num_consumers>::block>& blocks, int head, unsigned char* q,
                        unsigned char* k, unsigned char* v, Barriers<Shape<D, num_consumers>::stages>& barriers) {
  using S = Shape<D, num_consumers>;
  const int key_head = head / p.num_shared;
  barrier_arrive_expect(&barriers.q_full, S::q_bytes);
  copy_tile<D, S::tile>(q, p.q, &barriers.q_full, head, blocks.first);
  for (int i = 0; i < blocks.count; ++i) {
    const int stage = i % S::stages, freed = i / S::stages % 2 ^ 1, token = blocks.block_start(i);
    barrier_wait(&barriers.k_empty[stage], freed);
    barrier_arrive_expect(&barriers.k_full[stage], S::kv_bytes);
    copy_tile<D, S::block>(k + stage * S::kv_bytes, p.k, &barriers.k_full[stage], key_head, token);
    barrier_wait(&barriers.v_empty[stage], freed);
    barrier_arrive_expect(&barriers.v_full[stage], S::kv_bytes);
    copy_tile<D, S::block>(v + stage * S::kv_bytes, p.v, &barriers.v_full[stage], key_head, token);
  }
}

// The running maximum and sum of a thread's two rows; the sum is of this thread's columns only.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};

  // Turns scores into probabilities relative to the new maximum; returns the factors for earlier ones.
  template <int count>
  __device__ __forceinline__ float2 step(float (&s)[count], float scale_log2) {
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = top[r];
#pragma unroll
      for (int i = 2 * r; i < count; i += 4) high = fmaxf(high, fmaxf(s[i], s[i + 1]));
      high = warp_reduce<4>(high, [](float a, float b) { return fmaxf(a, b); });
      keep[r] = exp2_fast((top[r] - high) * scale_log2);
      top[r] = high;
      const float shift = high * scale_log2;
      float sum = 0;
#pragma unroll
      for (int i = 2 * r; i < count; i += 4) {
        s[i] = exp2_fast(fmaf(s[i], scale_log2, -shift));
        s[i + 1] = exp2_fast(fmaf(s[i + 1], scale_log2, -shift));
        sum += s[i] + s[i + 1];
      }
      total[r] = total[r] * keep[r] + sum;
    }
    return make_float2(keep[0], keep[1]);
  }
};

template <typename T, int D, int num_consumers>
__device__ void consume(const Parameters& p, const KeyBlocks<Shape<D, num_consumers>::tile,
                        Shape<D, num_consumers>::block>& blocks, int head, const unsigned char* q,
                        const unsigned char* k, unsigned char* v,
                        Barriers<Shape<D, num_consumers>::stages>& barriers, int num_active) {
  using S = Shape<D, num_consumers>;
  constexpr int N = S::block;
  const int group = warpgroup(), group_row = group * kProductRows;
  const Place place(threadIdx.x);
  const bool take_turns = num_consumers == 2 && num_active == 2;

  Softmax softmax;
  Sums<D> sum;
  sum.for_each([](float& x, int) { x = 0; });
  float s[N / 2];
  std::uint32_t probability[N / 16][4];

  const auto release = [](Barrier* empty) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
  };
  const auto mask = [&](int i) {
    if (!blocks.masked(i)) return;
    const int key = blocks.block_start(i) + place.column, end = blocks.block_end(i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = blocks.first + group_row + place.row + 8 * r;
      const int limit = (p.causal ? min(end, query + 1) : end) - key;
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        if (8 * j >= limit) s[4 * j + 2 * r] = -INFINITY;
        if (8 * j + 1 >= limit) s[4 * j + 2 * r + 1] = -INFINITY;
      }
    }
  };
  const auto values_ready = [&](int i) {
    const int stage = i % S::stages;
    barrier_wait(&barriers.v_full[stage], i / S::stages % 2);
    if (!blocks.masked(i)) return;
    const int valid = blocks.block_end(i) - blocks.block_start(i);
    if (valid < N) {  // the same for all consumers
      zero_rows<D, N>(v + stage * S::kv_bytes, valid, threadIdx.x, kWarpgroup * num_active);
      fence_shared_writes();
      meeting_sync(kZeroing, kWarpgroup * num_active);
    }
  };
  const auto multiply_keys = [&](int i) {
    multiply_transposed<T, D, N, S::tile, N>(s, q, group_row, k + i % S::stages * S::kv_bytes);
    product_commit();
  };
  const auto multiply_values = [&](int i) {
    multiply_add<T, D, N, N>(sum, probability, v + i % S::stages * S::kv_bytes);
    product_commit();
  };

  if (take_turns && group == 1) meeting_arrive(kTurn, 2 * kWarpgroup);  // the first turn is group 0's
  barrier_wait(&barriers.q_full, 0);
  barrier_wait(&barriers.k_full[0], 0);
  pin(s);
  product_fence();
  multiply_keys(0);
  product_wait<0>();
  pin(s);
  release(&barriers.k_empty[0]);
  mask(0);
  float2 keep = softmax.step(s, p.scale_log2);

  // Waits for the product with the values of block i, if i is not negative, then rescales the sum and rounds the new
  // probabilities. It is called one iteration after the exponentials: ptxas moves exponentials behind a wait in the
  // same basic block, and then nothing would run beside the products.
  const auto finish_values = [&](int i) {
    product_wait<0>();
    sum.pin_all(), pin_all(probability);
    if (i >= 0) release(&barriers.v_empty[i % S::stages]);
    sum.for_each([keep](float& x, int r) { x *= r == 0 ? keep.x : keep.y; });
    round_to<T, N>(probability, s);
  };

  for (int i = 1; i < blocks.count; ++i) {
    barrier_wait(&barriers.k_full[i % S::stages], i / S::stages % 2);
    finish_values(i - 2);
    values_ready(i - 1);
    if (take_turns) meeting_sync(kTurn + group, 2 * kWarpgroup);
    pin(s), pin_all(probability), sum.pin_all();
    product_fence();
    multiply_keys(i);
    multiply_values(i - 1);
    if (take_turns) meeting_arrive(kTurn + 1 - group, 2 * kWarpgroup);
    product_wait<1>();
    pin(s);
    release(&barriers.k_empty[i % S::stages]);
    mask(i);
    keep = softmax.step(s, p.scale_log2);
  }

  values_ready(blocks.count - 1);
  finish_values(blocks.count - 2);
  sum.pin_all(), pin_all(probability);
  product_fence();
  multiply_values(blocks.count - 1);
  product_wait<0>();
  sum.pin_all();

  const float total_0 = warp_sum<4>(softmax.total[0]), total_1 = warp_sum<4>(softmax.total[1]);
  const int first = blocks.first + group_row;
  store_sum<T, D>(static_cast<T*>(p.out) + head * D, static_cast<std::int64_t>(p.num_heads) * D, sum, place, first,
                  blocks.end, 1 / total_0, 1 / total_1);
  if (place.column == 0) {
    float* const lse = p.lse + head * p.num_tokens;
    const int token = first + place.row;
    if (token < blocks.end) lse[token] = fmaf(softmax.top[0], p.scale_log2, log2f(total_0));
    if (token + 8 < blocks.end) lse[token + 8] = fmaf(softmax.top[1], p.scale_log2, log2f(total_1));
  }
}

template <typename T, int D, int num_consumers>
__global__ void __launch_bounds__(Shape<D, num_consumers>::threads, Shape<D, num_consumers>::blocks_sm)
    forward_kernel(const __grid_constant__ Parameters p) {
  using S = Shape<D, num_consumers>;
  extern __shared__ unsigned char shared_memory[];
  unsigned char* const q = align_tile(shared_memory);
  unsigned char* const k = q + S::q_bytes;
  unsigned char* const v = k + S::stages * S::kv_bytes;
  auto& barriers = *reinterpret_cast<Barriers<S::stages>*>(v + S::stages * S::kv_bytes);

  const int i_tile = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const KeyBlocks<S::tile, S::block> blocks(p.tiles + 5 * static_cast<std::int64_t>(i_tile), p.causal);
  // Warpgroups whose rows are all past the segment's end have nothing to do.
  const int num_active = min(num_consumers, (blocks.end - blocks.first + kProductRows - 1) / kProductRows);

  if (threadIdx.x == 0) {
    barrier_init(&barriers.q_full, 1);
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&barriers.k_full[i], 1);
      barrier_init(&barriers.v_full[i], 1);
      barrier_init(&barriers.k_empty[i], num_active * kWarpgroup / kWarp);
      barrier_init(&barriers.v_empty[i], num_active * kWarpgroup / kWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int group = warpgroup();
  if (group == num_consumers) {
    if constexpr (num_consumers == 2) registers_lower<24>();
    if (threadIdx.x == num_consumers * kWarpgroup) {
      prefetch_maps<D>(p.q), prefetch_maps<D>(p.k), prefetch_maps<D>(p.v);
      produce<D, num_consumers>(p, blocks, head, q, k, v, barriers);
    }
  } else {
    if constexpr (num_consumers == 2) registers_raise<240>();
    if (group < num_active) consume<T, D, num_consumers>(p, blocks, head, q, k, v, barriers, num_active);
  }
}

template <typename T, int D, int num_consumers>
void forward(Queue queue, const Attention& x, const AttentionForward& y) {
  using S = Shape<D, num_consumers>;
  Parameters p = {};
  p.q = head_maps<D>(kName, x.dtype, x.q, x.num_tokens, x.num_heads, x.stride_q_t, x.stride_q_h, S::tile);
  p.k = head_maps<D>(kName, x.dtype, x.k, x.num_tokens, x.num_key_heads, x.stride_k_t, x.stride_k_h, S::block);
  p.v = head_maps<D>(kName, x.dtype, x.v, x.num_tokens, x.num_key_heads, x.stride_v_t, x.stride_v_h, S::block);
  p.out = y.out.address;
  p.lse = y.lse.as<float>();
  p.tiles = y.tiles.as<const int>();
  p.num_tokens = x.num_tokens;
  p.num_heads = static_cast<int>(x.num_heads);
  p.num_shared = static_cast<int>(x.num_heads / x.num_key_heads);
  p.scale_log2 = x.scale * kLog2E;
  p.causal = x.causal;
  launch(kName, queue, forward_kernel<T, D, num_consumers>, y.num_tiles * x.num_heads, S::threads, S::bytes, p);
}

}  // namespace

void packed_attention_forward(Queue queue, const Attention& x, const AttentionForward& y) {
  if (x.num_tokens == 0) return;
  const DeviceGuard guard(queue.device, kName);
  with_configuration(kName, x, y.tile_rows, [&](auto t, auto head_size, auto num_consumers) {
    forward<decltype(t), decltype(head_size)::value, decltype(num_consumers)::value>(queue, x, y);
  });
}

}  // namespace geo_r1
