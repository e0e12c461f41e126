// Rows of logits: statistics, the GRPO loss with its gradient, and the gradient alone.
//
//     z = logits / temperature;  lse = logsumexp(z);  logp = z[target] - lse;  H = -sum_v p_v log p_v
//     dlogits = (dlogp (onehot - p) - dH p (log p + H)) / temperature
//
// Bytes moved for R rows of V logits of b bytes: statistics R V b; the gradient alone 2 R V b; loss and
// gradient 2 R V b if a row fits on a multiprocessor; if not, the rest of it is read twice. All arithmetic is
// in float32, and exponents are in base 2.
//
// For the loss a block works on one row at a time and keeps it, see rows.cuh: with 8 vectors in registers and
// 18 slots, 768 threads keep 312 KiB on an H200 (252 KiB on an A100), and 152064 logits in bfloat16 are 297
// KiB. After the last use of a vector, the next row's vector replaces it at once, and the next row is summed as
// it arrives. So reads, writes and the arithmetic of two rows overlap. Each row takes one barrier. Speed was
// not measured.
//
// Source: online softmax, arXiv:1805.02867; the loss, arXiv:2402.03300, see kernels/loss/reference.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common.cuh"
#include "row_loss.cuh"
#include "rows.cuh"

namespace geo_r1 {
namespace {

// The largest block occupies a multiprocessor alone. With 1024 threads each has 64 registers, and ptxas
// spilled on sm_80 and sm_100; 512 would hide less of the latency of exponentials and shared memory. Speed not
// measured.
constexpr int kMostThreads = 768;
// If threads would have at most this many vectors, blocks get smaller and a multiprocessor works on more rows
// at once. Not measured.
constexpr int kVectorsPerThread = 2 * kHeld;
// The gradient alone keeps nothing; each thread has this many vectors in flight. Not measured.
constexpr int kStreamThreads = 256;
constexpr int kStreamLoads = 4;

// ---- kernels

alignas(16) extern __shared__ unsigned char shared_memory[];

// Statistics of rows; with `has_loss` also their loss, with `has_gradient` also the gradient of the logits.
template <typename T, bool has_loss, bool has_gradient>
__global__ void __launch_bounds__(kMostThreads, 1)
    rows_kernel(const Matrix<T> in, const Output<T> out, const Reports rows, const Options options,
                int num_slots) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t vectors_end = static_cast<std::int64_t>(in.num_vectors) * kWidth<T>;
  // Each warp's sums of a row. Two rows take turns, so one barrier per row is enough.
  Sums(*const sums_of)[kWarp] = reinterpret_cast<Sums(*)[kWarp]>(shared_memory);
  Vectors<T> vectors(reinterpret_cast<uint4*>(sums_of + 2), num_slots, in.num_vectors);

  // The first row at or after i_r with a weight; reports the rows before it.
  const auto next_row = [&](std::int64_t i_r) {
    if constexpr (has_loss) {
      for (; i_r < in.num_rows && rows.token_weight[i_r] == 0; i_r += gridDim.x) {
        report_idle(rows, i_r);
        if constexpr (has_gradient) write_zeros(out.row(i_r), 0, vectors_end, in.num_cols);
      }
    }
    return i_r;
  };

