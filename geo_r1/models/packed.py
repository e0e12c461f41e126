"""Pack encoded prompts and their completions into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geo_r1.errors import UserError
from geo_r1.kernels import PackedLayout


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it; it holds its images, so they cannot reach another prompt.

    Attributes:
        sample_id: names the sample in errors.
        token_ids: P token ids; each image is a run of image tokens.
        position_ids: [3, P] int64, rotary positions on the time, height and width axes.
        image_rows: indices of the image tokens among the P.
        pixel_values: [patches, patch size] float32, all images in order; None without images.
        image_grids: (frames, rows, columns) in patches, one per image.
        images: [height, width, 3] uint8 each, at the size that was encoded, for a sampler that encodes them
            itself; empty unless asked for.
        opening: what the chat template has written of the answer, such as `<think>`; mostly empty.
    """

    sample_id: str
    token_ids: list[int]
    position_ids: Tensor
    image_rows: list[int]
    pixel_values: Tensor | None
    image_grids: tuple[tuple[int, int, int], ...]
    images: tuple[np.ndarray, ...] = ()
    opening: str = ""

    @property
    def short_token_ids(self) -> list[int]:
        """The tokens with one image token per image, as the chat template writes them."""
        num_patches = sum(frames * rows * columns for frames, rows, columns in self.image_grids)
        left_out: set[int] = set()
        start = 0
        for frames, rows, columns in self.image_grids:  # every image has as many tokens per patch
            end = start + frames * rows * columns * len(self.image_rows) // num_patches
            left_out.update(self.image_rows[start + 1 : end])
            start = end
        return [token for row, token in enumerate(self.token_ids) if row not in left_out]

    @property
    def next_position(self) -> int:
        """Where every completion's positions start: the prompt's largest, plus one."""
        return int(self.position_ids.max()) + 1 if self.token_ids else 0

    def check_budget(self, completion_len: int, max_tokens: int, option: str) -> None:
        """Raise UserError, naming sample and option, if this and one completion exceed `max_tokens`."""
        if len(self.token_ids) + completion_len > max_tokens:
            raise UserError(
                f"sample {self.sample_id}: a prompt of {len(self.token_ids)} tokens and {completion_len} "
                f"more are over {option} = {max_tokens}"
            )


@dataclass
class PackedBatch:
    """Groups in one row of T tokens, each prompt once before its completions, and the R rows of the loss.

    A loss row belongs to one completion token. See `PackedLayout` for the order.

    Attributes:
        layout: boundaries of prompts and completions.
        token_ids: [T] int64.
        position_ids: [3, T] int64.
        image_rows: [I] int64, rows of the image tokens, in the order of the encoded images.
        pixel_values: [patches, patch size] of all prompts' images; None if there are none.
        image_grids: (frames, rows, columns) in patches, one per image.
        completion_len: length of each of the N completions.
        target_R: [R] int64, the completion tokens, in order.
        token_weight_R: [R] weight of each token in the loss; 0 for a placeholder.
        advantage_R: [R] float32, no unit.
        sequence_R: [R] int64, index of the row's completion in this batch.
        sampled_logp_R: [R] nats, of the distribution that each token was drawn from.
        ref_logp_R, old_logp_R: [R] nats, of the reference and of the policy before the step's updates.
        importance_weight_R: [R] policy over sampler.
    """

    layout: PackedLayout
    token_ids: Tensor
    position_ids: Tensor
    image_rows: Tensor
    pixel_values: Tensor | None
    image_grids: tuple[tuple[int, int, int], ...]
    completion_len: list[int]
    target_R: Tensor
    token_weight_R: Tensor | None = None
    advantage_R: Tensor | None = None
    sequence_R: Tensor | None = None
    sampled_logp_R: Tensor | None = None
    ref_logp_R: Tensor | None = None
    old_logp_R: Tensor | None = None
    importance_weight_R: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All fields that are not None, by name, as tensors on the host."""
        lengths = {"prompt_len": self.layout.prompt_len, "completion_len": self.completion_len}
        values = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        found = {
            name: torch.tensor(value) for name, value in (lengths | {"image_grids": self.image_grids}).items()
        }
        return found | {name: value.detach().cpu() for name, value in values.items()}


def pack(
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Sequence[Sequence[int]]],
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack groups into one batch.

    Args:
        prompts: B prompts.
        completions: for each prompt, the token ids of each of its completions.

    Raises:
        ValueError: the counts differ, or there is nothing to pack.
    """
    if not prompts:
        raise ValueError("nothing to pack: no prompts")
    layout = PackedLayout.from_lengths(
        [len(p.token_ids) for p in prompts], [[len(c) for c in group] for group in completions], device
    )
    token_ids: list[int] = []
    image_rows: list[int] = []
    target: list[int] = []
    positions: list[Tensor] = []
    for prompt, group in zip(prompts, completions, strict=True):
        image_rows += [len(token_ids) + row for row in prompt.image_rows]
        token_ids += prompt.token_ids
        positions.append(prompt.position_ids)
        for completion in group:
            token_ids += completion
            target += completion
            start = prompt.next_position
            positions.append(torch.arange(start, start + len(completion)).expand(3, -1))
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]

    return PackedBatch(
        layout=layout,
        token_ids=to_device(torch.tensor(token_ids, dtype=torch.int64), device),
        position_ids=to_device(torch.cat(positions, 1), device),
        image_rows=to_device(torch.tensor(image_rows, dtype=torch.int64), device),
        pixel_values=to_device(torch.cat(pixels), device) if pixels else None,
        image_grids=tuple(grid for p in prompts for grid in p.image_grids),
        completion_len=[len(completion) for group in completions for completion in group],
        target_R=to_device(torch.tensor(target, dtype=torch.int64), device),
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to a device, from host to GPU through pinned memory, so that nothing waits for it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
