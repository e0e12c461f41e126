"""Sampling completions of prompts with images: `geo_r1.rollout.generate` against transformers' `generate`.

Same model, same prompts of six images, 8 completions each of the same greatest length, temperature 1, in one
process. transformers gets one batch of all prompts, padded on the left, with `num_return_sequences=8`, its
default cache and attention ("sdpa"): it repeats each prompt and its images for every completion, and goes on
until the last one has ended. Ours computes prompts once, and runs what is still being said.

    completions/s = completions / seconds;   tokens/s = tokens of completions, padding not / seconds

Where completions end is drawn: one token in forty ends them, or none, which leaves everything at full length.
The two draw different random numbers, so nothing is compared but time; `tests/rollout` holds both to the same
tokens where the most likely one is taken.
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
from benchmarks.measure import Case, Provider
from benchmarks.peers import why_missing
from benchmarks.shapes import MID, QWEN_7B, SMALL, TINY, ModelShape
from benchmarks.steps import Step, StepSize

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_COMPLETIONS = 8
ENDS_ONE_IN = 40  # tokens of the vocabulary
OURS, GRAPHS, THEIRS = "geo_r1", "geo_r1, CUDA graphs", "transformers"


@dataclass(frozen=True)
class SamplingSize:
    """Prompts and how much is said to them.

    Attributes:
        name: in tables.
        model: whose shape the model has.
        images: height and width of each of a prompt's, in merged patches.
        prompts: how many; the text of each is a token longer than that of the one before.
        length: tokens of a completion at most.
        ends: whether a token can end one.
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
    """A model, its prompts, and the ways to sample; each notes what it said and how long that took."""

    def __init__(self, size: SamplingSize, device: torch.device) -> None:
        self.size = size
        step_size = StepSize("", size.model, size.images, 6, (1,))
        steps = [Step(replace(step_size, text=6 + i), device, DTYPE) for i in range(size.prompts)]
        self.vlm, self.prompts = steps[0].vlm, [step.prompt for step in steps]
        self.model = self.vlm.model
        self.pad = size.model.vocab - 5  # no text, no image
        self.ends = list(range(0, size.model.vocab - 5, ENDS_ONE_IN)) if size.ends else []
        self.said: dict[str, tuple[float, int]] = {}  # seconds and tokens of each one's last run

    def run(self, name: str, sample: Callable[[], Tensor]) -> tuple[Tensor]:
        """Tokens of each completion, [prompts * completions]."""
        self.model.eval()
        begin = time.perf_counter()
        tokens = sample()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        self.said[name] = time.perf_counter() - begin, int(tokens.sum())
        return (tokens,)

    def facts(self, name: str) -> dict[str, float]:
        seconds, tokens = self.said[name]
        num_completions = self.size.prompts * NUM_COMPLETIONS
        return {"completions/s": num_completions / seconds, "tokens/s": tokens / seconds}

    def ours(self, cuda_graphs: bool) -> Tensor:
        from geo_r1.models.attention import TEXT_ATTENTION, VISION_ATTENTION
        from geo_r1.rollout import SamplingConfig, generate

        self._attend_by(TEXT_ATTENTION, VISION_ATTENTION)
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
        self._attend_by("sdpa", "sdpa")
        device, longest = self.vlm.device, max(len(p.token_ids) for p in self.prompts)
        rows = [[self.pad] * (longest - len(p.token_ids)) + p.token_ids for p in self.prompts]
        input_ids = torch.tensor(rows, device=device)
        image_id = self.model.config.image_token_id
        with torch.no_grad():
            said = self.model.generate(
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
        return (said != self.pad).sum(1)

    def _attend_by(self, text: str, vision: str) -> None:
        self.model.model.language_model.config._attn_implementation = text
        self.model.model.visual.config._attn_implementation = vision


def comparison(size: SamplingSize, device: torch.device):
    """A case, its providers in the order of their names, and no truth."""
    samplers = Samplers(size, device)
    facts = {
        "completions": float(size.prompts * NUM_COMPLETIONS),
        "prompt": float(len(samplers.prompts[0].token_ids)),
        "length": float(size.length),
        "layers": float(size.model.layers),
    }
    case = Case("sampling", size.name, DTYPE, 0.0, hold=False, rounds=1 if ON_GPU else 2, facts=facts)
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: partial(samplers.ours, False),
        GRAPHS: partial(samplers.ours, True),
        THEIRS: samplers.theirs,
    }
    providers = []
    for name in PROVIDERS:
        run = partial(samplers.run, name, ways[name])
        kind = "peer" if name == THEIRS else "ours"
        providers.append(
            Provider(name, lambda run=run: run, kind=kind, facts=partial(samplers.facts, name))  # type: ignore[misc]
        )
    return case, providers, None


@pytest.fixture(autouse=True)
def packages():
    for package in ("transformers", "tokenizers", "PIL"):
        if (missing := why_missing(package, needs_gpu=False)) is not None:
            pytest.skip(missing)


CASES = [(size, name) for size in SIZES for name in PROVIDERS]


@pytest.mark.parametrize(("size", "provider"), CASES, ids=[f"{size}-{name}" for size, name in CASES])
def test_sampling(report, device, size, provider):
    report(lambda: comparison(size, device))
