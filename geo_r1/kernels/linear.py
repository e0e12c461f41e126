"""Losses and log-probabilities straight from hidden states: the full logits [R, V] never exist.

    logits = hidden lm_head^T / temperature;  logp = logits[target] - logsumexp(logits)
    dlogits = dlogp (onehot - p) - dH p (log p + H)

Rows are walked in chunks whose logits live in one bounded scratch. Two ways through the vocabulary:

- A loss is one number, so it gets its gradients in the forward pass: three products in all (logits, dhidden,
  dlm_head), 3 * 2 R C V operations, and backward only multiplies. With ratios per sequence no row's gradient
  is known before the last row's log-probability: if there are several chunks they are walked twice, four
  products.
- Log-probabilities that are themselves differentiated recompute a chunk's logits in backward: four products.

Without a gradient there is one product; a frozen head or frozen hidden states skip theirs.

Source: fused linear cross-entropy, Liger-Kernel, arXiv:2410.10989; recomputation, arXiv:2411.09009.
"""

import torch
from torch import Tensor

from geo_r1.kernels.checks import check_linear, check_row, check_rows, check_target, refused_dtype
from geo_r1.kernels.grpo_loss import GRPOLossOutput
from geo_r1.kernels.impls import autocast_dtype, resolve_impl
from geo_r1.kernels.linear_op import linear_grpo_loss_op, linear_logprob_op
from geo_r1.kernels.loss_config import DEFAULT_CONFIG, GRPOLossConfig
from geo_r1.kernels.reference import LossRows

# Cross-entropy is this policy's term on data of its own: -min(ratio, 1) A logp with ratio and A of 1.
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
    config: GRPOLossConfig = DEFAULT_CONFIG,
    impl: str | None = None,
) -> GRPOLossOutput:
    """GRPO's loss from hidden states: `grpo_loss(hidden_RC @ lm_head_VC.T, ...)` without the logits.

    Differentiable, once, in `hidden_RC` and `lm_head_VC`. Products run in the inputs' dtype, statistics in
    float32 (float64 for float64 inputs). The head's gradient is summed over chunks in the head's dtype for up
    to four chunks, in float32 beyond. Autocast casts float32 states, and so the products, to its dtype.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, each the state that predicts its target.
        lm_head_VC: [V, C] same dtype and device, or float32 beside narrow states; may be the embedding's own.
        target_R, advantage_R, token_weight_R: see `grpo_loss`.
        old_logp_R, ref_logp_R, importance_weight_R, sequence_R, config: see `grpo_loss`.
        impl: implementation, see `available_impls()`.

    Returns:
        GRPOLossOutput.

    Raises:
        ValueError: as `grpo_loss`; or hidden states and head do not fit each other.

    Source: see `grpo_loss` and this module.
    """
    hidden_RC = _autocast(hidden_RC)
    check_linear(hidden_RC, lm_head_VC)
    impl = resolve_impl("linear_grpo_loss", impl, hidden_RC.device, refused_dtype(hidden_RC))
    rows = LossRows(advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R)
    check_rows(hidden_RC, target_R, lm_head_VC.shape[0], config, rows)
    return _loss(hidden_RC, lm_head_VC, target_R, rows, config, impl)


def linear_logprob(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    *,
    temperature: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and entropy of its distribution, without the logits.

        z = hidden lm_head^T / temperature;  logp = z[target] - logsumexp(z);  H = -sum_v p_v log p_v

    Both are differentiable, once, in `hidden_RC` and `lm_head_VC`.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, each the state that predicts its target.
        lm_head_VC: [V, C] same dtype and device, or float32 beside narrow states; may be the embedding's own.
        target_R: [R] int64 in [0, V).
        temperature: divides the logits.
        impl: implementation, see `available_impls()`.

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
    return linear_logprob_op(hidden_RC, lm_head_VC, target_R, temperature, impl)


def linear_cross_entropy(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    token_weight_R: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Weighted cross-entropy from hidden states, without the logits.

        L = -sum_t w_t logp_t

    Differentiable, once, in `hidden_RC` and `lm_head_VC`. A row of weight zero contributes exactly zero.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, each the state that predicts its target.
        lm_head_VC: [V, C] same dtype and device, or float32 beside narrow states; may be the embedding's own.
        target_R: [R] int64 in [0, V), also where the weight is zero.
        token_weight_R: [R] floating, e.g. 1 / tokens of the step.
        impl: implementation, see `available_impls()`.

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
    return _loss(hidden_RC, lm_head_VC, target_R, rows, CROSS_ENTROPY, impl).loss


def _loss(
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    rows: LossRows,
    config: GRPOLossConfig,
    impl: str,
) -> GRPOLossOutput:
    rows_R = rows.detached()
    unit = _weight_unit(rows_R.token_weight_R)
    grad = torch.is_grad_enabled()
    loss, *reports_R, _, _ = linear_grpo_loss_op(
        hidden_RC,
        lm_head_VC,
        target_R,
        *rows_R._replace(token_weight_R=_wide(rows_R.token_weight_R) / unit),
        *config.values,
        grad and hidden_RC.requires_grad,
        grad and lm_head_VC.requires_grad,
        impl,
    )
    return GRPOLossOutput(loss * unit, *reports_R)


def _autocast(hidden_RC: Tensor) -> Tensor:
    """The states in the dtype that autocast runs products in; the head follows, with its gradient its own."""
    dtype = autocast_dtype(hidden_RC.device)
    return hidden_RC if dtype is None or hidden_RC.dtype != torch.float32 else hidden_RC.to(dtype)


def _wide(row_R: Tensor) -> Tensor:
    return row_R.to(torch.promote_types(row_R.dtype, torch.float32))


def _weight_unit(weight_R: Tensor) -> Tensor:
    """A power of two near the largest weight: weights are divided by it and the loss multiplied, exactly.

    Gradients made in the forward pass precede any loss scale: a mean over many tokens would, without this,
    push them below what float16 can hold.
    """
    if weight_R.numel() == 0:
        return weight_R.new_ones((), dtype=torch.float32)
    size_R = weight_R.detach().abs().float()
    # Nor may they grow past it: rows that agree on a token add up in the head's gradient.
    largest = torch.maximum(size_R.amax(), size_R.sum() / 256)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
