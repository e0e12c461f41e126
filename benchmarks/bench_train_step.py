"""A GRPO training step, forward and backward: packed with a shared prompt, against padded with repeated ones.

`steps.py` describes the two. One group: a prompt with six images and completions of different lengths.

    tokens/s      = tokens of prompts and completions, with repeated prompts, without padding / seconds
    completions/s = completions / seconds
    MFU           = operations / seconds / the matrix products' ceiling of this run

Both steps count the operations of the packed one: repeated and recomputed ones are not work. Errors are
measured on the loss and three gradients against the padded step in the same dtype: a float64 copy of 7B would
not fit.

On a GPU the model is a 7B and the group the paper's: a prompt of 4.4 K tokens, completions of 400. Both
checkpoint every layer unless a name says otherwise. On a CPU it is the same group at a tenth of its lengths,
for models of 100 million and 11 million parameters. The small one also gets prompts three times as long as a
completion and just as long, where sharing saves less. On a CPU neither side checkpoints, which is faster for
both.

`test_scaling` varies the number of completions, the number of images, and the length of a completion.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.bench_attention import IMAGES
from benchmarks.measure import DTYPE, ON_GPU, SCALING, STEP, Case, Provider
from benchmarks.shapes import MID, QWEN_7B, SMALL, TINY
from benchmarks.steps import PhaseClock, Step, StepSize

for package in ("transformers", "tokenizers", "PIL"):
    pytest.importorskip(package)

TOLERANCE = {torch.bfloat16: 1e-1, torch.float32: 1e-3}
# Gigabytes in bfloat16, weights with gradients: one text layer, and all but the text layers. The padded step
# holds about 37 more, and 0.27 per layer; without checkpoints the packed one holds about 77.
LAYER_GB, REST_GB, PADDED_GB, UNCHECKPOINTED_GB = 0.93 + 0.27, 7.0, 37.0, 77.0
TORCH_FLASH = "benchmark_torch_flash"
# Lengths of a group's completions, relative to their mean.
SPREAD = (0.625, 0.75, 0.875, 1.0, 1.0, 1.125, 1.25, 1.375)


def lengths(mean: int, count: int = 8) -> tuple[int, ...]:
    """Lengths of `count` completions, one or an even number, with that mean."""
    ends = [length for pair in zip(SPREAD, reversed(SPREAD), strict=True) for length in pair]
    return (mean,) if count == 1 else tuple(sorted(round(mean * ends[i % 16]) for i in range(count)))


def text_layers() -> int:
    """Text layers of the 7B model: all, or as many as fit beside the padded step."""
    room = 0.92 * torch.cuda.get_device_properties(0).total_memory / 1e9 - REST_GB - PADDED_GB
    return max(1, min(QWEN_7B.text.layers, int(room / LAYER_GB)))


PACKED, PADDED, NO_CHECKPOINTS = "geo_r1 packed", "transformers, padded", ", no checkpoints"
if ON_GPU:
    FLASH, LOOPED = f"{PADDED}, vision through torch's flash", f"{PADDED}, vision windows looped"
    BOTH = (PACKED, FLASH)
    whole = QWEN_7B.cut(text_layers())
    STEPS = [StepSize("Qwen2.5-VL-7B, 6 images, 8 completions", whole, tuple(IMAGES), 64, lengths(400))]
    PROVIDERS = {STEPS[0]: (PACKED, PACKED + NO_CHECKPOINTS, FLASH, LOOPED)}
    # A seventh of its text layers, a quarter of its vision tower, a group at a quarter of its lengths.
    BASE = StepSize("", QWEN_7B.cut(4, 8), ((9, 18), *[(13, 14)] * 5), 16, lengths(100))
    LENGTHS, ROUNDS = (25, 50, 100, 200), 1
else:
    BOTH = (PACKED + NO_CHECKPOINTS, PADDED + NO_CHECKPOINTS)
    tenth, third, same = (((5, 12), *[tile] * 5) for tile in ((8, 9), (7, 8), (5, 6)))
    STEPS = [
        StepSize("tiny, 6 images, 8 completions", TINY, ((2, 4), *[(2, 2)] * 5), 12, (12, 16, 20, 24) * 2),
        StepSize("100M, prompt 438, 8 completions of 40", MID, tenth, 6, lengths(40)),
        StepSize("11M, prompt 438, 8 completions of 40", SMALL, tenth, 6, lengths(40)),
        StepSize("11M, prompt 360, 8 completions of 120", SMALL, third, 8, lengths(120)),
        StepSize("11M, prompt 240, 8 completions of 240", SMALL, same, 18, lengths(240)),
    ]
    PROVIDERS = dict.fromkeys(STEPS, BOTH) | {STEPS[0]: (PACKED, BOTH[0], PADDED, BOTH[1])}
    BASE = StepSize("", SMALL, ((4, 8), *[(5, 7)] * 5), 2, lengths(20))  # half of the tenth
    LENGTHS, ROUNDS = (5, 10, 20, 40, 80), 2


def scaling_sizes() -> list[StepSize]:
    """One group, and variants that change one of its three numbers."""
    base_len = round(sum(BASE.completions) / len(BASE.completions))
    points = [
        *((count, len(BASE.images), base_len) for count in (1, 2, 4, 8, 16)),
        *((8, count, base_len) for count in (0, 1, 2, 4)),
        *((8, len(BASE.images), length) for length in LENGTHS if length != base_len),
    ]
    return [
        replace(
            BASE,
            name=f"{images} images, {count} x {length}",
            images=BASE.images[len(BASE.images) - images :],  # the tiles, which are alike
            completions=lengths(length, count),
        )
        for count, images, length in points
    ]


def register_torch_flash() -> None:
    """Run the vision tower's packed path on torch's own flash kernels, for machines without flash-attn."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cu, longest = cu_seq_lens_q.int(), int(max_length_q)
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, False, False, scale=scaling
        )
        return out[None], None

    AttentionInterface.register(TORCH_FLASH, attention)


