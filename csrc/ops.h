// The launchers, one for each kernel that Python starts. They do not use torch: they take pointers, sizes, strides in
// elements, a device and a stream, and throw a std::runtime_error that names the launcher if CUDA reports an error.
// They allocate nothing and wait for nothing.
//
// Shape letters as in Python: T packed tokens, R loss rows, N completions, G groups, H query heads, K key heads,
// D head size, V vocabulary.
#pragma once

#include <cstdint>
#include <string>

namespace geo_r1 {

enum class DType { float16, bfloat16, float32, float64 };

// An address on the device; null means "not given".
struct Pointer {
  void* address = nullptr;

  template <typename T>
  T* as() const {
    return static_cast<T*>(address);
  }
};

// A device's index and one of its streams, on which a launcher runs.
struct Queue {
  int device;
  void* stream;
};

// The number of CUDA devices; throws with CUDA's reason if there is none.
int device_count();

// The formula of advantage/public.py. out [num_rows] is float64 for float64 rewards, else float32.
struct GroupAdvantage {
  DType dtype;            // of the rewards
  Pointer out, reward;    // reward [N]
  Pointer valid;          // [N] bool, or null
  Pointer cu_group;       // [G + 1]
  Pointer cu_completion;  // [N + 1], or null: out has one value per member
  bool wide_group, wide_completion;  // boundaries are int64, else int32
  std::int64_t num_groups, num_members, num_rows, stride_reward, stride_valid;
  bool leave_one_out;
  std::string scale;  // "group", "batch" or "none"
  double eps;
  int correction;
};
void group_advantage(Queue, const GroupAdvantage&);

// Logits [R, V] of float16, bfloat16 or float32, and the int64 target of each row.
struct Logits {
  DType dtype;
  Pointer logits, target;
  std::int64_t num_rows, num_cols, stride_r, stride_v;
  float inv_temperature;
};

// Each row's log-probability of its target and entropy, [R] float32, and its log-sum-exp in two parts, [R, 2]: the
// largest logit, and the log of the sum of exp((logit - largest) / temperature).
struct RowStatistics {
  Pointer logp, entropy, lse;
};
void row_statistics(Queue, const Logits&, const RowStatistics&);

// The GRPO loss of each row, with ratios per token, and the gradient of the logits. All rows are [R] float32, except
// for lse, see RowStatistics.
struct RowLoss {
  Pointer advantage, token_weight;
  Pointer old_logp, ref_logp, importance_weight;  // or null
  Pointer loss, d_logp, d_entropy, kl, ratio, logp, entropy, lse;  // out
  Pointer clipped;                                                 // out, [R] bool
  Pointer d_logits;  // out, [R, V] of the logits' dtype, last stride 1; may be the logits; null: no gradient
  std::int64_t d_stride_r;
  std::string policy, kl_estimator;  // "clip", "cispo" or "sapo"; "k1", "k2" or "k3"
  bool has_delta;
  float epsilon, clip_high, delta, tau_pos, tau_neg, sapo_saturated, beta, entropy_coef;
};
void grpo_row_loss(Queue, const Logits&, const RowLoss&);

// The gradient of the logits from the rows' derivatives, times the scalar d_loss.
struct LogitGradient {
  Pointer lse, entropy, d_logp;  // lse as in RowStatistics, the others [R] float32
  Pointer d_entropy;             // [R] float32, or null: no entropy term
  Pointer d_loss;                // [1] float32, or null: 1
  Pointer d_logits;              // out, as in RowLoss
  std::int64_t d_stride_r;
};
void logit_gradient(Queue, const Logits&, const LogitGradient&);

// q [T, H, D], k and v [T, K, D] of float16 or bfloat16: 16-byte aligned, strides multiples of 8, last stride 1.
struct Attention {
  DType dtype;
  Pointer q, k, v;
  std::int64_t num_tokens, num_heads, num_key_heads, head_size;
  std::int64_t stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h;
  float scale;
  bool causal;
};

// out [T, H, D] contiguous, lse [H, T] float32 in base 2; tiles [num_tiles, 5] int32, see layout/tiles.py.
struct AttentionForward {
  Pointer out, lse, tiles;
  std::int64_t num_tiles, tile_rows;  // tile_rows: 64 or 128, the largest number of queries in a tile
};
void packed_attention_forward(Queue, const Attention&, const AttentionForward&);

// dq [T, H, D], and dk and dv for each query head [T, H, D], all contiguous; delta [H, T] float32 is scratch.
struct AttentionBackward {
  Pointer d_out;  // [T, H, D], aligned and strided as q
  std::int64_t stride_do_t, stride_do_h;
  Pointer out, lse;  // of the forward pass
  Pointer delta, dq, dk, dv;
  Pointer query_tiles, key_tiles;  // [num_tiles, 5] and [num_tiles, 4] int32
  std::int64_t num_tiles, tile_rows;
};
void packed_attention_backward(Queue, const Attention&, const AttentionBackward&);

}  // namespace geo_r1
