"""The losses as torch ops: from logits, and from hidden states chunk by chunk.

`public.py` states what they compute and checks their inputs. Gradients are saved or, for log-probabilities,
recomputed in backward. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.loss import reference
from geo_r1.kernels.loss.chunks import ChunkWalk
from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import LossRows, RowLoss, grpo_row_loss
from geo_r1.kernels.loss.rows import in_kernels, row_kernels

NUM_ROWS = len(LossRows._fields)
ROWS_SCHEMA = (
    "Tensor target_R, Tensor advantage_R, Tensor token_weight_R, Tensor? old_logp_R, Tensor? ref_logp_R, "
    "Tensor? importance_weight_R, Tensor? sequence_R, Tensor? entropy_weight_R"
)


def _grpo_loss(logits_RV: Tensor, target_R: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The loss and five reports; for backward, lse and the loss's derivatives in logp and entropy."""
    rows_R = LossRows(*arguments[:NUM_ROWS])
    *fields, impl = arguments[NUM_ROWS:]
    config = GRPOLossConfig(*fields)
    if impl != "reference" and in_kernels(config, rows_R):
        terms, logp_R, entropy_R, lse_R2 = row_kernels(impl).grpo_row_loss(
            logits_RV, target_R, rows_R, config
        )
    else:
        if impl == "reference":
            logp_R, entropy_R = reference.row_statistics(logits_RV, target_R, config.temperature)
            lse_R2 = logp_R.new_zeros(len(logp_R), 2)  # the reference's backward does not read it
        else:
            statistics = row_kernels(impl).row_statistics
            logp_R, entropy_R, lse_R2 = statistics(logits_RV, target_R, config.temperature)
        terms = reference.grpo_row_loss(logp_R, entropy_R, rows_R, config)
    outputs = loss_outputs(terms, rows_R.token_weight_R, logp_R, entropy_R)
    return *outputs, lse_R2, terms.d_logp_R, terms.d_entropy_R


def _grpo_loss_fake(logits_RV: Tensor, *_: Any) -> tuple[Tensor, ...]:
    row_R = fake_row(logits_RV)
    return *fake_loss_outputs(logits_RV), row_R.new_empty(len(row_R), 2), row_R, torch.empty_like(row_R)


def _setup_grpo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_RV, target_R, *_ = inputs
    _, _, entropy_R, _, _, _, lse_R2, d_logp_R, d_entropy_R = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_RV, target_R, lse_R2, entropy_R, d_logp_R, d_entropy_R)
    *_, entropy_coef, temperature, impl = inputs
    ctx.options = (entropy_coef != 0, temperature, impl)


def _grpo_loss_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    d_logits_RV = None
    if d_loss is not None:
        d_logits_RV = torch.ops.geo_r1.logit_gradient(*ctx.saved_tensors, d_loss, *ctx.options)
    return d_logits_RV, *(None for _ in ctx.needs_input_grad[1:])


@torch.library.custom_op(
    "geo_r1::logit_gradient",
    mutates_args=(),
    schema="(Tensor logits_RV, Tensor target_R, Tensor lse_R2, Tensor entropy_R, Tensor d_logp_R, "
    "Tensor d_entropy_R, Tensor d_loss, bool entropy_term, float temperature, str impl) -> Tensor",
)
def _logit_gradient(
    logits_RV, target_R, lse_R2, entropy_R, d_logp_R, d_entropy_R, d_loss, entropy_term, temperature, impl
):
    wanted_R = d_entropy_R if entropy_term else None
    if impl == "reference":
        options = (wanted_R, temperature, d_loss)
        return reference.logit_gradient(logits_RV, target_R, entropy_R, d_logp_R, *options)
    return row_kernels(impl).logit_gradient(
        logits_RV, target_R, lse_R2, entropy_R, d_logp_R, wanted_R, temperature, d_loss=d_loss
    )


@_logit_gradient.register_fake
def _(logits_RV: Tensor, *_: Any) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape)


_grpo_loss_op = torch.library.custom_op(
    "geo_r1::grpo_loss",
    _grpo_loss,
    mutates_args=(),
    schema=f"(Tensor logits_RV, {ROWS_SCHEMA}, {GRPOLossConfig.schema()}, str impl) -> "
    f"({', '.join(['Tensor'] * 9)})",
)
_grpo_loss_op.register_fake(_grpo_loss_fake)
_grpo_loss_op.register_autograd(_grpo_loss_backward, setup_context=_setup_grpo_loss)


