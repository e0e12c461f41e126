"""Answers by the native sampler: one completion a sample, greedily decoded unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from geo_r1.data import OverlongPromptError, PromptEncoder, Sample
from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.rollout import Completion, SamplingConfig, generate

PROMPTS_A_TURN = 64  # between two moves of the progress line
UNANSWERED = Completion([], [], False)


def complete(
    vlm: PackedVLM,
    tokenizer: Any,
    encoder: PromptEncoder,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    max_tokens: int,
    temperature: float = 0.0,
    budget: str = "eval.max_tokens",
) -> Iterator[list[tuple[Completion, str]]]:
    """Yields the completions of some samples at a time, in order, with their texts.

    A prompt that is too long and may be skipped has an empty one.

    Args:
        max_new_tokens: longer completions are cut off, which usually leaves no answer.
        max_tokens: cached tokens at a time.
        budget: what errors call `max_tokens`.

    Raises:
        ValueError: a sample cannot be encoded; names it.
    """
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens)
    for start in range(0, len(samples), PROMPTS_A_TURN):
        turn = samples[start : start + PROMPTS_A_TURN]
        prompts = {i: prompt for i, s in enumerate(turn) if (prompt := encode(encoder, s)) is not None}
        for prompt in prompts.values():
            prompt.check_budget(max_new_tokens, max_tokens, budget)
        groups = generate(
            vlm,
            [*prompts.values()],
            1,
            sampling=sampling,
            eos_token_id={tokenizer.eos_token_id, *vlm.end_token_ids},
            streams=[turn[i].id for i in prompts],
            max_tokens=max_tokens,
        )
        completions = dict(zip(prompts, (completion for [completion] in groups), strict=True))
        said = [completions.get(i, UNANSWERED) for i in range(len(turn))]
        yield [(c, tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in said]


def encode(encoder: PromptEncoder, sample: Sample) -> EncodedPrompt | None:
    """A sample's prompt; None where it is too long and may be skipped."""
    try:
        return encoder.encode(sample)
    except OverlongPromptError:
        if encoder.on_overlong != "skip":
            raise
        return None
