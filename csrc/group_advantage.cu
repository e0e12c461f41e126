// Group-relative advantages in one launch, one warp per group.
//
//     advantage[i] = (reward[i] - baseline_i) / scale_i
//
// Source: GRPO, arXiv:2402.03300, as kernels/advantage/public.py states it. A warp reads its group's rewards four
// times (smallest and largest, mean, squares, result), the last three times from cache, and writes one value per
// member or token. With scale "batch" every block first reads all N rewards three times. There are then no more
// blocks than SMs, each with many groups, so the reads are bounded by SMs * N, not by G * N.
//
// Everything is computed in float64: there are few rewards, so it costs nothing, and no option needs its own
// rounding. The host has not read the boundaries: wrong ones give wrong numbers, but no access outside the tensors.
#include "common.cuh"

namespace geo_r1 {
namespace {

constexpr int kWarps = 8;  // groups that a block works on at once; not measured
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocks = 2;  // per SM, at least; without this, ptxas takes 48 registers on sm_90a and spills

enum class Scale { group, batch, none };

struct Boundaries {
  const void* address;
  bool wide;

  // An entry, clamped to [0, most].
  __device__ __forceinline__ std::int64_t at(std::int64_t i, std::int64_t most) const {
    const std::int64_t x = wide ? static_cast<const std::int64_t*>(address)[i]
                                : static_cast<const std::int32_t*>(address)[i];
    return x < 0 ? 0 : x > most ? most : x;
  }
};

template <typename T>
struct Members {
  const T* reward;
  const bool* valid;  // or null
  std::int64_t stride_reward, stride_valid;

  __device__ __forceinline__ bool is_valid(std::int64_t i) const {
    return valid == nullptr || valid[i * stride_valid];
  }
  __device__ __forceinline__ double operator[](std::int64_t i) const {
    const T x = reward[i * stride_reward];
    if constexpr (std::is_same_v<T, double>) {
      return x;
    } else {
      return to_float(x);
    }
  }
};

// The arguments of one launch.
template <typename T>
struct Task {
  std::conditional_t<std::is_same_v<T, double>, double, float>* out;
  Members<T> members;
  Boundaries cu_group, cu_completion;
  std::int64_t num_groups, num_members, num_rows;
  bool leave_one_out;
  Scale scale;
  double eps;
  int correction;
};

// The threads that walk some members together: a warp, or the whole block.
struct WarpTeam {
  static constexpr int size = kWarp;

  __device__ __forceinline__ static int rank() { return threadIdx.x % kWarp; }
  template <typename Function>
  __device__ __forceinline__ static double reduce(double x, Function combine) {
    return warp_reduce(x, combine);
  }
};

struct BlockTeam {
  static constexpr int size = kThreads;