def loss_outputs(
    terms: RowLoss, token_weight_R: Tensor, logp_R: Tensor, entropy_R: Tensor
) -> tuple[Tensor, ...]:
    """The fields of GRPOLossOutput; a row of weight zero has logp and entropy 0, whatever it holds."""
    kept_R = token_weight_R != 0
    logp_R, entropy_R = (torch.where(kept_R, row_R, 0.0) for row_R in (logp_R, entropy_R))
    return terms.loss_R.sum(), logp_R, entropy_R, terms.kl_R, terms.ratio_R, terms.clipped_R


def fake_row(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[R] of the given dtype, or of the dtype of statistics of `like` [R, *]."""
    return like.new_empty(like.shape[0], dtype=dtype or torch.promote_types(like.dtype, torch.float32))


def fake_loss_outputs(like: Tensor) -> tuple[Tensor, ...]:
    """Shapes and dtypes of the fields of GRPOLossOutput."""
    rows_R = (fake_row(like) for _ in range(4))
    return fake_row(like).new_empty(()), *rows_R, fake_row(like, torch.bool)


def _linear_grpo_loss(
    hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The fields of GRPOLossOutput, and the gradients of hidden states and head, empty if not needed."""
    rows_R = LossRows(*arguments[:NUM_ROWS])
    *fields, needs_hidden, needs_head, impl, scratch_bytes = arguments[NUM_ROWS:]
    config = GRPOLossConfig(*fields)
    # On a GPU, counting rows of weight zero would wait for the device. So they stay in the products, where
    # they must be finite, since zero times NaN is NaN. On a CPU they are left out.
    kept_R = rows_R.token_weight_R != 0
    if hidden_RC.device.type != "cpu":
        hidden_RC = torch.where(kept_R[:, None], hidden_RC, 0.0)
    elif not kept_R.all():
        return _without_dropped_rows(kept_R, hidden_RC, lm_head_VC, target_R, arguments)
    needs = {"needs_hidden": needs_hidden, "needs_head": needs_head}
    walk = ChunkWalk(hidden_RC, lm_head_VC, impl, scratch_bytes, **needs)

    if config.by_row:
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
        again = len(hidden_RC) > walk.num_chunk_rows  # a single chunk's statistics are still in its buffers
        for rows in walk.chunks() if walk.needs_any else ():
            if again:
                walk.rows.statistics(walk.logits(rows), target_R[rows], config.temperature)
            d_entropy_r = terms.d_entropy_R[rows] if config.entropy_coef != 0 else None
            walk.add_gradients(rows, walk.rows.gradient(terms.d_logp_R[rows], d_entropy_r))
    return *loss_outputs(terms, rows_R.token_weight_R, logp_R, entropy_R), *walk.results()


def _without_dropped_rows(
    kept_R: Tensor, hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Run the op on the rows with a weight, and put the results back in place."""
    index_r = kept_R.nonzero().squeeze(1)
    rows_r = LossRows(*arguments[:NUM_ROWS]).part(index_r)
    loss, *reports_r, d_hidden_rC, d_head_VC = _linear_grpo_loss(
        hidden_RC[index_r], lm_head_VC, target_R[index_r], *rows_r, *arguments[NUM_ROWS:]
    )
    reports_R = [
        torch.full(kept_R.shape, idle, dtype=row_r.dtype).index_copy_(0, index_r, row_r)
        for row_r, idle in zip(reports_r, (0, 0, 0, 1, False), strict=True)
    ]
    if arguments[-4]:
        d_hidden_rC = hidden_RC.new_zeros(hidden_RC.shape).index_copy_(0, index_r, d_hidden_rC)
    return loss, *reports_R, d_hidden_rC, d_head_VC


def _walk_statistics(walk: ChunkWalk, target_R: Tensor, temperature: float) -> tuple[Tensor, ...]:
    chunks = [walk.rows.statistics(walk.logits(rows), target_R[rows], temperature) for rows in walk.chunks()]
    return _joined(chunks, walk.hidden_RC, 2)


def _joined(chunks: Sequence[tuple[Tensor, ...]], like: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Concatenate each output over all chunks; without chunks, `num_rows` empty outputs."""
    if not chunks:
        return tuple(
            fake_row(like, torch.bool if i == RowLoss._fields.index("clipped_R") else None)
            for i in range(num_rows)
        )
    return tuple(torch.cat(rows) for rows in zip(*chunks, strict=True))


def _linear_grpo_loss_fake(hidden_RC: Tensor, lm_head_VC: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return *fake_loss_outputs(hidden_RC), *_fake_gradients(hidden_RC, lm_head_VC, *arguments[-4:-2])


def _fake_gradients(
    hidden_RC: Tensor, lm_head_VC: Tensor, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor, Tensor]:
    d_hidden_RC = hidden_RC.new_empty(hidden_RC.shape if needs_hidden else 0)
    return d_hidden_RC, lm_head_VC.new_empty(lm_head_VC.shape if needs_head else 0)


def _setup_linear_grpo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-4:-2]
    ctx.save_for_backward(*output[-2:])


def _linear_grpo_loss_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads = (
        torch.ops.geo_r1.scaled(grad, d_loss) if needed and d_loss is not None else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *grads, *(None for _ in ctx.needs_input_grad[2:])


@torch.library.custom_op("geo_r1::scaled", mutates_args=())
def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, rounded once from the factor's own dtype.

    Not in place, since the graph may be retained. `out` avoids a float32 copy of the head's gradient.
    """
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


@_scaled.register_fake
def _(grad: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(grad)


linear_grpo_loss_op = torch.library.custom_op(
    "geo_r1::linear_grpo_loss",
    _linear_grpo_loss,
    mutates_args=(),
    schema=f"(Tensor hidden_RC, Tensor lm_head_VC, {ROWS_SCHEMA}, {GRPOLossConfig.schema()}, "
    f"bool needs_hidden, bool needs_head, str impl, int scratch_bytes) -> ({', '.join(['Tensor'] * 8)})",
)
linear_grpo_loss_op.register_fake(_linear_grpo_loss_fake)
linear_grpo_loss_op.register_autograd(_linear_grpo_loss_backward, setup_context=_setup_linear_grpo_loss)


@torch.library.custom_op("geo_r1::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden_RC: Tensor, lm_head_VC: Tensor, target_R: Tensor, temperature: float, impl: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    walk = ChunkWalk(hidden_RC, lm_head_VC, impl, scratch_bytes)
    logp_R, entropy_R = _walk_statistics(walk, target_R, temperature)
    return logp_R, entropy_R


@linear_logprob_op.register_fake
def _(hidden_RC: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_row(hidden_RC), fake_row(hidden_RC)


@torch.library.custom_op(
    "geo_r1::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor? d_logp_R, Tensor? d_entropy_R, Tensor hidden_RC, Tensor lm_head_VC, Tensor target_R, "
    "float temperature, bool needs_hidden, bool needs_head, str impl, int scratch_bytes) -> (Tensor, Tensor)",
)
def _linear_logprob_backward(
    d_logp_R, d_entropy_R, hidden_RC, lm_head_VC, target_R, temperature, needs_hidden, needs_head, *how
):
    """Both gradients; each chunk's logits are recomputed."""
    walk = ChunkWalk(hidden_RC, lm_head_VC, *how, needs_hidden=needs_hidden, needs_head=needs_head)
    for rows in walk.chunks():
        walk.rows.statistics(walk.logits(rows), target_R[rows], temperature)
        d_logp_r, d_entropy_r = (None if d_R is None else d_R[rows] for d_R in (d_logp_R, d_entropy_R))
        walk.add_gradients(rows, walk.rows.gradient(d_logp_r, d_entropy_r))
    return walk.results()


@_linear_logprob_backward.register_fake
def _(_0: Any, _1: Any, hidden_RC: Tensor, lm_head_VC: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(hidden_RC, lm_head_VC, *options[2:4])


def _setup_linear_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # None for an unused output, whose term is then skipped
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _logprob_autograd(ctx: Any, *d_rows: Tensor | None) -> tuple[Tensor | None, ...]:
    temperature, *how = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.geo_r1.linear_logprob_backward(*d_rows, *ctx.saved_tensors, temperature, *needs, *how)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 4


linear_logprob_op.register_autograd(_logprob_autograd, setup_context=_setup_linear_logprob)
