"""The GRPO family of losses, from full logits or straight from hidden states.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

The ops on hidden states never hold the full logits [R, V]:

    logits = hidden lm_head^T / temperature;  logp = logits[target] - logsumexp(logits)
    dlogits = dlogp (onehot - p) - dH p (log p + H)

They walk the rows in chunks, whose logits live in one bounded scratch buffer, in one of two ways:

- A loss is one number, so its gradients are computed in the forward pass: three products in all (logits,
  dhidden, dlm_head), 3 * 2 R C V operations, and backward only multiplies. With ratios per sequence no row's
  gradient is known before the last row's log-probability: several chunks are walked twice, four products.
- Log-probabilities that are differentiated themselves recompute a chunk's logits in backward: four products.

Without a gradient there is one product; a frozen head or frozen hidden states skip theirs.

Source: GRPO, arXiv:2402.03300; options and names follow TRL's GRPOTrainer; fused linear cross-entropy,
Liger-Kernel, arXiv:2410.10989; recomputation, arXiv:2411.09009.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geo_r1.kernels.impls import autocast_dtype, resolve_impl
from geo_r1.kernels.loss.checks import (
    check_linear,
    check_matrix,
    check_row,
    check_rows,
    check_target,
    refused_dtype,
)
from geo_r1.kernels.loss.config import DEFAULT_CONFIG, GRPOLossConfig
from geo_r1.kernels.loss.op import linear_grpo_loss_op, linear_logprob_op
from geo_r1.kernels.loss.reference import LossRows


@dataclass(frozen=True)
class GRPOLossOutput:
    """The loss, and a report of each row. Rows of weight zero report 0, 0, 0, 1 and False.

    float32, or float64 for float64 inputs.
    """

    loss: Tensor  # scalar, differentiable
    logp_R: Tensor  # [R] nats, no gradient, as are all below
    entropy_R: Tensor  # [R] nats
    kl_R: Tensor  # [R] nats, by the chosen estimator; zeros without ref_logp_R
    ratio_R: Tensor  # [R] policy / old policy, before any clipping; one per sequence with level "sequence"
    # [R] bool: ratio outside [1 - epsilon, 1 + epsilon_high] on the side to which the advantage pushes; with
    # "cispo": above epsilon_high with a positive advantage; with "sapo": never
    clipped_R: Tensor


def grpo_loss(
    logits_RV: Tensor,
    target_R: Tensor,
    advantage_R: Tensor,
    token_weight_R: Tensor,
    *,
    old_logp_R: Tensor | None = None,
    ref_logp_R: Tensor | None = None,
    importance_weight_R: Tensor | None = None,
    sequence_R: Tensor | None = None,
    entropy_weight_R: Tensor | None = None,
    config: GRPOLossConfig = DEFAULT_CONFIG,
    impl: str | None = None,
) -> GRPOLossOutput:
    """GRPO's loss from full logits.

        L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)
        clip:  policy = -min(min(ratio, delta) A, clamp(ratio, 1 - epsilon, 1 + epsilon_high) A)
        cispo: policy = -stop_gradient(min(ratio, epsilon_high)) A logp
        sapo:  policy = -4 / tau sigmoid(tau (ratio - 1)) A
        vespo: policy = -stop_gradient(phi(prod of the sequence's ratios)) A logp
        geo_mean: policy = -exp(mean over the sequence of clamped log-ratios) A

    Differentiable in `logits_RV` only. A row of weight zero contributes exactly zero, whatever it holds. With
    old_logp_R=None the ratio is 1, so NaN logits show in logp_R and the gradient, but the loss may be finite.

    Args:
        logits_RV: [R, V] float16, bfloat16, float32 or float64. R = 0 is legal, and its loss is 0.
        target_R: [R] int64 in [0, V), the sampled tokens.
        advantage_R: [R] floating, no unit, the advantage of each row's completion.
        token_weight_R: [R] floating, the weights by which rows are averaged, see `token_weights`.
        old_logp_R: [R] floating, nats, under the policy that sampled the tokens. None: strictly on-policy,
            the ratio is 1 and its gradient is kept.
        ref_logp_R: [R] floating, nats, under the reference model. Needed if beta is not 0.
        importance_weight_R: [R] floating, multiplies the policy term (correction for a sampler that differs
            from the old policy). None: 1.
        sequence_R: [R] int64, the completion of each row; any ids, rows in any order. Needed where a row's
            loss depends on its sequence: levels other than "token", "vespo", off_policy_mask_threshold.
        entropy_weight_R: [R] floating, the weights by which entropies are averaged. None: token_weight_R.
        config: options.
        impl: implementation, see `available_impls()`.

    Returns:
        GRPOLossOutput.

    Raises:
        ValueError: a shape, dtype or device is wrong, the options need an input that is missing, or (on the
            CPU) a target is out of range.

    Source: GRPO, arXiv:2402.03300; clip higher and token averages, DAPO, arXiv:2503.14476; sequence ratios,
        GSPO, arXiv:2507.18071; cispo, arXiv:2506.13585; sapo, arXiv:2511.20347; TRL's GRPOTrainer.
    """
    check_matrix("logits_RV", logits_RV)
    impl = resolve_impl("grpo_loss", impl, logits_RV.device, refused_dtype(logits_RV))
    rows = LossRows(
        advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R, entropy_weight_R
    )
    check_rows(logits_RV, target_R, logits_RV.shape[1], config, rows)
    outputs = torch.ops.geo_r1.grpo_loss(logits_RV, target_R, *rows.detached(), *config.values, impl)
    return GRPOLossOutput(*outputs[:6])


# Cross-entropy is this policy's term with a ratio and an advantage of 1: -min(ratio, 1) A logp.
CROSS_ENTROPY = GRPOLossConfig(policy="cispo", epsilon_high=1.0)


def linear_grpo_loss(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    advantage_R: Tensor,
    token_weight_R: Tensor,
    *,
    old_logp_R: Tensor | None = None,
    ref_logp_R: Tensor | None = None,
    importance_weight_R: Tensor | None = None,
    sequence_R: Tensor | None = None,
    entropy_weight_R: Tensor | None = None,
    config: GRPOLossConfig = DEFAULT_CONFIG,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> GRPOLossOutput:
    """GRPO's loss from hidden states: `grpo_loss(hidden_RC @ lm_head_VC.T, ...)` without the logits.

    Differentiable, once, in `hidden_RC` and `lm_head_VC`. Products run in the inputs' dtype, statistics in
    float32 (float64 for float64 inputs). The head's gradient is summed over chunks in the head's dtype for up
    to four chunks, in float32 beyond. Autocast casts float32 states, and so the products, to its dtype.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, the states that predict the targets.
        lm_head_VC: [V, C] same dtype and device, or float32 with narrower states; may be the embedding.
        target_R, advantage_R, token_weight_R: see `grpo_loss`.
        old_logp_R, ref_logp_R, importance_weight_R, sequence_R, entropy_weight_R, config: see `grpo_loss`.
        impl: implementation, see `available_impls()`.
        scratch_bytes: bound on the temporaries of a chunk of rows; None takes 1,088 MiB on a GPU, 64 MiB on a
            CPU. More rows a chunk make larger products.

    Returns:
        GRPOLossOutput.

    Raises:
        ValueError: as for `grpo_loss`; or hidden states and head do not fit each other.

    Source: see `grpo_loss` and this module.
    """
    hidden_RC = _autocast(hidden_RC)
    check_linear(hidden_RC, lm_head_VC)
    impl = resolve_impl("linear_grpo_loss", impl, hidden_RC.device, refused_dtype(hidden_RC))
    rows = LossRows(
        advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R, entropy_weight_R
    )
    check_rows(hidden_RC, target_R, lm_head_VC.shape[0], config, rows)
    return _loss(hidden_RC, lm_head_VC, target_R, rows, config, impl, scratch_bytes)


def linear_logprob(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    *,
    temperature: float = 1.0,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and entropy of its distribution, without the logits.

        z = hidden lm_head^T / temperature;  logp = z[target] - logsumexp(z);  H = -sum_v p_v log p_v

    Both are differentiable, once, in `hidden_RC` and `lm_head_VC`.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, the states that predict the targets.
        lm_head_VC: [V, C] same dtype and device, or float32 with narrower states; may be the embedding.
        target_R: [R] int64 in [0, V).
        temperature: divides the logits.
        impl, scratch_bytes: see `linear_grpo_loss`.

    Returns:
        logp_R, entropy_R: [R] float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: a shape, dtype or device is wrong, the temperature is not positive, or (on the CPU) a
            target is out of range.

    Source: recomputation in backward, Cut Your Losses, arXiv:2411.09009.
    """
    hidden_RC = _autocast(hidden_RC)
    check_linear(hidden_RC, lm_head_VC)
    impl = resolve_impl("linear_logprob", impl, hidden_RC.device, refused_dtype(hidden_RC))
    check_target(target_R, hidden_RC, lm_head_VC.shape[0])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    return linear_logprob_op(hidden_RC, lm_head_VC, target_R, temperature, impl, _checked(scratch_bytes))


def linear_cross_entropy(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    token_weight_R: Tensor,
    *,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Weighted cross-entropy from hidden states, without the logits.

        L = -sum_t w_t logp_t

    Differentiable, once, in `hidden_RC` and `lm_head_VC`. A row of weight zero contributes exactly zero.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, the states that predict the targets.
        lm_head_VC: [V, C] same dtype and device, or float32 with narrower states; may be the embedding.
        target_R: [R] int64 in [0, V), also where the weight is zero.
        token_weight_R: [R] floating, e.g. 1 / tokens of the step.
        impl, scratch_bytes: see `linear_grpo_loss`.

    Returns:
        Scalar float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: a shape, dtype or device is wrong, or (on the CPU) a target is out of range.

    Source: gradients in the forward pass, Liger-Kernel, arXiv:2410.10989.
    """
    hidden_RC = _autocast(hidden_RC)
    check_linear(hidden_RC, lm_head_VC)
    impl = resolve_impl("linear_cross_entropy", impl, hidden_RC.device, refused_dtype(hidden_RC))
    check_target(target_R, hidden_RC, lm_head_VC.shape[0])
    check_row("token_weight_R", token_weight_R, hidden_RC)
    rows = LossRows(torch.ones_like(token_weight_R), token_weight_R, None, None, None, None)
    return _loss(hidden_RC, lm_head_VC, target_R, rows, CROSS_ENTROPY, impl, scratch_bytes).loss


def _loss(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    rows: LossRows,
    config: GRPOLossConfig,
    impl: str,
    scratch_bytes: int | None,
) -> GRPOLossOutput:
    rows_R = rows.detached()
    unit = _weight_unit(rows_R.token_weight_R)
    rows_R = rows_R._replace(token_weight_R=_wide(rows_R.token_weight_R) / unit)
    if rows_R.entropy_weight_R is not None:
        rows_R = rows_R._replace(entropy_weight_R=_wide(rows_R.entropy_weight_R) / unit)
    grad = torch.is_grad_enabled()
    loss, *reports_R, _, _ = linear_grpo_loss_op(
        hidden_RC,
        lm_head_VC,
        target_R,
        *rows_R,
        *config.values,
        grad and hidden_RC.requires_grad,
        grad and lm_head_VC.requires_grad,
        impl,
        _checked(scratch_bytes),
    )
    return GRPOLossOutput(loss * unit, *reports_R)


def _checked(scratch_bytes: int | None) -> int:
    """The ops' argument: 0 stands for the device's own bound."""
    if scratch_bytes is not None and scratch_bytes < 1:
        raise ValueError(f"scratch_bytes: expected a number above 0, got {scratch_bytes}")
    return scratch_bytes or 0


def _autocast(hidden_RC: Tensor) -> Tensor:
    """The states in autocast's dtype for products. The head is cast too, its gradient is not."""
    dtype = autocast_dtype(hidden_RC.device)
    return hidden_RC if dtype is None or hidden_RC.dtype != torch.float32 else hidden_RC.to(dtype)


def _wide(row_R: Tensor) -> Tensor:
    return row_R.to(torch.promote_types(row_R.dtype, torch.float32))


def _weight_unit(weight_R: Tensor) -> Tensor:
    """A power of two near the largest weight; dividing weights and multiplying the loss by it is exact.

    Gradients made in the forward pass precede any loss scale. Without the unit, a mean over many tokens would
    push them below the range of float16.
    """
    if weight_R.numel() == 0:
        return weight_R.new_ones((), dtype=torch.float32)
    size_R = weight_R.detach().abs().float()
    # They must not exceed that range either: rows with the same target add up in the head's gradient.
    largest = torch.maximum(size_R.amax(), size_R.sum() / 256)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
