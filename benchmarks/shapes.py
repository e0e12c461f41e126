"""Shapes of the models whose training step is measured: Qwen2.5-VL with random weights, at several sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TextShape:
    """Text layers; `mrope`: a head's frequencies on the time, height and width axes, half its size in all."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    mrope: tuple[int, int, int]


@dataclass(frozen=True)
class VisionShape:
    """Vision layers; those of `full_attention` see whole images."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    full_attention: tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2.5-VL with patches of 14 and vision windows of 112 pixels; `tied`: the head is the embedding."""

    text: TextShape
    vision: VisionShape
    tied: bool = False

    @property
    def num_text_ids(self) -> int:
        """Ids below this are drawn as text; the last four are special."""
        return min(1000, self.text.vocab - 4)

    def config(self) -> dict[str, Any]:
        """Arguments of a Qwen2_5_VLConfig."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(self.text.mrope)}
        return {
            "text_config": {
                "vocab_size": self.text.vocab,
                "hidden_size": self.text.hidden,
                "intermediate_size": self.text.mlp,
                "num_hidden_layers": self.text.layers,
                "num_attention_heads": self.text.heads,
                "num_key_value_heads": self.text.kv_heads,
                "rms_norm_eps": 1e-6,
                "rope_parameters": rope,
                "bos_token_id": None,
                "eos_token_id": None,
            },
            "vision_config": {
                "depth": self.vision.layers,
                "hidden_size": self.vision.hidden,
                "intermediate_size": self.vision.mlp,
                "num_heads": self.vision.heads,
                "out_hidden_size": self.text.hidden,
                "fullatt_block_indexes": list(self.vision.full_attention),
            },
            **{name: self.text.vocab - 4 + index for index, name in enumerate(names)},
            "tie_word_embeddings": self.tied,
        }

    def cut(self, layers: int, vision_layers: int | None = None) -> ModelShape:
        """Only the first layers; all vision layers if their number is not given."""
        text = replace(self.text, layers=layers)
        if vision_layers is None:
            return replace(self, text=text)
        full = tuple(i for i in self.vision.full_attention if i < vision_layers)
        return replace(
            self, text=text, vision=replace(self.vision, layers=vision_layers, full_attention=full)
        )


QWEN_7B = ModelShape(
    TextShape(vocab=152064, hidden=3584, mlp=18944, layers=28, heads=28, kv_heads=4, mrope=(16, 24, 24)),
    VisionShape(hidden=1280, mlp=3420, layers=32, heads=16, full_attention=(7, 15, 23, 31)),
)
# As in 7B, the vision tower costs two fifths of the text layers for a prompt of images, heads have the sizes
# 80 and 64 or more, and one vision layer in six or eight sees whole images.
MID = ModelShape(  # 100 million parameters
    TextShape(vocab=32768, hidden=640, mlp=2176, layers=10, heads=10, kv_heads=2, mrope=(8, 12, 12)),
    VisionShape(hidden=240, mlp=648, layers=6, heads=3, full_attention=(5,)),
)
SMALL = ModelShape(  # 11 million
    TextShape(vocab=8192, hidden=256, mlp=1024, layers=6, heads=4, kv_heads=2, mrope=(8, 12, 12)),
    VisionShape(hidden=80, mlp=216, layers=6, heads=1, full_attention=(5,)),
)
TINY = ModelShape(  # a million, as `geo_r1.models.tiny`
    TextShape(vocab=512, hidden=128, mlp=384, layers=4, heads=4, kv_heads=2, mrope=(4, 4, 8)),
    VisionShape(hidden=64, mlp=128, layers=2, heads=4, full_attention=(1,)),
    tied=True,
)
