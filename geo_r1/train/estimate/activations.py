"""Bytes that a forward keeps for backward, counted layer by layer from a Qwen-VL's config.

By what the layers compute, s bytes a number in the residual stream and c in products; C, Q, K, I are the
widths of the stream, of queries, of keys and of the MLP:

    norm         4 C + s C + c C            its input in float32, normalised, and what linear layers read,
                                            each its own copy where autocast makes it
    attention    c (2 Q + 2 K) + 4 H        q and k turned, v, output, log-sum-exp
    gated MLP    4 c I                      gate, silu(gate), up, their product

liger-kernel keeps s C + c C of a norm and 3 c I of a gated MLP. Inputs of frozen linear layers, which need
not be kept, and dropout masks of adapters are not looked at: the former makes it an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from geo_r1.models.memory import Checkpointing


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number.

    Attributes:
        stream: in the residual stream of the text layers.
        compute: in products.
        casts: whether autocast narrows the input of every product, since weights are wider.
        fused: whether liger-kernel computes norms and MLPs.
    """

    stream: int
    compute: int
    casts: bool = False
    fused: bool = False

    def norm(self, width: int, stream: int, readers: int) -> int:
        """An RMSNorm and what its readers keep of its output."""
        if self.fused:
            return width * (stream + self.compute)
        return width * (4 + stream + (readers * self.compute if self.casts else stream))

    def layer_norm(self, width: int, stream: int, readers: int) -> int:
        return width * (stream + self.compute * (readers if self.casts else 1))


@dataclass(frozen=True)
class Layer:
    """A text layer, of which a row is a token, or a vision block, of which it is a patch. Bytes a row.

    Attributes:
        kept: all that backward needs.
        entry: the layer's input alone, which full checkpointing keeps.
        selected: what selective checkpointing keeps besides: the attention's output, and of the products
            behind it the first and the third.
        working: buffers that a forward or a backward of one layer needs besides what it keeps.
    """

    kept: int
    entry: int
    selected: int
    working: int

    def saved(self, kind: Checkpointing) -> int:
        """Bytes a row from a forward until the layer's backward."""
        return {"none": self.kept, "full": self.entry, "selective": self.entry + self.selected}[kind]


def text_layer(config: PreTrainedConfig, numbers: Numbers) -> Layer:
    text: Any = config.get_text_config()
    qwen3 = config.model_type == "qwen3_vl"
    heads, wide, inner = text.num_attention_heads, text.hidden_size, text.intermediate_size
    head_size = text.head_dim if qwen3 else wide // heads
    query, key = heads * head_size, text.num_key_value_heads * head_size
    c, s = numbers.compute, numbers.stream
    attention = c * (2 * query + 2 * key) + 4 * heads
    if qwen3:  # norms of q and k, which the rotary embedding reads: it keeps nothing
        attention += (query + key) * (c if numbers.fused else 4 + c)
    kept = numbers.norm(wide, s, 3) + attention + numbers.norm(wide, s, 2) + (4 - numbers.fused) * c * inner
    selected = c * (query + wide + inner) + 4 * heads
    return Layer(kept, s * wide, selected, c * (3 * inner + 2 * query) + 2 * s * wide)


def vision_block(config: PreTrainedConfig, numbers: Numbers) -> Layer:
    vision: Any = config.vision_config  # type: ignore[attr-defined]  # these families have one
    wide, inner = _vision_widths(config)
    c, s = numbers.compute, _vision_stream(config, numbers)
    attention = c * (3 + 2 + 1) * wide + 4 * vision.num_heads  # v is a part of the qkv product, which stays
    if config.model_type == "qwen2_5_vl":
        kept = numbers.norm(wide, s, 1) + numbers.norm(wide, s, 2) + (4 - numbers.fused) * c * inner
        selected = wide + inner  # products are proj, gate, up, down
    else:  # qwen2_vl's quick GELU keeps its sigmoid, too
        kept = 2 * numbers.layer_norm(wide, s, 1) + (3 if config.model_type == "qwen2_vl" else 2) * c * inner
        selected = wide + wide  # proj, fc1, fc2
    selected = c * (wide + selected) + 4 * vision.num_heads
    return Layer(kept + attention, s * wide, selected, c * (3 * inner + 3 * wide) + 2 * s * wide)


def kept_bytes(
    config: PreTrainedConfig,
    numbers: Numbers,
    kind: Checkpointing,
    tokens: int,
    patches: int,
    *,
    tower: bool = True,
) -> int:
    """What `PackedVLM.loss_rows` keeps for backward, weights left out.

    Args:
        tokens: of the batch.
        patches: of its pictures.
        tower: whether anything of the vision tower or its projector is trained; else it keeps nothing.
    """
    text: Any = config.get_text_config()
    vision: Any = config.vision_config  # type: ignore[attr-defined]
    wide = text.hidden_size
    total = text.num_hidden_layers * text_layer(config, numbers).saved(kind) * tokens
    total += wide * numbers.stream * tokens + (0 if numbers.fused else 4 * wide * tokens)  # the last norm
    if tower:
        block = vision_block(config, numbers)
        total += (vision.depth * block.saved(kind) + _around_blocks(config, numbers)) * patches
    return total


def working_bytes(
    config: PreTrainedConfig, numbers: Numbers, kind: Checkpointing, tokens: int, patches: int
) -> int:
    """Of the layer that backward is at: what it computes again, and the gradients on their way."""
    layers = ((text_layer(config, numbers), tokens), (vision_block(config, numbers), patches))
    return max((layer.working + (layer.kept if kind != "none" else 0)) * rows for layer, rows in layers)


def _around_blocks(config: PreTrainedConfig, numbers: Numbers) -> int:
    """Bytes a patch in the patch embedding and the mergers."""
    vision: Any = config.vision_config  # type: ignore[attr-defined]
    c, s = numbers.compute, _vision_stream(config, numbers)
    wide, _ = _vision_widths(config)
    pixels = c * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    norm = numbers.norm if config.model_type == "qwen2_5_vl" else numbers.layer_norm
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return pixels + mergers * (
        norm(wide, s, 1) + 2 * c * wide
    )  # GELU keeps its input, the last product its own


def _vision_widths(config: PreTrainedConfig) -> tuple[int, int]:
    vision: Any = config.vision_config  # type: ignore[attr-defined]
    if config.model_type == "qwen2_vl":
        return vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    return vision.hidden_size, vision.intermediate_size


def _vision_stream(config: PreTrainedConfig, numbers: Numbers) -> int:
    """The tower's stream begins with a product, but for Qwen3-VL's positions, which are added in full."""
    return numbers.stream if config.model_type == "qwen3_vl" else numbers.compute
