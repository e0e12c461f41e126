"""Shapes of the models whose training step is measured: Qwen2.5-VL with random weights, at several sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """What a Qwen2.5-VL config is made of; patches of 14 and vision windows of 112 pixels as in the real one.

    Attributes:
        mrope: a head's frequencies on the time, height and width axes, half the head size in all.
        full_attention: vision layers that see whole images.
        tied: one matrix embeds tokens and is the language head.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    mrope: tuple[int, int, int]
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    full_attention: tuple[int, ...]
    tied: bool = False

    @property
    def num_text_ids(self) -> int:
        """Ids below are drawn as text; the four special ones are the last."""
        return min(1000, self.vocab - 4)

    def config(self) -> dict[str, Any]:
        """Arguments of a Qwen2_5_VLConfig."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(self.mrope)}
        return {
            "text_config": {
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "rms_norm_eps": 1e-6,
                "rope_parameters": rope,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            "vision_config": {
                "depth": self.vision_layers,
                "hidden_size": self.vision_hidden,
                "intermediate_size": self.vision_intermediate,
                "num_heads": self.vision_heads,
                "out_hidden_size": self.hidden,
                "fullatt_block_indexes": list(self.full_attention),
            },
            **{name: self.vocab - 4 + index for index, name in enumerate(names)},
            "tie_word_embeddings": self.tied,
        }

    def cut(self, layers: int, vision_layers: int) -> ModelShape:
        """The first layers alone."""
        full = tuple(i for i in self.full_attention if i < vision_layers)
        return replace(self, layers=layers, vision_layers=vision_layers, full_attention=full)


QWEN_7B = ModelShape(
    vocab=152064,
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    mrope=(16, 24, 24),
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_layers=32,
    vision_heads=16,
    full_attention=(7, 15, 23, 31),
)
# As in 7B, the vision tower costs two fifths of the text layers for a prompt of images, heads have the sizes
# 80 and 64 or more, and one vision layer in six or eight sees whole images.
MID = ModelShape(  # 100 million parameters
    vocab=32768,
    hidden=640,
    intermediate=2176,
    layers=10,
    heads=10,
    kv_heads=2,
    mrope=(8, 12, 12),
    vision_hidden=240,
    vision_intermediate=648,
    vision_layers=6,
    vision_heads=3,
    full_attention=(5,),
)
SMALL = ModelShape(  # 11 million
    vocab=8192,
    hidden=256,
    intermediate=1024,
    layers=6,
    heads=4,
    kv_heads=2,
    mrope=(8, 12, 12),
    vision_hidden=80,
    vision_intermediate=216,
    vision_layers=6,
    vision_heads=1,
    full_attention=(5,),
)
TINY = ModelShape(  # a million, as `geo_r1.models.tiny`
    vocab=512,
    hidden=128,
    intermediate=384,
    layers=4,
    heads=4,
    kv_heads=2,
    mrope=(4, 4, 8),
    vision_hidden=64,
    vision_intermediate=128,
    vision_layers=2,
    vision_heads=4,
    full_attention=(1,),
    tied=True,
)
