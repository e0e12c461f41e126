"""From a sample to token ids, pixels and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from geo_r1.data.sample import Sample, load_image
from geo_r1.models.packed import EncodedPrompt


class PromptEncoder:
    """Encodes prompts for a Qwen2-VL or Qwen2.5-VL model.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        image_processor: a transformers `Qwen2VLImageProcessorPil`.
        image_token_id: the token that stands for one merged patch of a picture.
        max_pixels: pictures with more pixels are shrunk to it; None keeps the processor's own limit.
        max_prompt_tokens: longer prompts are an error, since cutting one could cut a picture in two.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        image_token_id: int,
        max_pixels: int | None = None,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.max_prompt_tokens = max_prompt_tokens
        if max_pixels is not None:
            shortest = min(image_processor.size["shortest_edge"], max_pixels)
            image_processor.size = {"shortest_edge": shortest, "longest_edge": max_pixels}

    def encode(self, sample: Sample) -> EncodedPrompt:
        """Encode a sample's prompt up to where the assistant's answer begins.

        Raises:
            ValueError: a picture is missing or broken, the text contains image tokens of its own, or the
                prompt is over `max_prompt_tokens`; names the sample.
        """
        pictures = [load_image(image, sample.id) for image in sample.images]
        pixel_values = None
        grids: tuple[tuple[int, int, int], ...] = ()
        if pictures:
            try:
                features = self.image_processor(pictures, return_tensors="pt")
            except ValueError as error:  # such as a picture more than 200 times as wide as high
                raise ValueError(f"sample {sample.id}: its images cannot be encoded: {error}") from error
            pixel_values = features["pixel_values"]
            grids = tuple((t, h, w) for t, h, w in features["image_grid_thw"].tolist())
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in sample.messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:  # such as a role that the template does not know
            raise ValueError(
                f"sample {sample.id}: the chat template refuses its messages: {error}"
            ) from error
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        merge = self.image_processor.merge_size
        if token_ids.count(self.image_token_id) != len(grids):
            raise ValueError(
                f"sample {sample.id}: {len(grids)} images but {token_ids.count(self.image_token_id)} image "
                "tokens in the rendered prompt; the text must not contain image tokens itself"
            )
        token_ids, image_rows = expand_images(token_ids, self.image_token_id, grids, merge)
        if self.max_prompt_tokens is not None and len(token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"sample {sample.id}: the prompt has {len(token_ids)} tokens, {len(image_rows)} of them "
                f"images; the budget is {self.max_prompt_tokens}. Raise data.max_prompt_tokens or lower "
                "data.max_pixels"
            )
        positions = mrope_positions(token_ids, self.image_token_id, grids, merge)
        return EncodedPrompt(sample.id, token_ids, positions, image_rows, pixel_values, grids)

    def encode_response(self, text: str) -> list[int]:
        """Token ids of an assistant's answer, the end token included."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def expand_images(
    token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int, int]], merge: int
) -> tuple[list[int], list[int]]:
    """Repeat each image token once a merged patch; returns the tokens and the rows of the image tokens."""
    remaining = iter(grids)
    tokens: list[int] = []
    rows: list[int] = []
    for token in token_ids:
        if token == image_token_id:
            frames, height, width = next(remaining)
            count = frames * height * width // merge**2
            rows += range(len(tokens), len(tokens) + count)
            tokens += [token] * count
        else:
            tokens.append(token)
    return tokens, rows


def mrope_positions(
    token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int, int]], merge: int
) -> Tensor:
    """[3, P] int64 positions (time, height, width) of an expanded prompt with still pictures.

    Text counts up on all three axes. A picture that starts at position s puts its merged patch (t, y, x) at
    (s + t, s + y, s + x), and the text after it goes on at s + max(rows, columns).

    Source: multimodal rotary embedding of Qwen2-VL, arXiv:2409.12191.
    """
    pieces: list[np.ndarray] = []
    remaining = iter(grids)
    index, position = 0, 0
    while index < len(token_ids):
        if token_ids[index] == image_token_id:
            frames, height, width = next(remaining)
            rows, columns = height // merge, width // merge
            pieces.append(np.indices((frames, rows, columns)).reshape(3, -1) + position)
            index += frames * rows * columns
            position += max(rows, columns)
        else:
            end = index
            while end < len(token_ids) and token_ids[end] != image_token_id:
                end += 1
            pieces.append(np.broadcast_to(np.arange(position, position + end - index), (3, end - index)))
            position += end - index
            index = end
    return torch.from_numpy(np.concatenate(pieces, 1)) if pieces else torch.zeros(3, 0, dtype=torch.int64)
