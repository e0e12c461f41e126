"""Packed attention by our own kernels, as a torch op that keeps a log-sum-exp for its backward pass.

`triton.py` and `cuda.py` are the kernels: each has `tiles`, `forward` and `backward`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import SHORT

_OPTIONS = "str kind, bool causal, float scale, str impl"


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, causal: bool, scale: float, impl: str
) -> Tensor:
    """`packed_attention` of checked inputs by the kernels of `impl`, "triton" or "cuda"."""
    kind = kind_of(layout)
    tiles = _kernels(impl).tiles(q, layout, kind)
    return _packed_attention(q, k, v, *tiles, kind, causal, scale, impl)[0]


def kind_of(layout: PackedLayout) -> str:
    """Which launches a batch takes.

    "long"; "short" if no segment has more than 64 tokens, so a tile is a whole segment; "windows" if besides
    no segment sees another.
    """
    if layout.max_segment_len > SHORT:
        return "long"
    return "short" if layout.has_completions else "windows"


def _kernels(impl: str) -> ModuleType:
    """Import on first use, since a machine may have only Triton or only the extension."""
    if impl == "cuda":
        from geo_r1.kernels.attention import cuda

        return cuda
    from geo_r1.kernels.attention import triton

    return triton


@torch.library.custom_op(
    "geo_r1::packed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor query_tiles, Tensor d_query_tiles, Tensor key_tiles, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)
def _packed_attention(q, k, v, query_tiles, d_query_tiles, key_tiles, kind, causal, scale, impl):
    """Output, and the base-2 log-sum-exp [H, T] that the backward pass reads."""
    out, lse = _packed_attention_fake(q)
    if len(q):
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _kernels(impl).forward(q, k, v, out, lse, query_tiles, kind, causal, scale)
    return out, lse


@_packed_attention.register_fake
def _packed_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "geo_r1::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_query_tiles, "
    f"Tensor key_tiles, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _packed_attention_backward(d_out, q, k, v, out, lse, d_query_tiles, key_tiles, kind, causal, scale, impl):
    """Gradients of q, k and v. Kernels write dk and dv per query head; this sums heads that share keys."""
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    if len(q):
        tiles = (d_query_tiles, key_tiles)
        with torch.cuda.device_of(q):
            _kernels(impl).backward(d_out, q, k, v, out, lse, *grads, *tiles, kind, causal, scale)
    dq, dk, dv = grads
    if (num_shared := q.shape[1] // k.shape[1]) > 1:
        dk, dv = (x.unflatten(1, (-1, num_shared)).sum(2) for x in (dk, dv))
    return dq, dk, dv


@_packed_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, *ctx.tiles_and_options = inputs
    out, lse = output
    # Tiles are not saved: autograd refuses those made in inference mode, and nothing writes to them.
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if d_out is not None:
        grads = _packed_attention_backward(d_out, *ctx.saved_tensors, *ctx.tiles_and_options)
    return *grads, None, *(None for _ in ctx.tiles_and_options)


_packed_attention.register_autograd(_backward, setup_context=_save)
