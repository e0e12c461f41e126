"""Packed attention in Triton as a torch op: it walks the tiles of a layout, see `schedule.py`.

The kernels, with what they compute and move, stand in `attention_triton_forward.py` and
`attention_triton_backward.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.attention import TRITON_HEAD_SIZES
from geo_r1.kernels.attention_triton_backward import D_KEY, D_QUERY, backward
from geo_r1.kernels.attention_triton_forward import FORWARD, choose_row, forward
from geo_r1.kernels.launch import Launch
from geo_r1.kernels.layout import PackedLayout

LAUNCHES: tuple[Launch, ...] = (*FORWARD.values(), *D_QUERY.values(), *D_KEY.values())
SHORT = 64  # the longest segment, in tokens, of a layout that takes the rows for short ones


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, causal: bool, scale: float
) -> Tensor:
    """`packed_attention` of checked inputs: float16, bfloat16 or float32, D of TRITON_HEAD_SIZES."""
    tiles, short = _tiles(q_THD, layout)
    return _packed_attention(q_THD, k_TKD, v_TKD, *tiles, short, causal, scale)[0]


def _tiles(q_THD: Tensor, layout: PackedLayout) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Tiles of queries for the forward pass and for dq, tiles of keys; whether segments are short."""
    short = layout.max_segment_len <= SHORT
    queries, d_queries, d_keys = (
        dict(choose_row(table, q_THD.dtype, q_THD.shape[2], short).blocks)
        for table in (FORWARD, D_QUERY, D_KEY)
    )
    query_tiles, _ = layout.tiles(queries["BM"])
    d_query_tiles, _ = layout.tiles(d_queries["BM"])
    _, key_tiles = layout.tiles(d_keys["BN"])
    return (query_tiles, d_query_tiles, key_tiles), short


@torch.library.custom_op("geo_r1::packed_attention_triton", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """Output, and the base-2 log-sum-exp [H, T] that the backward pass reads."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return forward(q, k, v, query_tiles, short, causal, scale)


@_packed_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("geo_r1::packed_attention_triton_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return backward(d_out, q, k, v, out, lse, d_query_tiles, key_tiles, short, causal, scale)


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
    return *grads, *[None] * 6


_packed_attention.register_autograd(_backward, setup_context=_save)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches that together choose every row, for each head size: causal with shared keys, and neither."""
    kinds = (
        ("short", SHORT, torch.bfloat16),
        ("long", SHORT + 1, torch.bfloat16),
        ("", SHORT, torch.float32),
    )
    for (kind, length, dtype), head_size, causal in product(kinds, TRITON_HEAD_SIZES, (True, False)):
        label = f"packed_attention {kind} D={head_size} {'causal' if causal else 'full'} {dtype}"
        yield label, partial(_forward_and_backward, length, head_size, causal, dtype)


def _forward_and_backward(length: int, head_size: int, causal: bool, dtype: torch.dtype) -> None:
    layout, scale = PackedLayout.from_lengths([length]), head_size**-0.5
    q, d_out = (torch.zeros(length, 2, head_size, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(length, 1 if causal else 2, head_size, dtype=dtype) for _ in range(2))
    tiles, short = _tiles(q, layout)
    out, lse = forward(q, k, v, tiles[0], short, causal, scale)
    backward(d_out, q, k, v, out, lse, *tiles[1:], short, causal, scale)
