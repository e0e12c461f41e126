"""A model and one group of work for it, trained packed with a shared prompt, or padded with repeated ones.

The padded step is that of trainers on transformers today: one row per completion, padded to the longest, each
with its own copy of the prompt and its images; transformers' own attention; full logits of the completion
rows. Both have the same weights and train the vision tower.

The phases of a step follow one another and leave nothing out:

    vision     packing, token embeddings and the vision tower, forward
    text       the text layers, forward
    loss       language head and loss, forward; our fused loss computes their gradients here, too
    backward   all other gradients
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.losses import logp_of
from benchmarks.measure import PHASES, Moment, Tensors
from benchmarks.shapes import ModelShape
from geo_r1.kernels import GRPOLossConfig, linear_grpo_loss, token_weights

if TYPE_CHECKING:  # they need transformers, which may be missing
    from geo_r1.models import PackedVLM
    from geo_r1.models.cost import ModelCost

CONFIG = GRPOLossConfig()
PATCH_SIZE = 3 * 2 * 14 * 14  # values of a patch: colours, two frames, 14 x 14 pixels


class PhaseClock:
    """Records when each phase of each step ends; on a GPU with events in its stream, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.now: type[Moment] | Callable[[], float] = Moment if device.type == "cuda" else time.perf_counter
        self.steps: list[dict[str, Any]] = []

    def start(self) -> None:
        self.steps.append({"start": self.now()})

    def end(self, phase: str) -> None:
        self.steps[-1][phase] = self.now()

    def shares(self, num_steps: int) -> dict[str, float]:
        """Each phase's share of the last steps' time; 0 for a phase that they lack."""
        spent = dict.fromkeys(PHASES, 0.0)
        for step in self.steps[-num_steps:]:
            begin = step["start"]
            for phase in PHASES:
                if phase in step:
                    spent[phase] += step[phase] - begin
                    begin = step[phase]
        total = sum(spent.values())
        return {phase: seconds / total for phase, seconds in spent.items()}


@dataclass(frozen=True)
class StepSize:
    """One group.

    Attributes:
        name: shown in tables.
        model: shape of the model.
        images: height and width of each, in merged patches, which are the image tokens.
        text: tokens of the prompt's text.
        completions: tokens of each.
    """

    name: str
    model: ModelShape
    images: tuple[tuple[int, int], ...]
    text: int
    completions: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def prompt_len(self) -> int:
        """Image tokens, the two tokens around each image, and text."""
        return sum(height * width + 2 for height, width in self.images) + self.text

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and completions: the prompt once per completion, and no padding."""
        return len(self.completions) * self.prompt_len + sum(self.completions)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, rows and columns of each image, in patches."""
        return tuple((1, 2 * height, 2 * width) for height, width in self.images)


