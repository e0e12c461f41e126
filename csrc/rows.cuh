// How the kernels of grpo_loss.cu read, sum and write rows of logits.
//
// A row is cut into vectors of 16 bytes. A block that needs a row twice keeps it: each thread keeps its own
// vectors, some in registers, the others in shared memory, in slots that no other thread touches, so they need no
// barrier.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <ptx.cuh>

#include "common.cuh"

namespace geo_r1 {

// Vectors that a thread keeps in registers: 32 of the 80 that 768 threads can have.
constexpr int kHeld = 8;
// With more slots than this, a wait for a thread's oldest copy leaves this many under way: 96 KiB per block. An
// exact wait for the oldest of 18 would take a branch for each count. Not measured.
constexpr int kPending = 8;
// Vectors of the next row in flight while this row's are written, see `exchange`. Not measured.
constexpr int kLag = 6;

constexpr float kLn2 = 0.6931471805599453f;
// Replaces -inf, whose product with 0 is NaN: 2^kFar is 0, and so is its product with kFar.
constexpr float kFar = -1000.0f;

template <typename T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));  // numbers in a vector

// Logits [R, V]. The first `num_vectors` vectors of a row are 16-byte aligned. Columns after them are read one by
// one, as are all columns if rows are strided or not aligned.
template <typename T>
struct Matrix {
  const T* logits;
  const std::int64_t* target;
  std::int64_t num_rows, stride_r, stride_v;
  int num_cols, num_vectors;
  float inv_temperature, scale;  // logit * scale is an exponent of 2

  __device__ const T* row(std::int64_t i_r) const { return logits + i_r * stride_r; }
  __device__ bool has(std::int64_t column) const { return column >= 0 && column < num_cols; }
};

// dlogits [R, V], with the same vectors as the logits.
template <typename T>
struct Output {
  T* d_logits;
  std::int64_t stride_r;

  __device__ T* row(std::int64_t i_r) const { return d_logits + i_r * stride_r; }
};

// ---- vectors and columns

template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&x)[kWidth<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float32: one instruction
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t low = words[k] << 16, high = words[k] & 0xffff0000u;
      std::memcpy(&x[2 * k], &low, 4);
      std::memcpy(&x[2 * k + 1], &high, 4);
    }
  } else {
    T numbers[kWidth<T>];
    std::memcpy(numbers, &bits, sizeof bits);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) x[k] = to_float(numbers[k]);
  }
}

template <typename T>
__device__ __forceinline__ uint4 packed(const float (&x)[kWidth<T>]) {
  uint4 bits;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&bits, x, sizeof bits);
  } else {
    bits = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ const uint4* vector_at(const T* row, int index) {
  return reinterpret_cast<const uint4*>(row) + index;
}

template <typename T>
__device__ __forceinline__ uint4* vector_at(T* row, int index) {
  return reinterpret_cast<uint4*>(row) + index;
}

// Calls visit(x, column) for this thread's columns from `begin` to `end`, four at a time: x[k] belongs to
// column + k * blockDim.x, and is -inf from `end` on.
template <typename T, typename Visit>
__device__ __forceinline__ void each_column(const T* row, std::int64_t stride_v, std::int64_t begin,
                                            std::int64_t end, Visit&& visit) {
  const std::int64_t threads = blockDim.x;
  for (std::int64_t column = begin + threadIdx.x; column < end; column += 4 * threads) {
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = column + k * threads;
      x[k] = at < end ? to_float(row[at * stride_v]) : -INFINITY;
    }
    visit(x, column);
  }
}

// True if this thread writes a column of a row whose vectors begin at column `begin`.
template <typename T>
__device__ __forceinline__ bool writes(std::int64_t column, std::int64_t begin, std::int64_t vectors_end) {
  const std::int64_t place = column < vectors_end ? (column - begin) / kWidth<T> : column - vectors_end;
  return static_cast<unsigned>(place) % blockDim.x == threadIdx.x;
}

// copy_wait with a count known only at run time; counts above `most` wait like `most`.
template <int most, int least = 0>
__device__ __forceinline__ void copy_wait_upto(int pending) {
  if constexpr (most == least) {
    copy_wait<most>();
  } else {
    constexpr int middle = (most + least + 1) / 2;
    if (pending >= middle) {
      copy_wait_upto<most, middle>(pending);
    } else {
      copy_wait_upto<middle - 1, least>(pending);
    }
  }
}