  __device__ __forceinline__ static int rank() { return threadIdx.x; }
  __device__ __forceinline__ static double* parts() {
    __shared__ double part[kWarps];
    return part;
  }
  template <typename Function>
  __device__ __forceinline__ static double reduce(double x, Function combine) {
    double* const part = parts();
    x = warp_reduce(x, combine);
    __syncthreads();  // until the parts of an earlier sum have been read
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_reduce<kWarps>(part[threadIdx.x % kWarps], combine);
  }
};

// Statistics of the valid members: their number, the smallest and largest reward, the mean above the smallest, and
// the sum of squares about the mean.
struct Statistics {
  double count, low, high, mean, squares;
};

template <typename Team, typename T>
__device__ Statistics statistics(const Members<T>& members, std::int64_t start, std::int64_t stop) {
  const auto add = [](double a, double b) { return a + b; };
  Statistics s = {0, INFINITY, -INFINITY, 0, 0};
  double spoilt = 0;
  for (std::int64_t i = start + Team::rank(); i < stop; i += Team::size) {
    if (!members.is_valid(i)) continue;
    const double reward = members[i];
    s.count += 1;
    spoilt += 0 * reward;  // NaN if the reward is not finite
    s.low = fmin(s.low, reward);
    s.high = fmax(s.high, reward);
  }
  s.count = Team::reduce(s.count, add);
  s.high = Team::reduce(s.high, [](double a, double b) { return fmax(a, b); });
  s.low = Team::reduce(s.low, [](double a, double b) { return fmin(a, b); });
  if (s.count == 0) s.low = 0;
  s.low += Team::reduce(spoilt, add);  // NaN spoils all further results and never equals the largest reward

  // Measured from the smallest reward, so that a common offset costs no accuracy.
  for (std::int64_t i = start + Team::rank(); i < stop; i += Team::size) {
    if (members.is_valid(i)) s.mean += members[i] - s.low;
  }
  s.mean = Team::reduce(s.mean, add) / fmax(s.count, 1.0);

  for (std::int64_t i = start + Team::rank(); i < stop; i += Team::size) {
    if (!members.is_valid(i)) continue;
    const double centred = members[i] - s.low - s.mean;
    s.squares += centred * centred;
  }
  s.squares = Team::reduce(s.squares, add);
  return s;
}

template <typename T>
__device__ double deviation(const Task<T>& task, const Statistics& s) {
  return sqrt(s.squares / fmax(s.count - task.correction, 1.0)) + task.eps;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) group_advantage_kernel(const Task<T> task) {
  const int lane = WarpTeam::rank();
  double divisor = 1;
  if (task.scale == Scale::batch) {
    const std::int64_t start = task.cu_group.at(0, task.num_members);
    const std::int64_t stop = task.cu_group.at(task.num_groups, task.num_members);
    divisor = deviation(task, statistics<BlockTeam>(task.members, start, stop));
  }
  const std::int64_t first_group = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / kWarp;
  for (std::int64_t group = first_group; group < task.num_groups; group += gridDim.x * std::int64_t{kWarps}) {
    const std::int64_t start = task.cu_group.at(group, task.num_members);
    const std::int64_t stop = task.cu_group.at(group + 1, task.num_members);
    const Statistics s = statistics<WarpTeam>(task.members, start, stop);
    if (task.scale == Scale::group) divisor = deviation(task, s);
    // r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
    const double factor = task.leave_one_out ? s.count / fmax(s.count - 1, 1.0) : 1.0;
    // If all rewards are equal, results are exactly zero, even if the divisor is 0 or NaN.
    const double gain = s.low == s.high ? factor : factor / divisor;
    const auto advantage = [&](std::int64_t i) {
      return task.members.is_valid(i) ? (task.members[i] - s.low - s.mean) * gain : 0.0;
    };

    if (task.cu_completion.address == nullptr) {
      for (std::int64_t i = start + lane; i < stop; i += kWarp) task.out[i] = advantage(i);
      continue;
    }
    for (std::int64_t i = start; i < stop; ++i) {
      const double value = advantage(i);
      const std::int64_t last_row = task.cu_completion.at(i + 1, task.num_rows);
      for (std::int64_t row = task.cu_completion.at(i, task.num_rows) + lane; row < last_row; row += kWarp) {
        task.out[row] = value;
      }
    }
  }
}

Scale scale_named(const std::string& name, const char* launcher) {
  if (name == "group") return Scale::group;
  if (name == "batch") return Scale::batch;
  if (name == "none") return Scale::none;
  throw std::runtime_error(std::string(launcher) + ": scale: expected group, batch or none, got " + name);
}

}  // namespace

void group_advantage(Queue queue, const GroupAdvantage& op) {
  constexpr const char* launcher = "group_advantage";
  const Scale scale = scale_named(op.scale, launcher);
  if (op.num_groups == 0 || op.num_rows == 0) return;
  const DeviceGuard guard(queue.device, launcher);
  std::int64_t blocks = (op.num_groups + kWarps - 1) / kWarps;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, queue.device, launcher);
  if (scale == Scale::batch && blocks > processors) blocks = processors;
  with_dtype<__half, __nv_bfloat16, float, double>(op.dtype, launcher, [&](auto t) {
    using T = decltype(t);
    Task<T> task = {};
    task.out = op.out.as<std::remove_pointer_t<decltype(task.out)>>();
    task.members = {op.reward.as<T>(), op.valid.as<bool>(), op.stride_reward, op.stride_valid};
    task.cu_group = {op.cu_group.address, op.wide_group};
    task.cu_completion = {op.cu_completion.address, op.wide_completion};
    task.num_groups = op.num_groups;
    task.num_members = op.num_members;
    task.num_rows = op.num_rows;
    task.leave_one_out = op.leave_one_out;
    task.scale = scale;
    task.eps = op.eps;
    task.correction = op.correction;
    launch(launcher, queue, group_advantage_kernel<T>, blocks, kThreads, 0, task);
  });
}

}  // namespace geo_r1
