// The Python module geo_r1._C: the launchers of ops.h, called with keyword arguments. Addresses are ints or None;
// dtypes are torch's names.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <set>
#include <string>
#include <tuple>

#include "ops.h"

namespace py = pybind11;

namespace geo_r1 {
namespace {

// Reads an op's fields from keyword arguments; each must be given and have its field's type.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void operator()(const char* name, T& field) {
    field = take(name).cast<T>();
  }

  void operator()(const char* name, Pointer& field) {
    const py::object value = take(name);
    field.address = value.is_none() ? nullptr : reinterpret_cast<void*>(value.cast<std::uintptr_t>());
  }

  void operator()(const char* name, DType& field) {
    const std::string dtype = take(name).cast<std::string>();
    if (dtype == "float16") {
      field = DType::float16;
    } else if (dtype == "bfloat16") {
      field = DType::bfloat16;
    } else if (dtype == "float32") {
      field = DType::float32;
    } else if (dtype == "float64") {
      field = DType::float64;
    } else {
      throw py::value_error("dtype: expected float16, bfloat16, float32 or float64, got " + dtype);
    }
  }

  // An argument that no field took is the caller's mistake.
  void finish() const {
    for (const auto& [name, value] : given_) {
      const std::string given = name.cast<std::string>();
      if (taken_.count(given) == 0) throw py::type_error("no argument " + given + " in this launcher");
    }
  }

 private:
  py::object take(const char* name) {
    if (!given_.contains(name)) throw py::type_error(std::string("missing argument ") + name);
    taken_.insert(name);
    return given_[name];
  }

  py::kwargs given_;
  std::set<std::string> taken_;
};

#define FIELD(name) fields(#name, op.name)

void read(Fields& fields, GroupAdvantage& op) {
  FIELD(dtype), FIELD(out), FIELD(reward), FIELD(valid), FIELD(cu_group), FIELD(cu_completion);
  FIELD(wide_group), FIELD(wide_completion), FIELD(num_groups), FIELD(num_members), FIELD(num_rows);
  FIELD(stride_reward), FIELD(stride_valid), FIELD(leave_one_out), FIELD(scale), FIELD(eps), FIELD(correction);
}

void read(Fields& fields, Logits& op) {
  FIELD(dtype), FIELD(logits), FIELD(target), FIELD(num_rows), FIELD(num_cols), FIELD(stride_r), FIELD(stride_v);
  FIELD(inv_temperature);
}

void read(Fields& fields, RowStatistics& op) { FIELD(logp), FIELD(entropy), FIELD(lse); }

void read(Fields& fields, RowLoss& op) {
  FIELD(advantage), FIELD(token_weight), FIELD(old_logp), FIELD(ref_logp), FIELD(importance_weight);
  FIELD(loss), FIELD(d_logp), FIELD(d_entropy), FIELD(kl), FIELD(ratio), FIELD(logp), FIELD(entropy), FIELD(lse);
  FIELD(clipped), FIELD(d_logits), FIELD(d_stride_r), FIELD(policy), FIELD(kl_estimator), FIELD(has_delta);
  FIELD(epsilon), FIELD(clip_high), FIELD(delta), FIELD(tau_pos), FIELD(tau_neg), FIELD(sapo_saturated);
  FIELD(beta), FIELD(entropy_coef);
}

void read(Fields& fields, LogitGradient& op) {
  FIELD(lse), FIELD(entropy), FIELD(d_logp), FIELD(d_entropy), FIELD(d_loss), FIELD(d_logits), FIELD(d_stride_r);
}

void read(Fields& fields, Attention& op) {
  FIELD(dtype), FIELD(q), FIELD(k), FIELD(v), FIELD(num_tokens), FIELD(num_heads), FIELD(num_key_heads);
  FIELD(head_size), FIELD(stride_q_t), FIELD(stride_q_h), FIELD(stride_k_t), FIELD(stride_k_h);
  FIELD(stride_v_t), FIELD(stride_v_h), FIELD(scale), FIELD(causal);
}

void read(Fields& fields, AttentionForward& op) {
  FIELD(out), FIELD(lse), FIELD(tiles), FIELD(num_tiles), FIELD(tile_rows);
}

void read(Fields& fields, AttentionBackward& op) {
  FIELD(d_out), FIELD(stride_do_t), FIELD(stride_do_h), FIELD(out), FIELD(lse), FIELD(delta), FIELD(dq), FIELD(dk);
  FIELD(dv), FIELD(query_tiles), FIELD(key_tiles), FIELD(num_tiles), FIELD(tile_rows);
}

#undef FIELD

template <typename... Ops>
void define(py::module_& module, const char* name, void (*launch)(Queue, const Ops&...)) {
  module.def(name, [launch](int device, std::uintptr_t stream, const py::kwargs& given) {
    Fields fields(given);
    std::tuple<Ops...> ops;
    std::apply([&](auto&... op) { (read(fields, op), ...); }, ops);
    fields.finish();
    std::apply([&](const auto&... op) { launch({device, reinterpret_cast<void*>(stream)}, op...); }, ops);
  }, py::arg("device"), py::arg("stream"));
}

}  // namespace
}  // namespace geo_r1

PYBIND11_MODULE(_C, module) {
  using namespace geo_r1;
  module.doc() = "CUDA kernels of csrc/; see csrc/ops.h.";
  module.attr("archs") = GEO_R1_CUDA_ARCHS;  // as passed to nvcc: "80;90a;100"
  module.def("device_count", &device_count);
  define(module, "group_advantage", &group_advantage);
  define(module, "row_statistics", &row_statistics);
  define(module, "grpo_row_loss", &grpo_row_loss);
  define(module, "logit_gradient", &logit_gradient);
  define(module, "packed_attention_forward", &packed_attention_forward);
  define(module, "packed_attention_backward", &packed_attention_backward);
}