// This thread's vectors of a row, those with number threadIdx.x + k * blockDim.x. The first kHeld live in
// registers, the others pass through a ring of slots. The copy for a visit starts `depth` visits before it, and
// every visit commits one group of copies, possibly empty.
template <typename T>
class Vectors {
 public:
  __device__ Vectors(uint4* slots, int num_slots, int num_vectors)
      : slots_(slots + threadIdx.x), slot_(slots_), threads_(static_cast<int>(blockDim.x)) {
    const int thread = static_cast<int>(threadIdx.x);
    count_ = num_vectors > thread ? (num_vectors - thread - 1) / threads_ + 1 : 0;
    in_ring_ = count_ > kHeld ? count_ - kHeld : 0;
    depth_ = num_slots < in_ring_ ? num_slots : in_ring_;
  }

  // True if a whole row is kept.
  __device__ bool fits() const { return depth_ == in_ring_; }

  // The first vector that is left in the slots by a walk that begins at 0 and has no next row.
  __device__ int last() const { return in_ring_ - depth_; }

  // The first row's copies.
  __device__ void fill(const T* row) {
    const uint4* from = vector_at(row, number(kHeld));
    for (int k = 0; k < depth_; ++k, from += threads_) {
      copy_16(slots_ + k * threads_, from, 16);
      copy_commit();
    }
    load(row);
  }

  // Calls visit(bits, number) for each vector of the row, the ring's in turn from `first` on. At the start
  // the ring holds the next vectors, at the end the first ones of the next row or, if `next` is null, the last
  // ones of this row.
  template <typename Visit>
  __device__ __forceinline__ void walk(const T* row, int first, const T* next, Visit&& visit) {
    fits() ? turn<true>(row, first, next, visit) : turn<false>(row, first, next, visit);
    // All loads follow all visits: hardware counts loads together, so a visit would wait for loads that were just
    // issued. They arrive during the walk of the next row's ring.
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k < count_) visit(held_[k], number(k));
    }
    if (next != nullptr) load(next);
  }

  // For a row that fits: calls write(bits, number) for each of its vectors, then fills the vector's place from the
  // next row, and calls add(bits) for each vector of the next row once it has arrived. So that row's reads, this
  // row's writes and the arithmetic of both overlap.
  template <typename Write, typename Add>
  __device__ __forceinline__ void exchange(const T* next, Write&& write, Add&& add) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k < count_) write(held_[k], number(k));
    }
    load(next);
    const uint4* from = vector_at(next, number(kHeld));
    int at = number(kHeld);
    uint4 *slot = slots_, *arrived = slots_;
    for (int k = 0; k < in_ring_; ++k) {
      write(*slot, at);
      copy_16(slot, from, 16);
      copy_commit();
      from += threads_, slot += threads_, at += threads_;
      if (k >= kLag) {
        copy_wait<kLag>();
        add(*arrived);
        arrived += threads_;
      }
    }
    // Registers come before the last vectors of the ring, which arrive meanwhile.
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k < count_) add(held_[k]);
    }
    copy_wait<0>();
    for (; arrived != slot; arrived += threads_) add(*arrived);
  }

 private:
  __device__ int number(int k) const { return static_cast<int>(threadIdx.x) + k * threads_; }

  __device__ void load(const T* row) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k < count_) held_[k] = *vector_at(row, number(k));
    }
  }

  // The ring's part of a walk. If the whole row is kept, the ring turns once, and there is less to count.
  template <bool all, typename Visit>
  __device__ __forceinline__ void turn(const T* row, int first, const T* next, Visit&& visit) {
    // Copies the row's vectors after those in the ring, then, from visit `here` on, the next row's first ones.
    const int here = in_ring_ - depth_, stop = next != nullptr ? in_ring_ : here;
    const uint4* from = all ? vector_at(next != nullptr ? next : row, number(kHeld))
                            : vector_at(row, number(kHeld + (first < here ? first + depth_ : first - here)));
    int at = number(kHeld + (all ? 0 : first));
    uint4* slot = all ? slots_ : slot_;
    for (int k = 0; k < in_ring_; ++k) {
      wait_for_oldest();
      visit(*slot, at);
      // The visit has used the bits, so the slot is free.
      if constexpr (!all) {
        if (k == here && next != nullptr) from = vector_at(next, number(kHeld));
      }
      if (all ? next != nullptr : k < stop) copy_16(slot, from, 16);
      copy_commit();
      from += threads_, slot += threads_, at += threads_;
      if constexpr (!all) {
        if (slot == slots_ + depth_ * threads_) slot = slots_;
        if (k + 1 == in_ring_ - first) at = number(kHeld);
      }
    }
    if constexpr (!all) slot_ = slot;
  }

  __device__ __forceinline__ void wait_for_oldest() const {
    if (depth_ > kPending) {
      copy_wait<kPending>();
    } else {
      copy_wait_upto<kPending>(depth_ - 1);
    }
  }

  uint4 held_[kHeld];
  uint4 *slots_, *slot_;
  int threads_, count_, in_ring_, depth_;
};

