"""Losses and log-probabilities straight from hidden states: the full logits [R, V] never exist.

    logits = hidden lm_head^T / temperature;  logp = logits[target] - logsumexp(logits)
    dlogits = dlogp (onehot - p) - dH p (log p + H)

Rows are walked in chunks whose logits live in one bounded scratch. Two ways through the vocabulary:

- A loss that is one number and whose rows do not depend on each other gets its gradients in the forward
  pass: three products in all (logits, dhidden, dlm_head), 3 * 2 R C V operations; backward only multiplies.
- Log-probabilities that are themselves differentiated, and ratios per sequence, recompute a chunk's logits
  in backward: four products.

Without a gradient there is one product; a frozen head or frozen hidden states skip theirs.

Source: fused linear cross-entropy, Liger-Kernel, arXiv:2410.10989; recomputation, arXiv:2411.09009.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geo_r1.kernels.grpo_loss import (
    DEFAULT_CONFIG,
    GRPOLossConfig,
    GRPOLossOutput,
    check_matrix,
    check_row,
    check_rows,
    check_target,
    loss_output,
)
from geo_r1.kernels.impls import resolve_impl
from geo_r1.kernels.reference import ChunkWalk, grpo_row_loss

# All live temporaries of a chunk together. Accelerators: at V = 152064 and bfloat16 that is 600 to 700 rows,
# enough to keep the products bound by arithmetic (not measured). CPU: the fastest of 4, 16, 64 and 256 MiB at
# R = 384, C = 128, V = 50021 on one AMD EPYC core, in float32 and in bfloat16.
SCRATCH_BYTES = 1 << 30
SCRATCH_BYTES_CPU = 64 << 20

# (rows, logp_r, entropy_r) -> loss_r and per-row reports
RowLoss = Callable[[slice, Tensor, Tensor], tuple[Tensor, ...]]


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
    float32 (float64 for float64 inputs); the head's gradient is summed over chunks in float32.

    Args:
        hidden_RC: [R, C] float16, bfloat16, float32 or float64, each the state that predicts its target.
        lm_head_VC: [V, C] same dtype and device; may be the embedding's own tensor.
        target_R, advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R,
            config: see `grpo_loss`.
        impl: implementation, see `available_impls()`.

    Returns:
        GRPOLossOutput.

    Raises:
        ValueError: as `grpo_loss`; or hidden states and head do not fit each other.

    Source: see `grpo_loss` and this module.
    """
    resolve_impl("linear_grpo_loss", impl, hidden_RC.device)
    _check_linear(hidden_RC, lm_head_VC)
    rows_R = (advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R)
    check_rows(hidden_RC, target_R, lm_head_VC.shape[0], config, *rows_R)
    kept_R = token_weight_R != 0
    hidden_RC = torch.where(kept_R[:, None], hidden_RC, 0.0)  # zero times NaN is NaN, in either product

    if config.importance_sampling_level == "sequence":
        logp_R, entropy_R = _LinearLogprob.apply(hidden_RC, lm_head_VC, target_R, config.temperature)
        loss_R, *reports = grpo_row_loss(logp_R, entropy_R, *rows_R, config)
        return loss_output(loss_R.sum(), kept_R, logp_R, entropy_R, *reports)

    unit = _weight_unit(token_weight_R)
    weight_R = token_weight_R / unit
    optional_R = (old_logp_R, ref_logp_R, importance_weight_R)

    def row_loss(rows: slice, logp_r: Tensor, entropy_r: Tensor) -> tuple[Tensor, ...]:
        old_r, ref_r, importance_r = (None if row_R is None else row_R[rows] for row_R in optional_R)
        weight_r = weight_R[rows]
        return grpo_row_loss(
            logp_r, entropy_r, advantage_R[rows], weight_r, old_r, ref_r, importance_r, None, config
        )

    grad = torch.is_grad_enabled()
    loss, logp_R, entropy_R, *reports = _LinearRowLoss.apply(
        hidden_RC, lm_head_VC, target_R, config.temperature, row_loss, grad
    )
    return loss_output(loss * unit, kept_R, logp_R, entropy_R, *reports)


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
        lm_head_VC: [V, C] same dtype and device; may be the embedding's own tensor.
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
    resolve_impl("linear_logprob", impl, hidden_RC.device)
    _check_linear(hidden_RC, lm_head_VC)
    check_target(target_R, hidden_RC, lm_head_VC.shape[0])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    return _LinearLogprob.apply(hidden_RC, lm_head_VC, target_R, temperature)


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
        lm_head_VC: [V, C] same dtype and device; may be the embedding's own tensor.
        target_R: [R] int64 in [0, V), also where the weight is zero.
        token_weight_R: [R] floating, e.g. 1 / tokens of the step.
        impl: implementation, see `available_impls()`.

    Returns:
        Scalar float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: a shape, dtype or device is wrong, or (on the CPU) a target is out of range.

    Source: gradients in the forward pass, Liger-Kernel, arXiv:2410.10989.
    """
    resolve_impl("linear_cross_entropy", impl, hidden_RC.device)
    _check_linear(hidden_RC, lm_head_VC)
    check_target(target_R, hidden_RC, lm_head_VC.shape[0])
    check_row("token_weight_R", token_weight_R, hidden_RC)
    hidden_RC = torch.where((token_weight_R != 0)[:, None], hidden_RC, 0.0)
    unit = _weight_unit(token_weight_R)
    weight_R = (token_weight_R / unit).detach()

    def row_loss(rows: slice, logp_r: Tensor, entropy_r: Tensor) -> tuple[Tensor, ...]:
        return (-weight_R[rows].to(logp_r.dtype) * logp_r,)

    grad = torch.is_grad_enabled()
    loss, *_ = _LinearRowLoss.apply(hidden_RC, lm_head_VC, target_R, 1.0, row_loss, grad)
    return loss * unit


class _LinearRowLoss(torch.autograd.Function):
    """Sum of a loss whose rows are independent; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: Tensor,
        lm_head_VC: Tensor,
        target_R: Tensor,
        temperature: float,
        row_loss: RowLoss,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_head = (grad and needed for needed in ctx.needs_input_grad[:2])
        walk = ChunkWalk(
            hidden_RC,
            lm_head_VC,
            target_R,
            temperature,
            _scratch_bytes(hidden_RC),
            needs_hidden=needs_hidden,
            needs_head=needs_head,
        )
        needs_any = needs_hidden or needs_head
        chunks = []
        for rows in walk.chunks():
            leaves = [row.requires_grad_(needs_any) for row in walk.statistics(rows)]
            with torch.set_grad_enabled(needs_any):
                loss_r, *reports = row_loss(rows, *leaves)
                total = loss_r.sum()
            if needs_any:
                walk.gradients(rows, *torch.autograd.grad(total, leaves, allow_unused=True))
            chunks.append([row.detach() for row in (loss_r, *leaves, *reports)])
        loss_R, *reports_R = (torch.cat(rows) for rows in zip(*chunks, strict=True))
        ctx.save_for_backward(*walk.results())
        ctx.mark_non_differentiable(*reports_R)
        return loss_R.sum(), *reports_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def scaled(grad: Tensor | None) -> Tensor | None:
            # [1], not a scalar: the product is rounded once, from d_loss's own dtype, and `out` saves a
            # float32 copy of the head's gradient. Not in place: the graph may be kept.
            return None if grad is None else torch.mul(grad, d_loss.reshape(1), out=torch.empty_like(grad))

        d_hidden_RC, d_head_VC = ctx.saved_tensors
        return scaled(d_hidden_RC), scaled(d_head_VC), None, None, None, None


