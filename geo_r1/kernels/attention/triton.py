"""Packed attention in Triton: `triton_forward.py` and `triton_backward.py` on a layout's tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from geo_r1.kernels.attention.triton_backward import D_KEY, D_QUERY, D_WINDOW, backward
from geo_r1.kernels.attention.triton_forward import FORWARD, choose_row, forward
from geo_r1.kernels.attention.triton_merge import BLOCKS, add, merge
from geo_r1.kernels.launch import Launch
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import HEAD_SIZES, SHORT

LAUNCHES: tuple[Launch, ...] = (
    *FORWARD.values(),
    *D_QUERY.values(),
    *D_KEY.values(),
    *D_WINDOW.values(),
    *BLOCKS.values(),
)


def tiles(q_THD: Tensor, layout: PackedLayout, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of queries for the forward pass and for dq, and tiles of keys."""
    queries, d_queries, d_keys = (
        choose_row(table, q_THD, kind).blocks for table in (FORWARD, D_QUERY, D_KEY)
    )
    query_tiles, _ = layout.tiles(queries["BM"])
    d_query_tiles, _ = layout.tiles(d_queries["BM"])
    _, key_tiles = layout.tiles(d_keys["BN"])
    return query_tiles, d_query_tiles, key_tiles


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches that together choose every row; causal ones share their keys, which full ones do not.

    What the others cannot surpass is left out: full attention in float32 or with heads that no vision tower
    has, and float32 with heads that are small beside others of their row.
    """
    exact, half, full = torch.float32, torch.bfloat16, (64, 80, 128)
    kinds = (
        ("short", SHORT, half, HEAD_SIZES, full),
        ("windows", SHORT, half, HEAD_SIZES, full),
        ("long", SHORT + 1, half, HEAD_SIZES, full),
        ("short", SHORT, exact, (64, 80, 96, 128), ()),
    )
    for kind, length, dtype, causal_sizes, full_sizes in kinds:
        sizes = [(size, True) for size in causal_sizes] + [(size, False) for size in full_sizes]
        for head_size, causal in sizes:
            label = f"packed_attention {kind} D={head_size} {'causal' if causal else 'full'} {dtype}"
            yield label, partial(_forward_and_backward, kind, length, head_size, causal, dtype)
    for head_size in BLOCKS:
        yield f"merge of rows, D={head_size} bfloat16", partial(_merge_and_add, head_size, torch.arange(8))
        yield f"merge of a range, D={head_size} bfloat16", partial(_merge_and_add, head_size, slice(0, 8))


def _merge_and_add(head_size: int, places: Tensor | slice) -> None:
    out, lse = torch.zeros(8, 2, head_size, dtype=torch.bfloat16), torch.zeros(2, 8)
    merge(out, lse, out, lse, places)
    add(out, out, places)


def _forward_and_backward(kind: str, length: int, head_size: int, causal: bool, dtype: torch.dtype) -> None:
    layout, scale = PackedLayout.from_lengths([length]), head_size**-0.5
    q, d_out = (torch.zeros(length, 2, head_size, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(length, 1 if causal else 2, head_size, dtype=dtype) for _ in range(2))
    query_tiles, d_query_tiles, key_tiles = tiles(q, layout, kind)
    out, lse = torch.zeros_like(q), torch.zeros(2, length)
    if kind != "windows":  # whose forward is that of "short"
        forward(q, k, v, out, lse, query_tiles, kind, causal, scale)
    dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
    backward(d_out, q, k, v, out, lse, dq, dk, dv, d_query_tiles, key_tiles, kind, causal, scale)