// ---- log-sum-exp and entropy

// For some logits x and z = (x - top) scale: the largest x, and the sums of 2^z and 2^z z, from which the
// entropy follows without cancelling. Subtraction comes before scaling: for logits masked with -1e30, the
// rounding error of a product would be a large exponent.
struct Sums {
  float top = -FLT_MAX;
  float total = 0.0f;
  float moment = 0.0f;

  template <int count>
  __device__ __forceinline__ void add(const float (&x)[count], float scale) {
    float most = top;
#pragma unroll
    for (int k = 0; k < count; ++k) most = max_nan(most, x[k]);
    rescale(most, scale);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float z = max_nan((x[k] - top) * scale, kFar);
      const float power = exp2_fast(z);
      total += power;
      moment = fmaf(power, z, moment);
    }
  }

  // These sums over all lanes.
  __device__ __forceinline__ void merge(float scale) {
    rescale(warp_reduce(top, [](float a, float b) { return max_nan(a, b); }), scale);
    total = warp_sum(total);
    moment = warp_sum(moment);
  }

 private:
  __device__ __forceinline__ void rescale(float new_top, float scale) {
    const float z = max_nan((top - new_top) * scale, kFar);
    const float decay = exp2_fast(z);
    moment = decay * fmaf(z, total, moment);
    total *= decay;
    top = new_top;
  }
};

// ---- the gradient

// dlogit = -p (dlogp + dH (log p + H)) / temperature with p = 2^z / total and z = (x - base) scale; the target's
// additional term is not included.
class Slope {
 public:
  // mean: expected z under the row's distribution, so that log p + H = (z - mean) ln 2.
  __device__ Slope(float scale, float base, float total, float mean, float d_logp, float d_entropy,
                   float inv_temperature)
      : scale_(scale),
        base_(base),
        constant_(-(d_logp - d_entropy * kLn2 * mean) * inv_temperature / total),
        slope_(-d_entropy * kLn2 * inv_temperature / total) {}

  __device__ __forceinline__ float operator()(float x) const {
    const float z = max_nan((x - base_) * scale_, kFar);
    return exp2_fast(z) * fmaf(slope_, z, constant_);
  }

  template <typename T>
  __device__ __forceinline__ uint4 of_vector(const uint4& bits) const {
    float x[kWidth<T>];
    unpack<T>(bits, x);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) x[k] = (*this)(x[k]);
    return packed<T>(x);
  }

 private:
  float scale_, base_, constant_, slope_;
};

// The gradient of this thread's columns from `begin` to `end`.
template <typename T>
__device__ __forceinline__ void write_columns(const T* row, std::int64_t stride_v, T* out, std::int64_t begin,
                                              std::int64_t end, const Slope& slope) {
  each_column(row, stride_v, begin, end, [&](const float (&x)[4], std::int64_t column) {
#pragma unroll
    for (int k = 0; k < 4; ++k, column += blockDim.x) {
      if (column < end) out[column] = from_float<T>(slope(x[k]));
    }
  });
}

// Writes zeros to this thread's part of a row's columns.
template <typename T>
__device__ void write_zeros(T* row, std::int64_t begin, std::int64_t vectors_end, std::int64_t end) {
  uint4* const vectors = vector_at(row + begin, 0);
  const int count = static_cast<int>((vectors_end - begin) / kWidth<T>);
  for (int k = static_cast<int>(threadIdx.x); k < count; k += static_cast<int>(blockDim.x)) {
    vectors[k] = {0, 0, 0, 0};
  }
  for (std::int64_t k = vectors_end + threadIdx.x; k < end; k += blockDim.x) row[k] = from_float<T>(0.0f);
}

}  // namespace geo_r1