class _LinearLogprob(torch.autograd.Function):
    """logp and entropy, both differentiable; backward recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        walk = ChunkWalk(hidden_RC, lm_head_VC, target_R, temperature, _scratch_bytes(hidden_RC))
        chunks = [walk.statistics(rows) for rows in walk.chunks()]
        ctx.save_for_backward(hidden_RC, lm_head_VC, target_R)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output nobody used comes as None, and skips its term
        return tuple(torch.cat(rows) for rows in zip(*chunks, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp_R: Tensor | None, d_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RC, lm_head_VC, target_R = ctx.saved_tensors
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        walk = ChunkWalk(
            hidden_RC,
            lm_head_VC,
            target_R,
            ctx.temperature,
            _scratch_bytes(hidden_RC),
            needs_hidden=needs_hidden,
            needs_head=needs_head,
        )
        for rows in walk.chunks():
            walk.statistics(rows)
            d_logp_r = None if d_logp_R is None else d_logp_R[rows]
            walk.gradients(rows, d_logp_r, None if d_entropy_R is None else d_entropy_R[rows])
        return *walk.results(), None, None


def _scratch_bytes(hidden_RC: Tensor) -> int:
    return SCRATCH_BYTES_CPU if hidden_RC.device.type == "cpu" else SCRATCH_BYTES


def _weight_unit(weight_R: Tensor) -> Tensor:
    """A power of two near the largest weight: weights are divided by it and the loss multiplied, exactly.

    Gradients made in the forward pass precede any loss scale: a mean over many tokens would, without this,
    push them below what float16 can hold.
    """
    if weight_R.numel() == 0:
        return weight_R.new_ones((), dtype=torch.float32)
    largest = weight_R.detach().abs().amax().float()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _check_linear(hidden_RC: Tensor, lm_head_VC: Tensor) -> None:
    check_matrix("hidden_RC", hidden_RC)
    check_matrix("lm_head_VC", lm_head_VC)
    if lm_head_VC.shape[0] == 0 or lm_head_VC.shape[1] != hidden_RC.shape[1]:
        raise ValueError(
            f"lm_head_VC: expected [V, {hidden_RC.shape[1]}] to fit hidden_RC, got {list(lm_head_VC.shape)}"
        )
    if lm_head_VC.dtype != hidden_RC.dtype or lm_head_VC.device != hidden_RC.device:
        raise ValueError(
            f"lm_head_VC: expected {hidden_RC.dtype} on {hidden_RC.device} like hidden_RC, "
            f"got {lm_head_VC.dtype} on {lm_head_VC.device}"
        )
