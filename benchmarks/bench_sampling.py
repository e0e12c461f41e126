"""Sampling completions of prompts with images: `geo_r1.rollout.generate` against transformers' `generate`.

Same model, same prompts of six images, 8 completions each with the same maximum length, temperature 1, in one
process. transformers gets one batch of all prompts, padded on the left, with `num_return_sequences=8`, its
default cache and attention ("sdpa"): it repeats each prompt and its images for every completion, and runs
until the last one has ended. Ours computes prompts once, and runs only the completions that have not ended.

    completions/s = completions / seconds;   tokens/s = tokens of completions, without padding / seconds

Completions end at random: one token in forty ends them, or none does and all reach full length. The two draw
different random numbers, so only their times are compared; `tests/rollout` checks that both give the same
tokens when sampling is greedy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.bench_attention import IMAGES
from benchmarks.measure import DTYPE, ON_GPU, Case, Provider, Tensors, synchronize
from benchmarks.shapes import MID, QWEN_7B, SMALL, TINY, ModelShape
from benchmarks.steps import Step, StepSize, attend_by

for package in ("transformers", "tokenizers", "PIL"):
    pytest.importorskip(package)

NUM_COMPLETIONS = 8
ENDS_ONE_IN = 40  # tokens of the vocabulary
OURS, GRAPHS, THEIRS = "geo_r1", "geo_r1, CUDA graphs", "transformers"


@dataclass(frozen=True)
class SamplingSize:
    """Prompts and their completions.

    Attributes:
        name: shown in tables.
        model: shape of the model.
        images: height and width of each image of a prompt, in merged patches.
        prompts: number of prompts; the text of each is one token longer than the one before.
        length: the most tokens of a completion.
        ends: True if a token can end a completion.
    """

    name: str
    model: ModelShape
    images: tuple[tuple[int, int], ...]
    prompts: int
    length: int
    ends: bool = True

    def __str__(self) -> str:
        return self.name


TENTH = ((5, 12), *[(8, 9)] * 5)  # of the paper's lengths, as in `bench_train_step`
if ON_GPU:
    SIZES = [SamplingSize("Qwen2.5-VL-7B, 4 prompts of 4.4 K, up to 128", QWEN_7B, tuple(IMAGES), 4, 128)]
    PROVIDERS = (OURS, GRAPHS, THEIRS)
else:
    SIZES = [
        SamplingSize("tiny, 2 short prompts, up to 24", TINY, ((2, 4), *[(2, 2)] * 5), 2, 24),
        SamplingSize("11M, 4 prompts of 438, up to 40", SMALL, TENTH, 4, 40),
        SamplingSize("11M, 4 prompts of 438, all 40", SMALL, TENTH, 4, 40, ends=False),
        SamplingSize("100M, 2 prompts of 438, up to 40", MID, TENTH, 2, 40),
    ]
    PROVIDERS = (OURS, THEIRS)


class Samplers:
    """A model, its prompts, and the ways to sample."""

    def __init__(self, size: SamplingSize, device: torch.device) -> None:
        self.size = size
        step_size = StepSize("", size.model, size.images, 6, (1,))
        steps = [Step(replace(step_size, text=6 + i), device, DTYPE) for i in range(size.prompts)]
        self.vlm, self.prompts = steps[0].vlm, [step.prompt for step in steps]
        self.model = self.vlm.model
        self.pad = size.model.text.vocab - 5  # neither text nor image
        self.ends = list(range(0, size.model.text.vocab - 5, ENDS_ONE_IN)) if size.ends else []

    def provider(self, name: str, sample: Callable[[], Tensor]) -> Provider:
        """A way to sample; its rates are those of its last run."""
        facts: dict[str, float] = {}

        def run() -> Tensors:
            self.model.eval()
            begin = time.perf_counter()
            tokens_N = sample()
            synchronize(self.vlm.device)
            seconds = time.perf_counter() - begin
            facts["completions/s"] = len(tokens_N) / seconds
            facts["tokens/s"] = int(tokens_N.sum()) / seconds
            return (tokens_N,)

        return Provider(lambda: run, "peer" if name == THEIRS else "ours", facts=lambda: facts)

    def ours(self, cuda_graphs: bool) -> Tensor:
        """Tokens of each completion, [prompts * completions]."""
        from geo_r1.models.attention import TEXT_ATTENTION, VISION_ATTENTION
        from geo_r1.rollout import SamplingConfig, generate

        attend_by(self.model, TEXT_ATTENTION, VISION_ATTENTION)
        groups = generate(
            self.vlm,
            self.prompts,
            NUM_COMPLETIONS,
            sampling=SamplingConfig(max_new_tokens=self.size.length),
            eos_token_id=self.ends,
            streams=[str(i) for i in range(len(self.prompts))],
            max_tokens=10**6,
            cuda_graphs=cuda_graphs,
        )
        return torch.tensor([len(c.token_ids) for group in groups for c in group])

    def theirs(self) -> Tensor:
        """Tokens of each completion, by transformers."""
        attend_by(self.model, "sdpa", "sdpa")
        device, longest = self.vlm.device, max(len(p.token_ids) for p in self.prompts)
        rows = [[self.pad] * (longest - len(p.token_ids)) + p.token_ids for p in self.prompts]
        input_ids = torch.tensor(rows, device=device)
        image_id = self.model.config.image_token_id
        with torch.no_grad():
            completions = self.model.generate(
                input_ids=input_ids,
                attention_mask=(input_ids != self.pad).long(),
                mm_token_type_ids=(input_ids == image_id).int(),
                pixel_values=torch.cat([p.pixel_values for p in self.prompts]),
                image_grid_thw=torch.tensor([g for p in self.prompts for g in p.image_grids], device=device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=NUM_COMPLETIONS,
                max_new_tokens=self.size.length,
                eos_token_id=self.ends or None,
                pad_token_id=self.pad,
                suppress_tokens=[*self.vlm.vision_token_ids, self.pad],
            )[:, longest:]
        return (completions != self.pad).sum(1)


def sampling_case(size: SamplingSize, device: torch.device) -> Case:
    samplers = Samplers(size, device)
    facts = {
        "completions": float(size.prompts * NUM_COMPLETIONS),
        "prompt": float(len(samplers.prompts[0].token_ids)),
        "length": float(size.length),
        "layers": float(size.model.text.layers),
    }
    ways = {
        OURS: partial(samplers.ours, False),
        GRAPHS: partial(samplers.ours, True),
        THEIRS: samplers.theirs,
    }
    providers = {name: samplers.provider(name, sample) for name, sample in ways.items()}
    rounds = 1 if ON_GPU else 2
    return Case("sampling", size.name, DTYPE, 0.0, providers, None, hold=False, rounds=rounds, facts=facts)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sampling(measure, size, provider):
    measure(sampling_case, size)
