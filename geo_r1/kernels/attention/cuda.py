"""Packed attention in CUDA for compute capability 9.0; the kernels are csrc/packed_attention_*sm90.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo_r1.kernels.attention.flash import loadable
from geo_r1.kernels.extension import launch
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import SHORT

TILE, SHORT_TILE = 128, SHORT  # tokens, of queries and of keys: two warpgroups and one


def tiles(q_THD: Tensor, layout: PackedLayout, short: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of queries, twice, and of keys: forward and backward cut alike."""
    query_tiles, key_tiles = layout.tiles(_tile_rows(short))
    return query_tiles, query_tiles, key_tiles


def forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, query_tiles: Tensor, short: bool, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and the base-2 log-sum-exp [H, T]."""
    num_tokens, num_heads, _ = q_THD.shape
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_THD.device)
    # Held until the launch: an address keeps nothing alive.
    q, k, v = map(_readable, (q_THD, k_TKD, v_TKD))
    launch(
        "packed_attention_forward",
        q,
        **_inputs(q, k, v, causal, scale),
        out=out_THD,
        lse=lse_HT,
        tiles=query_tiles,
        num_tiles=query_tiles.shape[0],
        tile_rows=_tile_rows(short),
    )
    return out_THD, lse_HT


def backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    d_query_tiles: Tensor,
    key_tiles: Tensor,
    short: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv of every query head, all [T, H, D]."""
    dq_THD, dk_THD, dv_THD = (torch.empty_like(out_THD) for _ in range(3))
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
        tile_rows=_tile_rows(short),
    )
    return dq_THD, dk_THD, dv_THD


def _tile_rows(short: bool) -> int:
    return SHORT_TILE if short else TILE


def _readable(x: Tensor) -> Tensor:
    """x, or a copy that bulk copies can read: 16-byte steps, and each number at an address of its own."""
    return loadable(x if all(x.stride()) else x.contiguous())


def _inputs(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> dict[str, Any]:
    return {
        "dtype": q.dtype,
        "q": q,
        "k": k,
        "v": v,
        "num_tokens": q.shape[0],
        "num_heads": q.shape[1],
        "num_key_heads": k.shape[1],
        "head_size": q.shape[2],
        **{f"stride_{name}_{axis}": x.stride(i)
           for name, x in (("q", q), ("k", k), ("v", v)) for i, axis in enumerate("th")},
        "scale": scale,
        "causal": causal,
    }  # fmt: skip