def step_case(
    op: str,
    size: StepSize,
    names: tuple[str, ...],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype = DTYPE,
) -> Case:
    register_torch_flash()
    step = Step(size, device, dtype)
    facts = {
        "tokens": size.num_tokens,
        "completions": len(size.completions),
        "images": len(size.images),
        "length": sum(size.completions) / len(size.completions),
        "prompt": size.prompt_len,
        "layers": size.model.text.layers,
        "parameters": step.cost.num_parameters,
        "teraflop": step.flops() / 1e12,
    }
    on_gpu = device.type == "cuda"

    def truth():
        vision = TORCH_FLASH if on_gpu else "sdpa"
        return [x.double() for x in step.padded_step(PhaseClock(device), on_gpu, vision)]

    return Case(
        op,
        size.name,
        dtype,
        TOLERANCE[dtype],
        {name: provider(step, name, rounds) for name in names},
        truth,
        flops=step.flops(),
        hold=False,
        rounds=rounds,
        facts=facts,
    )


def provider(step: Step, name: str, rounds: int) -> Provider:
    """The provider that a name describes."""
    clock, checkpointed = PhaseClock(step.device), not name.endswith(NO_CHECKPOINTS)
    vision = TORCH_FLASH if "torch's flash" in name else "sdpa"
    packed = name.startswith(PACKED)

    def run():
        return (
            step.packed_step(clock, checkpointed) if packed else step.padded_step(clock, checkpointed, vision)
        )

    missing = no_room(step) if packed and not checkpointed else None
    kind = "ours" if packed else "peer"
    return Provider(lambda: run, kind, missing, facts=lambda: clock.shares(rounds))


def no_room(step: Step) -> str | None:
    """Why the packed step of a 7B does not fit without checkpoints; None if it does."""
    if step.device.type != "cuda":
        return None
    needed_gb = REST_GB + UNCHECKPOINTED_GB + step.size.model.text.layers * LAYER_GB
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    return None if needed_gb < 0.95 * total_gb else f"needs about {needed_gb:.0f} GB"


def of_sizes(providers: dict[StepSize, tuple[str, ...]]) -> pytest.MarkDecorator:
    pairs = [(size, name) for size, names in providers.items() for name in names]
    return pytest.mark.parametrize(("size", "provider"), pairs, ids=[f"{s}-{name}" for s, name in pairs])


@of_sizes(PROVIDERS)
def test_step(measure, size, provider):
    measure(step_case, STEP, size, PROVIDERS[size], 2)


@of_sizes(dict.fromkeys(scaling_sizes(), BOTH))
def test_scaling(measure, size, provider):
    measure(step_case, SCALING, size, BOTH, ROUNDS)
