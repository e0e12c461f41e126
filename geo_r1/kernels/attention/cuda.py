"""Packed attention in CUDA for compute capability 9.0; the kernels are csrc/packed_attention_*sm90.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.attention.flash import loadable
from geo_r1.kernels.extension import launch
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import SHORT

TILE, SHORT_TILE = 128, SHORT  # tokens per tile of queries or keys: two warpgroups, or one


def tiles(q_THD: Tensor, layout: PackedLayout, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of queries for the forward pass, the same tiles for dq, and tiles of keys."""
    query_tiles, key_tiles = layout.tiles(_tile_rows(kind))
    return query_tiles, query_tiles, key_tiles


def forward(q_THD, k_TKD, v_TKD, out_THD, lse_HT, query_tiles, kind, causal, scale):
    """Fill `out` and the base-2 log-sum-exp."""
    q, k, v = map(_readable, (q_THD, k_TKD, v_TKD))  # held until the launch: an address keeps nothing alive
    launch(
        "packed_attention_forward",
        q,
        **_inputs(q, k, v, causal, scale),
        out=out_THD,
        lse=lse_HT,
        tiles=query_tiles,
        num_tiles=query_tiles.shape[0],
        tile_rows=_tile_rows(kind),
    )


def backward(
    d_out_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, dq_THD, dk_THD, dv_THD,
    d_query_tiles, key_tiles, kind, causal, scale,
):  # fmt: skip
    """Fill dq, and dk and dv of every query head."""
    delta_HT = torch.empty_like(lse_HT)
    q, k, v, d_out = map(_readable, (q_THD, k_TKD, v_TKD, d_out_THD))
    launch(
        "packed_attention_backward",
        q,
        **_inputs(q, k, v, causal, scale),
        d_out=d_out,
        stride_do_t=d_out.stride(0),
        stride_do_h=d_out.stride(1),
        out=out_THD,
        lse=lse_HT,
        delta=delta_HT,
        dq=dq_THD,
        dk=dk_THD,
        dv=dv_THD,
        query_tiles=d_query_tiles,
        key_tiles=key_tiles,
        num_tiles=d_query_tiles.shape[0],
        tile_rows=_tile_rows(kind),
    )


def _tile_rows(kind: str) -> int:
    return TILE if kind == "long" else SHORT_TILE


def _readable(x: Tensor) -> Tensor:
    """x, or a copy that bulk copies can read: strides in multiples of 16 bytes, none of them 0."""
    return loadable(x if all(x.stride()) else x.contiguous())


def _inputs(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> dict[str, Any]:
    tensors = {"q": q, "k": k, "v": v}
    return {
        **tensors,
        "dtype": q.dtype,
        "num_tokens": q.shape[0],
        "num_heads": q.shape[1],
        "num_key_heads": k.shape[1],
        "head_size": q.shape[2],
        **{
            f"stride_{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")
        },
        "scale": scale,
        "causal": causal,
    }