  std::int64_t i_r = next_row(blockIdx.x);
  if (i_r < in.num_rows) vectors.fill(in.row(i_r));
  Sums sums;  // of the current row; `summed`: they include its vectors
  bool summed = false;
  const auto add = [&](const uint4& bits) {
    float x[kWidth<T>];
    unpack<T>(bits, x);
    sums.add(x, in.scale);
  };
  for (int turn = 0; i_r < in.num_rows; turn ^= 1) {
    const std::int64_t i_next = next_row(i_r + gridDim.x);
    const T* const p_row = in.row(i_r);
    const T* const p_next = i_next < in.num_rows ? in.row(i_next) : nullptr;
    const std::int64_t target = in.target[i_r];

    if (!summed) {
      vectors.walk(p_row, 0, has_gradient ? nullptr : p_next, [&](const uint4& bits, int) { add(bits); });
    }
    each_column(p_row, in.stride_v, vectors_end, in.num_cols,
                [&](const float (&x)[4], std::int64_t) { sums.add(x, in.scale); });
    // The row's inputs, loaded while sums are merged. A target out of range gives NaN, not a read outside the
    // row; the barrier keeps this read ahead of a gradient that overwrites the logits.
    [[maybe_unused]] Given given;
    if constexpr (has_loss) given = given_of(rows, i_r);
    const float drawn = in.has(target) ? to_float(p_row[target * in.stride_v]) : NAN;
    sums.merge(in.scale);
    if (lane == 0) sums_of[turn][warp] = sums;
    __syncthreads();
    sums = lane * kWarp < static_cast<int>(blockDim.x) ? sums_of[turn][lane] : Sums{};
    sums.merge(in.scale);

    const float log_total = logf(sums.total), mean = sums.moment / sums.total;
    const float logp = (drawn - sums.top) * in.inv_temperature - log_total;
    const float entropy = fmaf(-mean, kLn2, log_total);
    if (threadIdx.x == 0) {
      rows.logp[i_r] = logp;
      rows.entropy[i_r] = entropy;
      rows.lse[i_r] = {sums.top, log_total};
    }
    if constexpr (has_loss) {
      const Derivatives d = row_loss(rows, options, i_r, given, logp, entropy);
      if constexpr (has_gradient) {
        T* const p_out = out.row(i_r);
        const Slope slope(in.scale, sums.top, sums.total, mean, d.logp,
                          options.entropy_coef != 0 ? d.entropy : 0.0f, in.inv_temperature);
        // The thread that writes the target's column writes it again, so its sum with onehot is rounded once.
        const bool writes_target = in.has(target) && writes<T>(target, 0, vectors_end);
        const T at_target = from_float<T>(slope(drawn) + d.logp * in.inv_temperature);
        const auto write = [&](const uint4& bits, int number) {
          *vector_at(p_out, number) = slope.template of_vector<T>(bits);
        };
        write_columns(p_row, in.stride_v, p_out, vectors_end, in.num_cols, slope);
        sums = {};
        summed = p_next != nullptr && vectors.fits();
        if (summed) {
          vectors.exchange(p_next, write, add);
        } else {
          vectors.walk(p_row, vectors.last(), p_next, write);
        }
        if (writes_target) p_out[target] = at_target;
      }
    }
    if constexpr (!has_gradient) sums = {};
    i_r = i_next;
  }
}

// The rows of `logit_gradient`; see LogitGradient.
struct GradientRows {
  const Lse* lse;
  const float *entropy, *d_logp, *d_entropy, *d_loss;
};

// A block works on a piece of a row.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads)
    gradient_kernel(const Matrix<T> in, const Output<T> out, const GradientRows rows, int num_pieces) {
  constexpr int kPiece = kStreamThreads * kStreamLoads * kWidth<T>;
  const std::int64_t i_r = blockIdx.x / num_pieces;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x % num_pieces) * kPiece;
  const std::int64_t end = begin + kPiece < in.num_cols ? begin + kPiece : in.num_cols;
  const std::int64_t aligned_end = static_cast<std::int64_t>(in.num_vectors) * kWidth<T>;
  const std::int64_t vectors_end = aligned_end < begin ? begin : aligned_end < end ? aligned_end : end;
  const T* const p_row = in.row(i_r);
  T* const p_out = out.row(i_r);

