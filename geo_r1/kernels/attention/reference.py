"""Packed attention in plain torch: segments of the same shape form a batch, so there is no [T, T] mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_r1.kernels.layout import PackedLayout


def reference_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, causal: bool, scale: float
) -> Tensor:
    """One call per segment shape, on gathered rows; the results are put back in order at the end."""
    outs = []
    for prefix_len, q_row, kv_row in layout.shape_buckets:
        q, k, v = (
            x.index_select(0, row.flatten()).unflatten(0, row.shape).transpose(1, 2)  # [n, heads, rows, D]
            for x, row in ((q_THD, q_row), (k_TKD, kv_row), (v_TKD, kv_row))
        )
        mask = None
        if causal and prefix_len:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix_len)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=causal and not prefix_len,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    if not outs:  # no tokens: the result is empty, and the product keeps k and v in the graph
        return q_THD * (k_TKD.sum() + v_TKD.sum())
    return torch.cat(outs).index_select(0, layout.bucket_order)
