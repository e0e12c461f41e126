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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.checks import check_linear, check_row, check_rows, check_target, refused_dtype
from geo_r1.kernels.chunks import ChunkWalk
from geo_r1.kernels.grpo_loss import (
    CONFIG_SCHEMA,
    ROWS_SCHEMA,
    GRPOLossOutput,
    fake_loss_outputs,
    fake_row,
    loss_outputs,
)
from geo_r1.kernels.impls import autocast_dtype, resolve_impl
from geo_r1.kernels.loss_config import DEFAULT_CONFIG, GRPOLossConfig
from geo_r1.kernels.reference import LossRows, RowLoss, grpo_row_loss

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
        target_R, advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R,
            config: see `grpo_loss`.
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
    return torch.ops.geo_r1.linear_logprob(hidden_RC, lm_head_VC, target_R, temperature, impl)


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
    loss, *reports_R, _, _ = torch.ops.geo_r1.linear_grpo_loss(
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


def _linear_grpo_loss(
    hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The fields of GRPOLossOutput, and the gradients in hidden states and head, empty where unwanted."""
    rows_R = LossRows(*arguments[:6])
    *fields, needs_hidden, needs_head, impl = arguments[6:]
    config = GRPOLossConfig(*fields)
    # On a GPU the number of rows of weight zero is not known here, and nothing waits for it. They cost their
    # share of the products, and are made finite: zero times NaN is NaN. On a CPU they are left out.
    kept_R = rows_R.token_weight_R != 0
    if hidden_RC.device.type != "cpu":
        hidden_RC = torch.where(kept_R[:, None], hidden_RC, 0.0)
    elif not kept_R.all():
        return _without_dropped_rows(kept_R, hidden_RC, lm_head_VC, target_R, arguments)
    walk = ChunkWalk(hidden_RC, lm_head_VC, impl, needs_hidden=needs_hidden, needs_head=needs_head)

    if config.importance_sampling_level == "token":
        chunks = []
        for rows in walk.chunks():
            part_terms, logp_r, entropy_r, d_logits_rV = walk.rows.loss(
                walk.logits(rows), target_R[rows], rows_R.part(rows), config, walk.needs_any
            )
            if d_logits_rV is not None:
                walk.add_gradients(rows, d_logits_rV)
            chunks.append((*part_terms, logp_r, entropy_r))
        *terms_R, logp_R, entropy_R = _joined(chunks, hidden_RC, 8)
        terms = RowLoss(*terms_R)
    else:
        logp_R, entropy_R = _walk_statistics(walk, target_R, config.temperature)
        terms = grpo_row_loss(logp_R, entropy_R, rows_R, config)
        again = len(hidden_RC) > walk.num_chunk_rows  # one chunk is still where its statistics were made
        for rows in walk.chunks() if walk.needs_any else ():
            if again:
                walk.rows.statistics(walk.logits(rows), target_R[rows], config.temperature)
            d_entropy_r = terms.d_entropy_R[rows] if config.entropy_coef != 0 else None
            walk.add_gradients(rows, walk.rows.gradient(terms.d_logp_R[rows], d_entropy_r))
    return *loss_outputs(terms, rows_R.token_weight_R, logp_R, entropy_R), *walk.results()


def _without_dropped_rows(
    kept_R: Tensor, hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """The op on the rows that count, its results put back in their places."""
    index_r = kept_R.nonzero().squeeze(1)
    rows_r = LossRows(*arguments[:6]).part(index_r)
    loss, *reports_r, d_hidden_rC, d_head_VC = _linear_grpo_loss(
        hidden_RC[index_r], lm_head_VC, target_R[index_r], *rows_r, *arguments[6:]
    )
    reports_R = [
        torch.full(kept_R.shape, idle, dtype=row_r.dtype).index_copy_(0, index_r, row_r)
        for row_r, idle in zip(reports_r, (0, 0, 0, 1, False), strict=True)
    ]
    if arguments[-3]:
        d_hidden_rC = hidden_RC.new_zeros(hidden_RC.shape).index_copy_(0, index_r, d_hidden_rC)
    return loss, *reports_R, d_hidden_rC, d_head_VC


def _walk_statistics(walk: ChunkWalk, target_R: Tensor, temperature: float) -> tuple[Tensor, ...]:
    chunks = [walk.rows.statistics(walk.logits(rows), target_R[rows], temperature) for rows in walk.chunks()]
    return _joined(chunks, walk.hidden_RC, 2)


def _joined(chunks: Sequence[tuple[Tensor, ...]], like: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Chunks of rows one after another; empty rows where there are no chunks."""
    if not chunks:  # of RowLoss's fields, one is a bool
        return tuple(
            fake_row(like, torch.bool if i == RowLoss._fields.index("clipped_R") else None)
            for i in range(num_rows)
        )
    return tuple(torch.cat(rows) for rows in zip(*chunks, strict=True))


def _linear_grpo_loss_fake(hidden_RC: Tensor, lm_head_VC: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return *fake_loss_outputs(hidden_RC), *_fake_gradients(hidden_RC, lm_head_VC, *arguments[-3:-1])


def _fake_gradients(
    hidden_RC: Tensor, lm_head_VC: Tensor, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor, Tensor]:
    d_hidden_RC = hidden_RC.new_empty(hidden_RC.shape if needs_hidden else 0)
    return d_hidden_RC, lm_head_VC.new_empty(lm_head_VC.shape if needs_head else 0)


def _setup_linear_grpo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-3:-1]
    ctx.save_for_backward(*output[-2:])


def _linear_grpo_loss_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads = (
        torch.ops.geo_r1.scaled(grad, d_loss) if needed and d_loss is not None else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *grads, *[None] * 21


@torch.library.custom_op("geo_r1::scaled", mutates_args=())
def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, rounded once from the factor's own dtype; a second derivative raises.

    Not in place: the graph may be kept. `out` saves a float32 copy of the head's gradient.
    """
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


@_scaled.register_fake
def _(grad: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(grad)


_linear_grpo_loss_op = torch.library.custom_op(
    "geo_r1::linear_grpo_loss",
    _linear_grpo_loss,
    mutates_args=(),
    schema=f"(Tensor hidden_RC, Tensor lm_head_VC, {ROWS_SCHEMA}, {CONFIG_SCHEMA}, "
    f"bool needs_hidden, bool needs_head, str impl) -> ({', '.join(['Tensor'] * 8)})",
)
_linear_grpo_loss_op.register_fake(_linear_grpo_loss_fake)
_linear_grpo_loss_op.register_autograd(_linear_grpo_loss_backward, setup_context=_setup_linear_grpo_loss)


@torch.library.custom_op("geo_r1::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor]:
    logp_R, entropy_R = _walk_statistics(ChunkWalk(hidden_RC, lm_head_VC, impl), target_R, temperature)
    return logp_R, entropy_R


@_linear_logprob.register_fake
def _(hidden_RC: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_row(hidden_RC), fake_row(hidden_RC)


@torch.library.custom_op("geo_r1::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    d_logp_R: Tensor | None,
    d_entropy_R: Tensor | None,
    hidden_RC: Tensor,
    lm_head_VC: Tensor,
    target_R: Tensor,
    temperature: float,
    needs_hidden: bool,
    needs_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Both gradients, from each chunk's logits made again; a second derivative raises."""
    walk = ChunkWalk(hidden_RC, lm_head_VC, impl, needs_hidden=needs_hidden, needs_head=needs_head)
    for rows in walk.chunks():
        walk.rows.statistics(walk.logits(rows), target_R[rows], temperature)
        d_logp_r, d_entropy_r = (None if d_R is None else d_R[rows] for d_R in (d_logp_R, d_entropy_R))
        walk.add_gradients(rows, walk.rows.gradient(d_logp_r, d_entropy_r))
    return walk.results()


@_linear_logprob_backward.register_fake
def _(_0: Any, _1: Any, hidden_RC: Tensor, lm_head_VC: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(hidden_RC, lm_head_VC, *options[2:4])


def _setup_linear_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an output nobody used comes as None, and skips its term
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _logprob_autograd(ctx: Any, *d_rows: Tensor | None) -> tuple[Tensor | None, ...]:
    temperature, impl = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.geo_r1.linear_logprob_backward(*d_rows, *ctx.saved_tensors, temperature, *needs, impl)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None


_linear_logprob.register_autograd(_logprob_autograd, setup_context=_setup_linear_logprob)


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
