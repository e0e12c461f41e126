"""A GRPO training step, forward and backward: packed with a shared prompt, against padded with repeated ones.

One group: a prompt with six images and eight completions of different lengths. The padded step is what
trainers do on transformers today: a row a completion, padded to the longest, every row with its own copy of
the prompt and of its images, full logits of the completion rows. Both train the vision tower, both have the
same weights, and both checkpoint every layer unless said otherwise.

    tokens/s = tokens of the prompts and completions, repeated prompts included, padding not / seconds
    MFU      = operations / seconds / the matrix products' ceiling of this run

Operations are those of the packed step: 3 (forward, backward) x 2 a weight and token of text layers, vision
layers, merger and language head, and 3 x 4 H D a visible pair; nothing recomputed counts. Errors are of the
loss and three gradients against the padded step in the same dtype: a float64 copy of 7B would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.bench_attention import IMAGES, AttentionSize, windows
from benchmarks.losses import logp_of
from benchmarks.measure import Case, Provider
from benchmarks.meters import Tensors
from benchmarks.peers import why_missing
from geo_r1.kernels import GRPOLossConfig, linear_grpo_loss, token_weights

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = {torch.bfloat16: 1e-1, torch.float32: 1e-3}
CONFIG = GRPOLossConfig()
# Gigabytes in bfloat16, weights with gradients: a text layer, and what does not depend on their number. The
# padded step holds about 37 more, and 0.27 a layer; without checkpoints the packed one holds about 77.
LAYER_GB, REST_GB, PADDED_GB, UNCHECKPOINTED_GB = 0.93 + 0.27, 7.0, 37.0, 77.0
TORCH_FLASH = "benchmark_torch_flash"


@dataclass(frozen=True)
class StepSize:
    name: str
    images: tuple[tuple[int, int], ...]  # height and width in merged patches
    text: int  # tokens of the prompt's text
    completions: tuple[int, ...]
    shape: dict | None  # of the model; None: the tiny one

    def __str__(self) -> str:
        return self.name


SHAPE_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}
if ON_GPU:
    lengths = (250, 300, 350, 400, 400, 450, 500, 550)
    SIZES = [StepSize("Qwen2.5-VL-7B, 6 images, 8 completions", tuple(IMAGES), 64, lengths, SHAPE_7B)]
else:
    SIZES = [
        StepSize("tiny, 6 images, 8 completions", ((2, 4), *[(2, 2)] * 5), 12, (12, 16, 20, 24) * 2, None)
    ]
PROVIDERS = (
    "geo_r1 packed",
    "geo_r1 packed, no checkpoints",
    "transformers, padded, vision through torch's flash",
    "transformers, padded, vision windows looped",  # what it does without flash-attn
)


def text_layers(shape: dict) -> int:
    """All layers, or as many as the padded step leaves room for."""
    wanted = shape["text_config"]["num_hidden_layers"]
    room = 0.92 * torch.cuda.get_device_properties(0).total_memory / 1e9 - REST_GB - PADDED_GB
    return max(1, min(wanted, int(room / LAYER_GB)))


def build_model(size: StepSize, device: torch.device):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if size.shape is None:
        from geo_r1.models.tiny import build_tiny

        return build_tiny(["north south east west"])[0].to(device).train()
    config = Qwen2_5_VLConfig(
        **size.shape
        | {"text_config": size.shape["text_config"] | {"num_hidden_layers": text_layers(size.shape)}}
    )
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen2_5_VLForConditionalGeneration(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


class Step:
    """A model and one group of work for it."""

    def __init__(self, size: StepSize, device: torch.device) -> None:
        from geo_r1.models import EncodedPrompt, PackedVLM

        self.size, self.device = size, device
        self.model = build_model(size, device)
        self.vlm = PackedVLM(self.model)
        config = self.model.config
        g = torch.Generator().manual_seed(0)
        first_special = min(config.image_token_id, config.vision_start_token_id)

        def text(length: int) -> list[int]:
            return torch.randint(0, min(first_special, 1000), (length,), generator=g).tolist()

        if size.shape is None:  # the tiny tokenizer's special tokens come first

            def text(length: int) -> list[int]:
                return torch.randint(7, config.text_config.vocab_size, (length,), generator=g).tolist()

        token_ids: list[int] = []
        for height, width in size.images:
            picture = [config.image_token_id] * (height * width)
            token_ids += [config.vision_start_token_id, *picture, config.vision_end_token_id]
        token_ids += text(size.text)
        self.grids = tuple((1, 2 * height, 2 * width) for height, width in size.images)
        num_patches = sum(height * width for _, height, width in self.grids)
        patch = 3 * 2 * 14 * 14
        self.pixel_values = torch.randn(num_patches, patch, generator=g).to(device, self.model.dtype)
        self.prompt_ids = torch.tensor(token_ids)
        is_image = self.prompt_ids == config.image_token_id
        positions, _ = self.model.model.get_rope_index(
            self.prompt_ids[None], is_image[None].int(), torch.tensor(self.grids)
        )
        rows = is_image.nonzero().flatten().tolist()
        self.prompt = EncodedPrompt(
            "benchmark", token_ids, positions[:, 0], rows, self.pixel_values, self.grids
        )
        self.completions = [text(length) for length in size.completions]
        self.advantage_N = (torch.randn(len(self.completions), generator=g) + 0.5).to(device)
        self.weight_R = token_weights(size.completions, "bnpo").to(device)
        lengths = torch.tensor(size.completions)
        self.advantage_R = self.advantage_N.repeat_interleave(
            lengths.to(device), output_size=int(lengths.sum())
        )
        self._pad(is_image)

    def _pad(self, is_image: Tensor) -> None:
        """Rows of prompt and completion, padded to the longest, as TRL's trainer feeds them."""
        longest, count = max(self.size.completions), len(self.completions)
        completion_NL = torch.zeros(count, longest, dtype=torch.int64)
        mask_NL = torch.zeros(count, longest, dtype=torch.int64)
        for row, completion in enumerate(self.completions):
            completion_NL[row, : len(completion)] = torch.tensor(completion)
            mask_NL[row, : len(completion)] = 1
        prompt_NP = self.prompt_ids.expand(count, -1)
        type_NP = is_image.int().expand(count, -1)
        self.padded = {
            "input_ids": torch.cat([prompt_NP, completion_NL], 1).to(self.device),
            "attention_mask": torch.cat([torch.ones_like(prompt_NP), mask_NL], 1).to(self.device),
            "mm_token_type_ids": torch.cat([type_NP, torch.zeros_like(mask_NL).int()], 1).to(self.device),
            "image_grid_thw": torch.tensor(self.grids * count, device=self.device),
            "pixel_values": self.pixel_values.repeat(count, 1),
        }
        self.completion_NL, self.mask_NL = completion_NL.to(self.device), mask_NL.to(self.device)

    def checkpoint(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def attend(self, text: str, vision: str) -> None:
        self.model.zero_grad(set_to_none=True)  # of a step that ran out of memory half way
        self.model.model.language_model.config._attn_implementation = text
        self.model.model.visual.config._attn_implementation = vision

    def packed_step(self, checkpointed: bool) -> Tensors:
        from geo_r1.models import pack
        from geo_r1.models.qwen_vl import TEXT_ATTENTION, VISION_ATTENTION

        self.attend(TEXT_ATTENTION, VISION_ATTENTION)
        self.checkpoint(checkpointed)
        batch = pack([self.prompt], [self.completions], self.device)
        rows_RC = self.vlm.loss_rows(batch)
        out = linear_grpo_loss(
            rows_RC, self.vlm.lm_head, batch.target, self.advantage_R, self.weight_R, config=CONFIG
        )
        return self._results(out.loss)

    def padded_step(self, vision: str) -> Tensors:
        self.attend("sdpa", vision)
        self.checkpoint(True)
        longest = self.completion_NL.shape[1]
        logits = self.model(**self.padded, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        logp = logp_of(logits.flatten(0, 1), self.completion_NL.flatten()).view_as(self.completion_NL)
        ratio = (logp - logp.detach()).exp()
        advantage = self.advantage_N[:, None]
        clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
        loss_NL = -torch.min(ratio * advantage, clipped * advantage)
        return self._results((loss_NL * self.mask_NL).sum() / self.mask_NL.sum())

    def _results(self, loss: Tensor) -> Tensors:
        """The loss and the gradients of a first, a vision and a last weight; all others are dropped."""
        loss.backward()
        model = self.model.model
        watched = (
            model.language_model.layers[0].self_attn.q_proj.weight,
            model.visual.blocks[0].attn.qkv.weight,
            model.language_model.norm.weight,
        )
        results = (loss.detach(), *(p.grad.clone() for p in watched))
        self.model.zero_grad(set_to_none=True)
        return results

    def flops(self) -> float:
        """Of the packed step; see the top of the file."""
        text, vision = self.model.config.text_config, self.model.config.vision_config
        head_size = text.hidden_size // text.num_attention_heads
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        own = sum(self.size.completions)
        prompt = len(self.prompt_ids)
        layer = text.hidden_size * head_size * (2 * heads + 2 * kv_heads)
        layer += 3 * text.hidden_size * text.intermediate_size
        pairs = AttentionSize("", (prompt,), (self.size.completions,), heads, kv_heads, head_size).pairs
        total = text.num_hidden_layers * (2 * layer * (prompt + own) + 4 * heads * head_size * pairs)
        total += 2 * own * text.hidden_size * text.vocab_size
        patches = len(self.pixel_values)
        wide = vision.hidden_size
        block = 4 * wide**2 + 3 * wide * vision.intermediate_size
        whole = sum((h * w) ** 2 for _, h, w in self.grids)
        window = sum(n * n for n in windows(list(self.size.images)))
        full = len(vision.fullatt_block_indexes)
        total += 2 * patches * (vision.depth * block + self.pixel_values.shape[1] * wide)
        total += 4 * wide * (full * whole + (vision.depth - full) * window)
        total += 2 * patches // 4 * ((4 * wide) ** 2 + 4 * wide * text.hidden_size)
        return 3.0 * total


def register_torch_flash() -> None:
    """The vision tower's packed path on the flash kernels inside torch, for those without flash-attn."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cu, longest = cu_seq_lens_q.int(), int(max_length_q)
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, False, False, scale=scaling
        )
        return out[None], None

    AttentionInterface.register(TORCH_FLASH, attention)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step(report, device, size, provider):
    for package in ("transformers", "tokenizers", "PIL"):
        if (missing := why_missing(package, needs_gpu=False)) is not None:
            pytest.skip(missing)

    def make():
        register_torch_flash()
        step = Step(size, device)
        rows = len(size.completions) * len(step.prompt_ids) + sum(size.completions)
        layers = step.model.config.text_config.num_hidden_layers
        case = Case(
            "training step",
            size.name,
            DTYPE,
            TOLERANCE[DTYPE],
            flops=step.flops(),
            hold=False,
            rounds=2,
            facts={"tokens": rows, "layers": layers, "teraflop": step.flops() / 1e12},
        )
        total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if ON_GPU else float("inf")
        needed_gb = REST_GB + UNCHECKPOINTED_GB + layers * LAYER_GB
        no_room = None if needed_gb < 0.95 * total_gb else f"needs about {needed_gb:.0f} GB"
        no_gpu = None if ON_GPU else "torch's flash kernels need a GPU"
        best_vision = TORCH_FLASH if ON_GPU else "sdpa"
        makers = (
            ("ours", lambda: step.packed_step(True), None),
            ("ours", lambda: step.packed_step(False), no_room),
            ("peer", lambda: step.padded_step(TORCH_FLASH), no_gpu),
            ("peer", lambda: step.padded_step("sdpa"), None),
        )
        providers = [
            Provider(name, lambda run=run: run, kind=kind, missing=missing)
            for name, (kind, run, missing) in zip(PROVIDERS, makers, strict=True)
        ]
        return case, providers, lambda: [x.double() for x in step.padded_step(best_vision)]

    report(make)
