"""What a Qwen-VL weighs and what a packed step of it costs, from its config alone.

    forward = 2 x rows x entries of every weight matrix + 4 H D x visible (query, key) pairs of every layer

Rows are tokens in the text layers, completion tokens in the language head, patches in the vision tower and
merged patches in the projector. A text token sees what `PackedLayout` says; a patch sees its window or its
whole picture, a frame at a time. A multiplication and an addition are two operations. Norms, activations,
softmax, rotary positions and look-ups are not counted, and nothing is that is computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from geo_r1.models.qwen_vl import PARTS

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Weights:
    """Parameters by what they do.

    Attributes:
        matrix: entries of matrices; each costs two operations a row.
        other: biases, norms and look-up tables, whose operations are not counted.
    """

    matrix: int = 0
    other: int = 0

    def __add__(self, more: Weights) -> Weights:
        return Weights(self.matrix + more.matrix, self.other + more.other)

    def __mul__(self, times: int) -> Weights:
        return Weights(self.matrix * times, self.other * times)

    @property
    def total(self) -> int:
        return self.matrix + self.other


@dataclass(frozen=True)
class Attention:
    """Layers whose attention is alike. `width` is heads times head size."""

    layers: int
    width: int

    def flops(self, pairs: float) -> float:
        """Forward operations; `pairs` are visible (query, key) pairs of one layer."""
        return 4.0 * self.layers * self.width * pairs


@dataclass(frozen=True)
class ModelCost:
    """Parameters and operations of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

    Attributes:
        parameters: their number by part: `vision` (patch embedding, positions and blocks), `projector` (the
            mergers), `embeddings`, `text_layers` (without norms), `norms` (all of the text model) and `head`
            (0 where it is the embedding table itself).
    """

    parameters: Mapping[str, int]
    _vision: Weights
    _projector: Weights
    _layers: Weights
    _head: Weights
    _text_attention: Attention
    _whole: Attention
    _windowed: Attention
    _merge: int
    _window: int  # merged patches along a side

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelCost:
        """Count the model that transformers would build from `config`.

        Raises:
            ValueError: the config is of another family.
        """
        if config.model_type not in _TOWERS:
            raise ValueError(f"cannot count a {config.model_type}; supported: {', '.join(_TOWERS)}")
        text: Any = config.get_text_config()
        vision: Any = getattr(config, "vision_config")  # noqa: B009  # a field of these families alone
        qwen3 = config.model_type == "qwen3_vl"
        tower, projector = _TOWERS[config.model_type](vision)

        wide, heads, kv_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
        head_size = text.head_dim if qwen3 else wide // heads
        biased = text.attention_bias if qwen3 else True
        layers = (
            _linear(wide, heads * head_size, biased)
            + _linear(wide, kv_heads * head_size, biased) * 2
            + _linear(heads * head_size, wide, qwen3 and biased)
            + _linear(wide, text.intermediate_size, False) * 2
            + _linear(text.intermediate_size, wide, False)
        ) * text.num_hidden_layers
        head = _linear(wide, text.vocab_size, False)
        layer_norms = 2 * wide + (2 * head_size if qwen3 else 0)

        blocks = vision.depth
        patch_width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
        whole = len(set(vision.fullatt_block_indexes)) if config.model_type == "qwen2_5_vl" else blocks
        window = getattr(vision, "window_size", 0) // vision.spatial_merge_size // vision.patch_size
        return cls(
            parameters={
                "vision": tower.total,
                "projector": projector.total,
                "embeddings": head.total,
                "text_layers": layers.total,
                "norms": text.num_hidden_layers * layer_norms + wide,
                "head": 0 if config.tie_word_embeddings else head.total,
            },
            _vision=tower,
            _projector=projector,
            _layers=layers,
            _head=head,
            _text_attention=Attention(text.num_hidden_layers, heads * head_size),
            _whole=Attention(whole, patch_width),
            _windowed=Attention(blocks - whole, patch_width),
            _merge=vision.spatial_merge_size,
            _window=window,
        )

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
        """Operations on one packed group: its prompt and pictures once, and all of its completions.

        A backward pass costs a forward one for the gradients of activations, and one more for those of
        weights; attention costs both whether or not its layer's weights are trained.

        Args:
            prompt_len: tokens of the prompt, those of its pictures included.
            completion_lens: tokens of each completion.
            image_grids: (frames, rows, columns) in patches, one a picture.
            head: whether completion tokens go through the language head.
            backward: count the backward pass as well.
            frozen: parts without gradients of weights, of "vision", "projector" and "text"; a frozen part in
                front of which nothing is trained has no backward pass at all.

        Raises:
            ValueError: `frozen` names no part.
        """
        if unknown := sorted(set(frozen) - set(PARTS)):
            raise ValueError(f"frozen: there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
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
        windows = sum(self._window_pairs(*grid) for grid in grids) if self._windowed.layers else 0
        # The patch embedding and the blocks see every patch; position tables are looked up.
        seeing = self._whole.flops(whole) + self._windowed.flops(windows)
        yield "vision", 2.0 * self._vision.matrix * patches, seeing
        yield "projector", 2.0 * self._projector.matrix * (patches // self._merge**2), 0.0

        own = sum(completion_lens)
        pairs = _causal(prompt_len) + sum(prompt_len * n + _causal(n) for n in completion_lens)
        products = self._layers.matrix * (prompt_len + own) + head * self._head.matrix * own
        yield "text", 2.0 * products, self._text_attention.flops(pairs)

    def _window_pairs(self, frames: int, rows: int, columns: int) -> int:
        """Visible pairs of a picture in windows: squares of their patches, fewer at its right and bottom.

        A window of h x w patches has (h w)^2 pairs, so their sum is a product over the two sides.
        """
        return frames * self._squares(rows) * self._squares(columns)

    def _squares(self, patches: int) -> int:
        full, rest = divmod(patches, self._window * self._merge)
        return full * (self._window * self._merge) ** 2 + rest**2


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _linear(inputs: int, outputs: int, bias: bool = True) -> Weights:
    return Weights(inputs * outputs, outputs * bias)


def _patch_embedding(vision: Any, width: int, bias: bool) -> Weights:
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return _linear(patch, width, bias)


def _merger(vision: Any, width: int, out: int, norm: int) -> Weights:
    merged = width * vision.spatial_merge_size**2
    return Weights(0, norm) + _linear(merged, merged) + _linear(merged, out)


def _qwen2_vl(vision: Any) -> tuple[Weights, Weights]:
    """The vision tower without its merger, and the merger. LayerNorms have biases."""
    width = vision.embed_dim
    hidden = int(width * vision.mlp_ratio)
    attention = _linear(width, 3 * width) + _linear(width, width)
    block = attention + _linear(width, hidden) + _linear(hidden, width) + Weights(0, 4 * width)
    tower = _patch_embedding(vision, width, False) + block * vision.depth
    return tower, _merger(vision, width, vision.hidden_size, 2 * width)


def _qwen2_5_vl(vision: Any) -> tuple[Weights, Weights]:
    """As Qwen2-VL's, with a gated MLP, and RMSNorms, which have no biases."""
    width, hidden = vision.hidden_size, vision.intermediate_size
    attention = _linear(width, 3 * width) + _linear(width, width)
    block = attention + _linear(width, hidden) * 2 + _linear(hidden, width) + Weights(0, 2 * width)
    tower = _patch_embedding(vision, width, False) + block * vision.depth
    return tower, _merger(vision, width, vision.out_hidden_size, width)


def _qwen3_vl(vision: Any) -> tuple[Weights, Weights]:
    """As Qwen2-VL's, with a table of positions, and a merger more for each deepstack layer.

    The first merger's norm is over patches, the others' over merged patches.
    """
    width, hidden, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    attention = _linear(width, 3 * width) + _linear(width, width)
    block = attention + _linear(width, hidden) + _linear(hidden, width) + Weights(0, 4 * width)
    positions = Weights(0, vision.num_position_embeddings * width)
    tower = _patch_embedding(vision, width, True) + positions + block * vision.depth
    deep = _merger(vision, width, out, 2 * width * vision.spatial_merge_size**2)
    return tower, _merger(vision, width, out, 2 * width) + deep * len(vision.deepstack_visual_indexes)


_TOWERS: dict[str, Callable[[Any], tuple[Weights, Weights]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}


def cached_bytes(config, itemsize: int) -> int:
    """Bytes of a token's keys and values in all text layers, `itemsize` bytes an entry."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * itemsize
