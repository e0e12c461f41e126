"""The linear losses as torch ops: a walk through the vocabulary, gradients saved or made again in backward.

`linear.py` states what they compute and checks what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.chunks import ChunkWalk
from geo_r1.kernels.grpo_loss import CONFIG_SCHEMA, ROWS_SCHEMA, fake_loss_outputs, fake_row, loss_outputs
from geo_r1.kernels.loss_config import GRPOLossConfig
from geo_r1.kernels.reference import LossRows, RowLoss, grpo_row_loss


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


linear_grpo_loss_op = torch.library.custom_op(
    "geo_r1::linear_grpo_loss",
    _linear_grpo_loss,
    mutates_args=(),
    schema=f"(Tensor hidden_RC, Tensor lm_head_VC, {ROWS_SCHEMA}, {CONFIG_SCHEMA}, "
    f"bool needs_hidden, bool needs_head, str impl) -> ({', '.join(['Tensor'] * 8)})",
)
linear_grpo_loss_op.register_fake(_linear_grpo_loss_fake)
linear_grpo_loss_op.register_autograd(_linear_grpo_loss_backward, setup_context=_setup_linear_grpo_loss)


@torch.library.custom_op("geo_r1::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor]:
    logp_R, entropy_R = _walk_statistics(ChunkWalk(hidden_RC, lm_head_VC, impl), target_R, temperature)
    return logp_R, entropy_R


@linear_logprob_op.register_fake
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


linear_logprob_op.register_autograd(_logprob_autograd, setup_context=_setup_linear_logprob)