  // Load all inputs of the row at once: one latency, not four.
  float d_logp = rows.d_logp[i_r], d_entropy = rows.d_entropy != nullptr ? rows.d_entropy[i_r] : 0.0f;
  const Lse lse = rows.lse[i_r];
  const float entropy = rows.entropy[i_r];
  const float d_loss = rows.d_loss != nullptr ? *rows.d_loss : 1.0f;
  const std::int64_t target = in.target[i_r];
  if (d_logp == 0 && d_entropy == 0) {  // an idle row is not read, as it may hold anything
    write_zeros(p_out, begin, vectors_end, end);
    return;
  }
  const int first = static_cast<int>(begin / kWidth<T>), last = static_cast<int>(vectors_end / kWidth<T>);
  uint4 bits[kStreamLoads];
#pragma unroll
  for (int k = 0; k < kStreamLoads; ++k) {
    const int number = first + static_cast<int>(threadIdx.x) + k * kStreamThreads;
    if (number < last) bits[k] = *vector_at(p_row, number);
  }
  d_logp *= d_loss;
  d_entropy *= d_loss;
  const Slope slope(in.scale, lse.top, expf(lse.log_total), (lse.log_total - entropy) * (1 / kLn2), d_logp, d_entropy,
                    in.inv_temperature);
  // Read by the thread that overwrites this logit, before it does.
  const bool has_target = target >= begin && target < end && writes<T>(target, begin, vectors_end);
  const float drawn = has_target ? to_float(p_row[target * in.stride_v]) : 0.0f;

#pragma unroll
  for (int k = 0; k < kStreamLoads; ++k) {
    const int number = first + static_cast<int>(threadIdx.x) + k * kStreamThreads;
    if (number < last) *vector_at(p_out, number) = slope.template of_vector<T>(bits[k]);
  }
  write_columns(p_row, in.stride_v, p_out, vectors_end, end, slope);
  if (has_target) p_out[target] = from_float<T>(slope(drawn) + d_logp * in.inv_temperature);
}

// ---- launchers

bool is_aligned(Pointer pointer, std::int64_t row_bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer.address);
  return (address | static_cast<std::uintptr_t>(row_bytes)) % 16 == 0;
}

// The logits as kernels see them; dlogits, if given, have the row stride d_stride_r.
template <typename T>
Matrix<T> matrix(const Logits& in, Pointer d_logits, std::int64_t d_stride_r) {
  constexpr std::int64_t kSize = sizeof(T);
  const bool aligned = in.stride_v == 1 && is_aligned(in.logits, in.stride_r * kSize) &&
                       (d_logits.address == nullptr || is_aligned(d_logits, d_stride_r * kSize));
  const std::int64_t num_vectors = aligned ? in.num_cols / kWidth<T> : 0;
  const double scale = 1.4426950408889634 * in.inv_temperature;  // log2(e)
  return {in.logits.as<const T>(),
          in.target.as<const std::int64_t>(),
          in.num_rows,
          in.stride_r,
          in.stride_v,
          static_cast<int>(in.num_cols),
          static_cast<int>(num_vectors),
          in.inv_temperature,
          static_cast<float>(scale)};
}

void check_cols(const Logits& in, const char* launcher) {
  if (in.num_cols < 0 || in.num_cols > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string(launcher) + ": " + std::to_string(in.num_cols) + " columns");
  }
}

// Starts rows_kernel on as many blocks as the device holds at once.
template <bool has_loss, bool has_gradient>
void launch_rows(const char* launcher, Queue queue, const Logits& in, Pointer d_logits,
                 std::int64_t d_stride_r, const Reports& rows, const Options& options) {
  check_cols(in, launcher);
  if (in.num_rows == 0) return;
  const DeviceGuard guard(queue.device, launcher);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, queue.device, launcher);
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device, launcher);
  constexpr int kSumsBytes = 2 * kWarp * sizeof(Sums);
  with_dtype<__half, __nv_bfloat16, float>(in.dtype, launcher, [&](auto t) {
    using T = decltype(t);
    const Matrix<T> logits = matrix<T>(in, d_logits, d_stride_r);
    // Several rows per multiprocessor if all fit and there are enough rows.
    const std::int64_t most_vectors = (in.num_cols + kWidth<T> - 1) / kWidth<T>;
    int threads = 3 * kWarp;
    while (threads < kMostThreads && (threads * kVectorsPerThread < most_vectors ||
                                      in.num_rows * threads < std::int64_t{processors} * kMostThreads)) {
      threads *= 2;
    }
    const std::int64_t most_blocks = std::int64_t{kMostThreads / threads} * processors;
    const int slot_bytes = threads * 16;  // one slot per thread
    const int wanted = (logits.num_vectors + threads - 1) / threads - kHeld;
    const int num_slots = std::max(0, std::min(wanted, (shared_limit - kSumsBytes) / slot_bytes));
    launch(launcher, queue, rows_kernel<T, has_loss, has_gradient>, std::min(in.num_rows, most_blocks),
           threads, kSumsBytes + num_slots * slot_bytes, logits, Output<T>{d_logits.as<T>(), d_stride_r},
           rows, options, num_slots);
  });
}

