"""Complete each prompt once, a turn of prompts at a time, with the native sampler or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from geo_r1.data.turn import completion_text
from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.rollout import Completion, SamplingConfig, generate

PROMPTS_A_TURN = 64  # prompts between two updates of the progress bar
UNANSWERED = Completion([], [], False)

Sampler = Callable[[list[EncodedPrompt]], list[list[Completion]]]


def native_sampler(
    vlm: PackedVLM, tokenizer: Any, sampling: SamplingConfig, max_tokens: int, option: str
) -> Sampler:
    """The native sampler with at most `max_tokens` cached tokens; errors name this limit by its `option`."""

    def sample(prompts: list[EncodedPrompt]) -> list[list[Completion]]:
        for prompt in prompts:
            prompt.check_budget(sampling.max_new_tokens, max_tokens, option)
        return generate(
            vlm,
            prompts,
            1,
            sampling=sampling,
            eos_token_id={tokenizer.eos_token_id, *vlm.end_token_ids},
            streams=[prompt.sample_id for prompt in prompts],
            max_tokens=max_tokens,
        )

    return sample


def complete(
    sampler: Sampler, tokenizer: Any, prompts: Iterable[EncodedPrompt | None]
) -> Iterator[list[tuple[Completion, str]]]:
    """Yield each turn's completions with their texts; a None gets an empty completion."""
    left = iter(prompts)
    while turn := list(islice(left, PROMPTS_A_TURN)):
        groups = iter(sampler([prompt for prompt in turn if prompt is not None]))
        said = [UNANSWERED if prompt is None else next(groups)[0] for prompt in turn]
        yield [
            (c, "" if prompt is None else completion_text(tokenizer, prompt.opening, c.token_ids))
            for prompt, c in zip(turn, said, strict=True)
        ]
