"""Count a Qwen-VL's parameters, and the operations of a packed step, from its config alone.

    forward = 2 x rows x entries of every weight matrix + 4 H D x visible (query, key) pairs of every layer

Rows are tokens in the text layers, completion tokens in the language head, patches in the vision tower and
merged patches in the projector. `PackedLayout` defines the pairs of the text; a patch sees its window or its
whole image, a frame at a time. A multiplication and an addition are two operations. Norms, activations,
softmax, rotary positions and look-ups are not counted, nor is recomputation.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from geo_r1.errors import UserError
from geo_r1.models.qwen_vl import PARTS, part_of
from geo_r1.models.skeleton import empty_model

Grid = tuple[int, int, int]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class ModelCost:
    """Parameters and operations of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

    Attributes:
        parameters: their number in each part: `vision` (patch embedding, positions and blocks), `projector`
            (the mergers), `embeddings`, `text_layers` (without norms), `norms` (all of the text model) and
            `head` (0 if it is the embedding table itself).
    """

    parameters: Mapping[str, int]
    _matrices: Mapping[str, int]  # entries of all weight matrices, by part, and of the "head"
    _text_width: int  # heads times head size, over all layers
    _whole_width: int  # the same for the vision blocks that see a whole image
    _windowed_width: int  # and for those that see windows
    _merge: int
    _window: int  # patches along a side

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelCost:
        """Count the model that transformers would build from `config`.

        Raises:
            UserError: the config belongs to another family.
        """
        if config.model_type not in FAMILIES:
            raise UserError(f"cannot count a {config.model_type}; supported: {', '.join(FAMILIES)}")
        return _cost_of(json.dumps(config.to_dict(), default=str))

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(self.parameters.values())

    def flops(
        self,
        prompt_len: int,
        completion_lens: Sequence[int] = (),
        image_grids: Sequence[Grid] = (),
        *,
        head: bool = True,
        backward: bool = False,
        frozen: Collection[str] = (),
    ) -> float:
        """Operations on one packed group: its prompt and images once, and all of its completions.

        A backward pass costs a forward pass for the gradients of activations, and another for those of
        weights; attention costs both, whether its layer's weights are trained or not.

        Args:
            prompt_len: tokens of the prompt, including those of its images.
            completion_lens: tokens of each completion.
            image_grids: (frames, rows, columns) in patches, one per image.
            head: send completion tokens through the language head.
            backward: count the backward pass as well.
            frozen: parts whose weights get no gradients, from "vision", "projector" and "text"; a frozen part
                has no backward pass at all if nothing before it is trained.

        Raises:
            UserError: `frozen` names an unknown part.
        """
        if unknown := sorted(set(frozen) - set(PARTS)):
            raise UserError(f"frozen: there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
        total, passes = 0.0, False
        for part, products, attention in self._forward(prompt_len, completion_lens, image_grids, head):
            trained = part not in frozen
            passes = passes or trained
            total += products * (1 + backward * (passes + trained)) + attention * (1 + 2 * backward * passes)
        return total

    def _forward(
        self, prompt_len: int, completion_lens: Sequence[int], grids: Sequence[Grid], head: bool
    ) -> Iterator[tuple[str, float, float]]:
        """(part, operations of its matrices, operations of its attention), in the order of PARTS."""
        patches = sum(frames * rows * columns for frames, rows, columns in grids)
        whole = sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)
        windows = sum(self._window_pairs(*grid) for grid in grids) if self._windowed_width else 0
        # The patch embedding and the blocks see every patch; position tables are looked up.
        seeing = 4.0 * self._whole_width * whole + 4.0 * self._windowed_width * windows
        yield "vision", 2.0 * self._matrices["vision"] * patches, seeing
        yield "projector", 2.0 * self._matrices["projector"] * (patches // self._merge**2), 0.0

        own = sum(completion_lens)
        pairs = _causal(prompt_len) + sum(prompt_len * n + _causal(n) for n in completion_lens)
        products = self._matrices["text"] * (prompt_len + own) + head * self._matrices["head"] * own
        yield "text", 2.0 * products, 4.0 * self._text_width * pairs

    def _window_pairs(self, frames: int, rows: int, columns: int) -> int:
        """Visible pairs of an image in windows, which are smaller at its right and bottom edges.

        A window of h x w patches has (h w)^2 pairs, so their sum is a product over the two sides.
        """
        return frames * self._squares(rows) * self._squares(columns)

    def _squares(self, patches: int) -> int:
        full, rest = divmod(patches, self._window)
        return full * self._window**2 + rest**2


def _causal(length: int) -> int:
    return length * (length + 1) // 2


@lru_cache
def _cost_of(config_json: str) -> ModelCost:
    """Count a model without weights; cached, since building one takes a third of a second."""
    values = json.loads(config_json)
    model: Any = empty_model(CONFIG_MAPPING[values["model_type"]].from_dict(values), torch.float32)
    parameters = dict.fromkeys(("vision", "projector", "embeddings", "text_layers", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part == "text":
            kinds = {"embed_tokens": "embeddings", "lm_head": "head", "norm": "norms"}
            part = next((kind for word, kind in kinds.items() if word in name), "text_layers")
        parameters[part] += parameter.numel()
    matrices = dict.fromkeys(PARTS, 0)
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear | nn.Conv3d):
            matrices[part_of(name)] += module.weight.numel()
    text, vision, blocks = (
        model.model.language_model.layers,
        model.config.vision_config,
        model.model.visual.blocks,
    )
    whole = len(set(getattr(vision, "fullatt_block_indexes", range(len(blocks)))))
    patch_width = blocks[0].attn.proj.in_features
    side = getattr(vision, "window_size", 0) // vision.spatial_merge_size // vision.patch_size
    return ModelCost(
        parameters,
        matrices | {"head": model.lm_head.weight.numel()},
        _text_width=len(text) * text[0].self_attn.o_proj.in_features,
        _whole_width=whole * patch_width,
        _windowed_width=(len(blocks) - whole) * patch_width,
        _merge=vision.spatial_merge_size,
        _window=side * vision.spatial_merge_size,
    )


def cached_bytes(config, itemsize: int) -> int:
    """Bytes of a token's keys and values in all text layers, at `itemsize` bytes per entry."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * itemsize