Policy policy_named(const std::string& name) {
  if (name == "clip") return Policy::clip;
  if (name == "cispo") return Policy::cispo;
  if (name == "sapo") return Policy::sapo;
  throw std::runtime_error("grpo_row_loss: policy: expected clip, cispo or sapo, got " + name);
}

Kl kl_named(const std::string& name) {
  if (name == "k1") return Kl::k1;
  if (name == "k2") return Kl::k2;
  if (name == "k3") return Kl::k3;
  throw std::runtime_error("grpo_row_loss: kl_estimator: expected k1, k2 or k3, got " + name);
}

}  // namespace

void row_statistics(Queue queue, const Logits& in, const RowStatistics& op) {
  Reports rows = {};
  rows.logp = op.logp.as<float>();
  rows.entropy = op.entropy.as<float>();
  rows.lse = op.lse.as<Lse>();
  launch_rows<false, false>("row_statistics", queue, in, {}, 0, rows, {});
}

void grpo_row_loss(Queue queue, const Logits& in, const RowLoss& op) {
  const Reports rows = {op.advantage.as<const float>(),
                        op.token_weight.as<const float>(),
                        op.old_logp.as<const float>(),
                        op.ref_logp.as<const float>(),
                        op.importance_weight.as<const float>(),
                        op.loss.as<float>(),
                        op.d_logp.as<float>(),
                        op.d_entropy.as<float>(),
                        op.kl.as<float>(),
                        op.ratio.as<float>(),
                        op.clipped.as<bool>(),
                        op.logp.as<float>(),
                        op.entropy.as<float>(),
                        op.lse.as<Lse>()};
  const Options options = {policy_named(op.policy),
                           kl_named(op.kl_estimator),
                           op.has_delta,
                           op.epsilon,
                           op.clip_high,
                           op.delta,
                           op.tau_pos,
                           op.tau_neg,
                           op.sapo_saturated,
                           op.beta,
                           op.entropy_coef};
  const auto start = op.d_logits.address != nullptr ? launch_rows<true, true> : launch_rows<true, false>;
  start("grpo_row_loss", queue, in, op.d_logits, op.d_stride_r, rows, options);
}

void logit_gradient(Queue queue, const Logits& in, const LogitGradient& op) {
  constexpr const char* kLauncher = "logit_gradient";
  check_cols(in, kLauncher);
  if (in.num_rows == 0 || in.num_cols == 0) return;
  const DeviceGuard guard(queue.device, kLauncher);
  const GradientRows rows = {op.lse.as<const Lse>(), op.entropy.as<const float>(),
                             op.d_logp.as<const float>(), op.d_entropy.as<const float>(),
                             op.d_loss.as<const float>()};
  with_dtype<__half, __nv_bfloat16, float>(in.dtype, kLauncher, [&](auto t) {
    using T = decltype(t);
    constexpr std::int64_t kPiece = kStreamThreads * kStreamLoads * kWidth<T>;
    const std::int64_t num_pieces = (in.num_cols + kPiece - 1) / kPiece;
    launch(kLauncher, queue, gradient_kernel<T>, in.num_rows * num_pieces, kStreamThreads, 0,
           matrix<T>(in, op.d_logits, op.d_stride_r), Output<T>{op.d_logits.as<T>(), op.d_stride_r}, rows,
           static_cast<int>(num_pieces));
  });
}

}  // namespace geo_r1
