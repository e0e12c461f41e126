"""Bytes that a forward keeps for backward, by the widths of a Qwen-VL's layers.

For each of its rows a layer keeps, with s bytes per number in the residual stream and c in products:

    two norms    2 C (4 + 2 s)    input in float32 (RMSNorm only), normalised, and output; where autocast
                                  narrows, a copy of the output for each product that reads it
    attention    c (2 Q + 2 K)    rotated queries and keys, values, output
    MLP          4 c I            gate, silu(gate), up, their product

C, Q, K and I are the widths of the stream, the queries, the keys and the MLP. liger-kernel keeps C (s + c) of
a norm and 3 c I of a gated MLP. These are upper bounds: frozen layers need less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from geo_r1.models.memory import Checkpointing


class Numbers(NamedTuple):
    """Bytes per number in the text's residual stream and in products, and how layers compute."""

    stream: int
    compute: int
    casts: bool = False  # autocast narrows the input of every product, because weights are wider
    fused: bool = False  # liger-kernel computes norms and MLPs


class Rows(NamedTuple):
    """Bytes per token: kept by all layers until backward, and needed by the one at work in each direction."""

    kept: int
    forward: int
    backward: int


def rows_of(config: PreTrainedConfig, numbers: Numbers, kind: Checkpointing) -> tuple[Rows, Rows]:
    """Of the text layers, per token; of the vision tower and its mergers, per token of an image."""
    c, family, fused = numbers.compute, config.model_type, numbers.fused

    def norm(width: int, s: int, readers: int, rms: bool = True) -> int:
        if fused and rms:
            return width * (s + c)
        return width * (4 * rms + s + (readers * c if numbers.casts else s))

    def rows(
        depth: int, layer: int, entry: int, selected: int, buffers: int, around: int, times: int
    ) -> Rows:
        saved = {"none": layer, "full": entry, "selective": entry + selected}[kind]
        again = layer * (kind != "none")
        return Rows(times * (depth * saved + around), times * buffers, times * (buffers + again))

    text: Any = config.get_text_config()
    wide, inner, s = text.hidden_size, text.intermediate_size, numbers.stream
    head_size = getattr(text, "head_dim", None) or wide // text.num_attention_heads
    query, key = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
    layer = norm(wide, s, 3) + norm(wide, s, 2) + c * (2 * query + 2 * key + (4 - fused) * inner)
    if family == "qwen3_vl":  # norms of queries and keys
        layer += (query + key) * (c if fused else 4 + c)
    selected, buffers = c * (query + wide + inner), c * (3 * inner + 2 * query) + 2 * s * wide
    tokens = rows(text.num_hidden_layers, layer, s * wide, selected, buffers, wide * (s + 4), 1)

    vision: Any = config.vision_config  # type: ignore[attr-defined]  # these families have one
    rms, quick = family == "qwen2_5_vl", family == "qwen2_vl"
    wide = vision.embed_dim if quick else vision.hidden_size
    inner = int(wide * vision.mlp_ratio) if quick else vision.intermediate_size
    s = numbers.stream if family == "qwen3_vl" else c  # only its positions are added in full precision
    mlp = 4 - fused if rms else 2 + quick  # quick GELU keeps its sigmoid
    layer = norm(wide, s, 1, rms) + norm(wide, s, 1 + rms, rms) + c * (6 * wide + mlp * inner)
    selected, buffers = c * (2 * wide + (inner if rms else wide)), c * (3 * inner + 3 * wide) + 2 * s * wide
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    around = c * pixels + mergers * (norm(wide, s, 1, rms) + 2 * c * wide)
    patches = vision.spatial_merge_size**2  # merged into one token
    return tokens, rows(vision.depth, layer, s * wide, selected, buffers, around, patches)
