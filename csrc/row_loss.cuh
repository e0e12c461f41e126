// The loss of one row: reference.grpo_row_loss in device code, with its inputs and outputs.
#pragma once

#include <cmath>
#include <cstdint>

#include "common.cuh"

namespace geo_r1 {

// ---- inputs and outputs

enum class Policy { clip, cispo, sapo };
enum class Kl { k1, k2, k3 };

// The log-sum-exp of a row: its largest logit, and the log of the sum of exp((logit - top) / temperature). A large
// sum in one number would have a large rounding error, and so would every probability.
struct alignas(8) Lse {
  float top, log_total;
};

// The rows of RowLoss, [R] each; row_statistics sets the last three only.
struct Reports {
  const float *advantage, *token_weight, *old_logp, *ref_logp, *importance_weight;
  float *loss, *d_logp, *d_entropy, *kl, *ratio;
  bool* clipped;
  float *logp, *entropy;
  Lse* lse;
};

struct Options {
  Policy policy;
  Kl kl_estimator;
  bool has_delta;
  float epsilon, clip_high, delta, tau_pos, tau_neg, sapo_saturated, beta, entropy_coef;
};

// ---- the loss of one row

// exp(d) - 1 - d without cancelling: for |d| < 1/4 a series with a relative error of 1e-8.
__device__ inline float expm1_less(float d) {
  if (fabsf(d) >= 0.25f || isnan(d)) return expf(d) - 1 - d;
  constexpr float a = 1.0f / 2, b = 1.0f / 6, c = 1.0f / 24, e = 1.0f / 120, f = 1.0f / 720, g = 1.0f / 5040;
  return d * d * (a + d * (b + d * (c + d * (e + d * (f + d * g)))));
}

struct Term {
  float value, d_logp;
  bool clipped;  // a bound removed the gradient
};

// reference._policy_term. Bounds are written so that a NaN ratio stays NaN.
__device__ inline Term policy_term(const Options& options, float logp, float ratio, float advantage) {
  switch (options.policy) {
    case Policy::cispo: {
      const float bounded = ratio > options.clip_high ? options.clip_high : ratio;
      return {-bounded * advantage * logp, -bounded * advantage, ratio > options.clip_high && advantage > 0};
    }
    case Policy::sapo: {
      const float tau = advantage > 0 ? options.tau_pos : options.tau_neg;
      const float bound = 1 + options.sapo_saturated / tau;
      const bool held = ratio > bound;
      const float gate = 1 / (1 + expf(-tau * ((held ? bound : ratio) - 1)));
      return {-advantage * gate * 4 / tau, -advantage * 4 * gate * (1 - gate) * (held ? 0.0f : ratio), false};
    }
    default: {
      const float low = 1 - options.epsilon, high = 1 + options.clip_high;
      const float bounded = ratio < low ? low : ratio > high ? high : ratio;
      const float open = options.has_delta && ratio > options.delta ? options.delta : ratio;
      const float chosen = open * advantage <= bounded * advantage ? open : bounded;
      const bool held = chosen < ratio || chosen > ratio;
      return {-chosen * advantage, -(held ? 0.0f : ratio) * advantage,
              (ratio < low && advantage < 0) || (ratio > high && advantage > 0)};
    }
  }
}

// The loss's inputs for a row, besides its logits.
struct Given {
  float advantage, weight, old_logp, ref_logp, importance;
};

__device__ inline Given given_of(const Reports& rows, std::int64_t i_r) {
  return {rows.advantage[i_r], rows.token_weight[i_r], rows.old_logp != nullptr ? rows.old_logp[i_r] : 0.0f,
          rows.ref_logp != nullptr ? rows.ref_logp[i_r] : 0.0f,
          rows.importance_weight != nullptr ? rows.importance_weight[i_r] : 1.0f};
}

struct Derivatives {
  float logp, entropy;
};

// reference.grpo_row_loss for one row. Every thread computes the result, the first one writes it.
__device__ inline Derivatives row_loss(const Reports& rows, const Options& options, std::int64_t i_r,
                                const Given& given, float logp, float entropy) {
  const float ratio = rows.old_logp != nullptr ? expf(logp - given.old_logp) : 1.0f;
  Term term = policy_term(options, logp, ratio, given.advantage);
  term.value *= given.importance;
  term.d_logp *= given.importance;
  float kl = 0;
  if (rows.ref_logp != nullptr) {
    const float d = given.ref_logp - logp;
    float d_kl;
    if (options.kl_estimator == Kl::k1) {
      kl = -d;
      d_kl = 1;
    } else if (options.kl_estimator == Kl::k2) {
      kl = d * d / 2;
      d_kl = -d;
    } else {
      kl = expm1_less(d);
      d_kl = -expm1f(d);
    }
    if (options.beta != 0) {
      term.value += options.beta * kl;
      term.d_logp += options.beta * d_kl;
    }
  }
  if (options.entropy_coef != 0) term.value -= options.entropy_coef * entropy;
  const float weight = given.weight;
  const Derivatives d = {weight * term.d_logp, -options.entropy_coef * weight};
  if (threadIdx.x == 0) {
    rows.loss[i_r] = weight * term.value;
    rows.d_logp[i_r] = d.logp;
    rows.d_entropy[i_r] = d.entropy;
    rows.kl[i_r] = kl;
    rows.ratio[i_r] = ratio;
    rows.clipped[i_r] = term.clipped;
  }
  return d;
}

// The report of a row of weight zero, which is not read.
__device__ inline void report_idle(const Reports& rows, std::int64_t i_r) {
  if (threadIdx.x != 0) return;
  rows.loss[i_r] = rows.d_logp[i_r] = rows.d_entropy[i_r] = rows.kl[i_r] = 0;
  rows.ratio[i_r] = 1;
  rows.clipped[i_r] = false;
  rows.logp[i_r] = rows.entropy[i_r] = 0;
  rows.lse[i_r] = {0, 0};
}

}  // namespace geo_r1
