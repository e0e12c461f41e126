"""Encode a sample as token ids, pixels and rotary positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from geo_r1.data.images import ImageCache, LazyImage, Size, fitted, num_tokens, shrunk
from geo_r1.data.sample import Sample
from geo_r1.data.turn import encode_response, opening_of
from geo_r1.errors import UserError
from geo_r1.models.chat import TemplateFault, render_chat
from geo_r1.models.packed import EncodedPrompt

OnOverlong = Literal["error", "skip", "resize"]
OnBadSample = Literal["error", "skip"]


class OverlongPromptError(UserError):
    """A prompt has too many tokens; `on_overlong` decides whether that ends the run."""


class PromptEncoder:
    """Encodes prompts for Qwen2-VL, Qwen2.5-VL or Qwen3-VL. It pickles, so workers can use it.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        image_processor: a transformers `Qwen2VLImageProcessorPil`.
        image_token_id: the token that stands for one merged patch of an image.
        max_pixels: larger images are shrunk to this many pixels; None keeps the processor's own limit.
        max_prompt_tokens: limit per prompt; prompts are never cut, since that could cut an image.
        on_overlong: the rule for longer prompts. "error" and "skip" both raise `OverlongPromptError`, which
            `PromptLoader` raises again or turns into None; "resize" shrinks its images until they fit.
        keep_images: prompts also carry their resized images, for a rollout engine that encodes them.
        on_bad_sample: the rule for samples that cannot be encoded, such as those with a truncated image;
            "skip" lets `encode_or_skip` return the reason.

    Attributes:
        cache: decoded images; see `with_cache`.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        image_token_id: int,
        max_pixels: int | None = None,
        max_prompt_tokens: int | None = None,
        on_overlong: OnOverlong = "error",
        keep_images: bool = False,
        on_bad_sample: OnBadSample = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.max_prompt_tokens = max_prompt_tokens
        self.on_overlong = on_overlong
        self.keep_images = keep_images
        self.on_bad_sample = on_bad_sample
        self.cache = ImageCache(0)
        if max_pixels is not None:
            shortest = min(image_processor.size["shortest_edge"], max_pixels)
            self.image_processor = copy.copy(image_processor)  # an export keeps the model's own limits
            self.image_processor.size = {"shortest_edge": shortest, "longest_edge": max_pixels}

    def with_cache(self, max_bytes: int) -> PromptEncoder:
        """A copy of this encoder with its own cache of decoded images."""
        encoder = copy.copy(self)
        encoder.cache = ImageCache(max_bytes)
        return encoder

    def encode(self, sample: Sample) -> EncodedPrompt:
        """Encode a sample's prompt, up to the start of the assistant's answer.

        Raises:
            OverlongPromptError: the prompt is longer than `max_prompt_tokens`, and its images must not be
                shrunk or cannot be shrunk enough.
            UserError: an image is missing or broken, or the text itself contains image tokens. All errors
                name the sample.
        """
        images = [LazyImage(image, sample.id, self.cache, sample.image_root) for image in sample.images]
        targets = self._targets(sample, [image.size for image in images])
        text, opening = self.chat(sample)
        token_ids = self._tokens(sample, text, len(images))
        targets = self._within_budget(sample, token_ids, [image.size for image in images], targets)
        pixel_values = None
        resized: list[np.ndarray] = []
        if images:
            resized = [
                image.resized(target, self.image_processor.resample)
                for image, target in zip(images, targets, strict=True)
            ]
            features = self.image_processor(  # a second resize could round the sizes again
                resized, do_resize=False, input_data_format="channels_last", return_tensors="pt"
            )
            pixel_values = features["pixel_values"]
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        grids = tuple((1, height // patch, width // patch) for height, width in targets)
        token_ids, image_rows = expand_images(token_ids, self.image_token_id, grids, merge)
        positions = mrope_positions(token_ids, self.image_token_id, grids, merge)
        kept = tuple(resized) if self.keep_images else ()
        return EncodedPrompt(sample.id, token_ids, positions, image_rows, pixel_values, grids, kept, opening)

    def encode_or_skip(self, sample: Sample) -> EncodedPrompt | str | None:
        """Encode a sample's prompt as the rules for long prompts and bad samples ask.

        Returns:
            The prompt; None if it is too long, or why the sample is bad, if the rule is "skip".

        Raises:
            UserError: as `encode` does, if the rule is another.
        """
        try:
            return self.encode(sample)
        except OverlongPromptError:
            if self.on_overlong != "skip":
                raise
            return None
        except UserError as error:
            if self.on_bad_sample != "skip":
                raise
            return str(error)

    @property
    def _factor(self) -> int:
        """Side of one token's square in pixels."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    def _targets(self, sample: Sample, sizes: Sequence[Size]) -> list[Size]:
        limits = self.image_processor.size
        try:
            return [
                fitted(size, self._factor, limits["shortest_edge"], limits["longest_edge"]) for size in sizes
            ]
        except ValueError as error:  # for example, an image more than 200 times as wide as high
            raise UserError(f"sample {sample.id}: its images cannot be encoded: {error}") from error

    def chat(self, sample: Sample) -> tuple[str, str]:
        """The prompt as text, up to the start of the answer, and what the template has written of the answer.

        Raises:
            UserError: the chat template refuses the messages, or does not end; names the sample.
        """
        messages = [dict(message) for message in sample.messages]
        try:
            text, bare = (render_chat(self.tokenizer, messages, ask=ask) for ask in (True, False))
        except TemplateFault as fault:
            raise UserError(f"sample {sample.id}: the chat template {fault}") from fault
        return text, opening_of(text, bare)

    def _tokens(self, sample: Sample, text: str, num_images: int) -> list[int]:
        """Token ids of the rendered chat, with one image token per image."""
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        if token_ids.count(self.image_token_id) != num_images:
            raise UserError(
                f"sample {sample.id}: {num_images} images but {token_ids.count(self.image_token_id)} image "
                "tokens in the rendered prompt; the text must not contain image tokens itself"
            )
        return token_ids

    def _within_budget(
        self, sample: Sample, token_ids: list[int], sizes: Sequence[Size], targets: list[Size]
    ) -> list[Size]:
        """Sizes of the images at which the prompt fits its budget."""
        num_text = len(token_ids) - len(sizes)
        num_image = sum(num_tokens(target, self._factor) for target in targets)
        budget = self.max_prompt_tokens
        if budget is None or num_text + num_image <= budget:
            return targets
        found = (
            f"sample {sample.id}: the prompt has {num_text + num_image} tokens, {num_image} of them images; "
            f"the budget is {budget}."
        )
        if self.on_overlong != "resize":
            raise OverlongPromptError(
                f"{found} Raise data.max_prompt_tokens, lower data.max_pixels, "
                "or set data.on_overlong to skip or resize"
            )
        smaller = shrunk(sizes, targets, self._factor, budget - num_text)
        if smaller is None:
            raise OverlongPromptError(
                f"{found} With its {len(sizes)} images at their smallest, a token each, it has "
                f"{num_text + len(sizes)}; raise data.max_prompt_tokens"
            )
        return smaller

    def encode_response(self, text: str, opening: str = "") -> list[int]:
        """Token ids of an assistant's answer, including the end token.

        Args:
            opening: what the prompt has already written of it, `EncodedPrompt.opening`.
        """
        return encode_response(self.tokenizer, text, opening)


def expand_images(
    token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int, int]], merge: int
) -> tuple[list[int], list[int]]:
    """Repeat each image token once per merged patch; returns the tokens and the image tokens' positions."""
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
    """[3, P] int64 positions (time, height, width) of an expanded prompt with still images.

    Text counts up on all three axes. An image that starts at position s puts its merged patch (t, y, x) at
    (s + t, s + y, s + x), and the text after it continues at s + max(rows, columns).

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
