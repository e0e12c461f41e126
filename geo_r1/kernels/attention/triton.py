"""Packed attention in Triton: `triton_forward.py` and `triton_backward.py` on a layout's tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

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
    """Launches that together choose every row, for each head size: causal with shared keys, full without."""
    kinds = (
        ("short", SHORT, torch.bfloat16),
        ("windows", SHORT, torch.bfloat16),
        ("long", SHORT + 1, torch.bfloat16),
        ("short", SHORT, torch.float32),
    )
    for (kind, length, dtype), head_size, causal in product(kinds, HEAD_SIZES, (True, False)):
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
    forward(q, k, v, out, lse, query_tiles, kind, causal, scale)
    dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
    backward(d_out, q, k, v, out, lse, dq, dk, dv, d_query_tiles, key_tiles, kind, causal, scale)