@lru_cache(maxsize=1)  # successive cases mostly share it
def build_vlm(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> PackedVLM:
    """Random weights, the same for the same arguments."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from geo_r1.models import PackedVLM

    config = Qwen2_5_VLConfig(**shape.config())
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return PackedVLM(Qwen2_5_VLForConditionalGeneration(config).train())
    finally:
        torch.set_default_dtype(torch.float32)


def attend_by(model: Any, text: str, vision: str) -> None:
    """Choose the attention of a Qwen-VL's two parts, by transformers' names."""
    model.model.language_model.config._attn_implementation = text
    model.model.visual.config._attn_implementation = vision


class Step:
    """A training step's inputs, and the two ways to do it. Both return the loss and some gradients."""

    def __init__(self, size: StepSize, device: torch.device, dtype: torch.dtype) -> None:
        from geo_r1.models import EncodedPrompt

        self.size, self.device = size, device
        self.vlm = build_vlm(size.model, device, dtype)
        self.model = self.vlm.model
        config = self.model.config
        g = torch.Generator().manual_seed(0)

        def text(length: int) -> list[int]:
            return torch.randint(0, size.model.num_text_ids, (length,), generator=g).tolist()

        token_ids: list[int] = []
        for height, width in size.images:
            image = [config.image_token_id] * (height * width)
            token_ids += [config.vision_start_token_id, *image, config.vision_end_token_id]
        token_ids += text(size.text)
        num_patches = sum(rows * columns for _, rows, columns in size.grids)
        pixels = torch.randn(num_patches, PATCH_SIZE, generator=g).to(device, dtype)
        self.pixel_values = pixels if size.images else None
        self.prompt_ids = torch.tensor(token_ids)
        self.is_image = self.prompt_ids == config.image_token_id
        positions, _ = self.model.model.get_rope_index(
            self.prompt_ids[None],
            self.is_image[None].int(),
            torch.tensor(size.grids) if size.images else None,
        )
        rows = self.is_image.nonzero().flatten().tolist()
        self.prompt = EncodedPrompt(
            "benchmark", token_ids, positions[:, 0], rows, self.pixel_values, size.grids
        )
        self.completions = [text(length) for length in size.completions]
        self.advantage_N = (torch.randn(len(self.completions), generator=g) + 0.5).to(device)
        self.weight_R = token_weights(size.completions, "bnpo").to(device)
        lengths = torch.tensor(size.completions, device=device)
        self.advantage_R = self.advantage_N.repeat_interleave(lengths, output_size=sum(size.completions))

    @cached_property
    def padded(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Rows of prompt and completion, padded to the longest, as TRL's trainer feeds them.

        Returns:
            The model's arguments, the completions' tokens and their mask, [N, longest] both.
        """
        count, rows = len(self.completions), [torch.tensor(tokens) for tokens in self.completions]
        completion_NL = pad_sequence(rows, batch_first=True)
        mask_NL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        prompt_NP = self.prompt_ids.expand(count, -1)
        type_NP = self.is_image.int().expand(count, -1)
        arguments = {
            "input_ids": torch.cat([prompt_NP, completion_NL], 1).to(self.device),
            "attention_mask": torch.cat([torch.ones_like(prompt_NP), mask_NL], 1).to(self.device),
            "mm_token_type_ids": torch.cat([type_NP, torch.zeros_like(mask_NL).int()], 1).to(self.device),
        }
        if self.pixel_values is not None:
            arguments["image_grid_thw"] = torch.tensor(self.size.grids * count, device=self.device)
            arguments["pixel_values"] = self.pixel_values.repeat(count, 1)
        return arguments, completion_NL.to(self.device), mask_NL.to(self.device)

    def packed_step(self, clock: PhaseClock, checkpointed: bool) -> Tensors:
        from geo_r1.models import pack
        from geo_r1.models.qwen_vl import TEXT_ATTENTION, VISION_ATTENTION

        with self._set(TEXT_ATTENTION, VISION_ATTENTION, checkpointed, clock):
            batch = pack([self.prompt], [self.completions], self.device)
            rows_RC = self.vlm.loss_rows(batch)
            out = linear_grpo_loss(
                rows_RC, self.vlm.lm_head, batch.target_R, self.advantage_R, self.weight_R, config=CONFIG
            )
            return self._results(out.loss, clock)

    def padded_step(self, clock: PhaseClock, checkpointed: bool, vision: str = "sdpa") -> Tensors:
        arguments, completion_NL, mask_NL = self.padded
        with self._set("sdpa", vision, checkpointed, clock):
            longest = completion_NL.shape[1]
            logits = self.model(**arguments, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            logp = logp_of(logits.flatten(0, 1), completion_NL.flatten()).view_as(completion_NL)
            ratio = (logp - logp.detach()).exp()
            advantage = self.advantage_N[:, None]
            clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
            loss_NL = -torch.min(ratio * advantage, clipped * advantage)
            return self._results((loss_NL * mask_NL).sum() / mask_NL.sum(), clock)

    @contextmanager
    def _set(self, text: str, vision: str, checkpointed: bool, clock: PhaseClock) -> Iterator[None]:
        """The model with these attentions; its two parts tell the clock when they are done."""
        model = self.model.model
        self.model.zero_grad(set_to_none=True)  # left by a step that ran out of memory half way
        attend_by(self.model, text, vision)
        self.vlm.checkpoint_layers("full" if checkpointed else "none")
        hooks = [
            part.register_forward_hook(lambda *_, phase=phase: clock.end(phase))
            for part, phase in ((model.visual, "vision"), (model.language_model, "text"))
        ]
        clock.start()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _results(self, loss: Tensor, clock: PhaseClock) -> Tensors:
        """The loss and the gradients of a first, a last and a vision weight; all others are dropped."""
        clock.end("loss")
        loss.backward()
        clock.end("backward")
        model = self.model.model
        watched = [model.language_model.layers[0].self_attn.q_proj.weight, model.language_model.norm.weight]
        if self.size.images:
            watched.append(model.visual.blocks[0].attn.qkv.weight)
        results = (loss.detach(), *(p.grad.clone() for p in watched))
        self.model.zero_grad(set_to_none=True)
        return results

    @cached_property
    def cost(self) -> ModelCost:
        from geo_r1.models.cost import ModelCost

        return ModelCost.of(self.model.config)

    def flops(self) -> float:
        """Operations of the packed step, forward and backward; recomputed ones do not count."""
        size = self.size
        return self.cost.flops(size.prompt_len, size.completions, size.grids, backward=True)
