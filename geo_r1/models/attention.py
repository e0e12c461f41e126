"""Replacements for transformers' functions: packed attention, and additions to numbered image rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface

from geo_r1.kernels import packed_attention

# The vision tower takes its packed path only if the name contains "flash".
TEXT_ATTENTION = "geo_r1_packed"
VISION_ATTENTION = "geo_r1_packed_flash"

# attend(layer index, q [T, H, D], k [T, K, D], v [T, K, D], scale) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class Hidden:
    """Hides a function from compiled layers, which would otherwise recompile for each new one."""

    def __init__(self, function: Attend) -> None:
        self.function = function


# Attention stays outside of compiled graphs: its layout holds Python lengths that change with every batch.
@torch.compiler.disable
def _text_attention(module, query, key, value, attention_mask, *, scaling, attend: Hidden, **_):
    """transformers' attention signature, [1, heads, T, D] in and [1, T, heads, D] out."""
    # under autocast the rotary embedding leaves q and k in float32
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return attend.function(module.layer_idx, q, k, v, scaling)[None], None


@torch.compiler.disable
def _vision_attention(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, vision_layouts, **_
):
    """Windows or whole images: the boundary tensor of this layer decides which."""
    layout = vision_layouts.of(cu_seq_lens_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, layout, causal=False, scale=scaling)[None], None


def add_at_rows(hidden: Tensor, rows: Tensor, features: Tensor) -> Tensor:
    """Qwen3-VL's `_deepstack_process` with row numbers: finding a mask's rows would wait for the device.

    hidden [1, T, C], rows [I] int64 and features [I, C] to [1, T, C].
    """
    return hidden.index_add(1, rows, features[None].to(hidden.dtype))


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)
