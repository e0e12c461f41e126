"""Packed attention's own kernels as a torch op: the layout's tiles go in, a log-sum-exp is kept for backward.

Kernels of one kind are a module with `tiles`, `forward` and `backward`: `triton.py` and
`cuda.py`, which say what they compute and move.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import SHORT


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layout: PackedLayout,
    *,
    causal: bool,
    scale: float,
    impl: str,
) -> Tensor:
    """`packed_attention` of checked inputs, which the kernels of `impl` ("triton" or "cuda") take."""
    short = layout.max_segment_len <= SHORT
    tiles = _kernels(impl).tiles(q_THD, layout, short)
    return _packed_attention(q_THD, k_TKD, v_TKD, *tiles, short, causal, scale, impl)[0]


def _kernels(impl: str) -> ModuleType:
    """Imported when first used: neither triton nor the extension is needed where it does not run."""
    if impl == "cuda":
        from geo_r1.kernels.attention import cuda

        return cuda
    from geo_r1.kernels.attention import triton

    return triton


@torch.library.custom_op("geo_r1::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    d_query_tiles: Tensor,
    key_tiles: Tensor,
    short: bool,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output, and the base-2 log-sum-exp [H, T] that the backward pass reads."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return _kernels(impl).forward(q, k, v, query_tiles, short, causal, scale)


@_packed_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("geo_r1::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_query_tiles: Tensor,
    key_tiles: Tensor,
    short: bool,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Kernels leave one dk and dv a query head; those that share keys are summed."""
    with torch.cuda.device_of(q):
        dq, dk, dv = _kernels(impl).backward(
            d_out, q, k, v, out, lse, d_query_tiles, key_tiles, short, causal, scale
        )
    if (num_shared := q.shape[1] // k.shape[1]) > 1:
        dk, dv = (x.unflatten(1, (-1, num_shared)).sum(2) for x in (dk, dv))
    return dq, dk, dv


@_packed_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, *ctx.tiles_and_options = inputs
    out, lse = output
    # The tiles are not among the saved: made in inference mode they could not be, and nobody writes to them.
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if d_out is not None:
        grads = _packed_attention_backward(d_out, *ctx.saved_tensors, *ctx.tiles_and_options)
    return *grads, *[None] * 7


_packed_attention.register_autograd(_backward, setup_context=_save)
