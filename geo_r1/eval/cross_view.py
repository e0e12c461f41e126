"""Cross-view pairing: the share of held-out panoramas whose satellite tile is found, greedily decoded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_choice
from geo_r1.data import OverlongPrompt, PromptEncoder, Sample
from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.rewards import format_reward
from geo_r1.rollout import Completion, SamplingConfig, generate

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
PROMPTS_A_TURN = 64  # between two moves of the progress line
UNANSWERED = Completion([], [], False)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one sample.

    Attributes:
        id, city, answer, num_choices: of the sample; the answer is the true letter.
        choice: the letter read from the completion; None where there is none or it is in doubt.
        well_formed: the whole text is a think block and an answer block.
    """

    id: str
    city: str
    answer: str
    num_choices: int
    completion: Completion
    text: str
    choice: str | None
    well_formed: bool

    @property
    def correct(self) -> bool:
        return self.choice == self.answer


def question_of(sample: Sample) -> tuple[str, int]:
    """The true letter of a sample, and how many choices it has.

    Raises:
        ValueError: they are missing, or not a letter among 2 to 26 choices; names the sample.
    """
    num_choices = sample.metadata.get("num_choices", DEFAULT_NUM_CHOICES)
    if not isinstance(num_choices, int) or not 2 <= num_choices <= 26:
        raise ValueError(
            f"sample {sample.id}: num_choices must be an integer from 2 to 26, got {num_choices!r}"
        )
    answer = (sample.answer or "").strip().upper()
    if answer not in list(ascii_uppercase[:num_choices]):
        raise ValueError(
            f"sample {sample.id}: the answer must be a letter from A to {ascii_uppercase[num_choices - 1]}, "
            f"got {sample.answer!r}"
        )
    return answer, num_choices


def predict(
    vlm: PackedVLM,
    tokenizer: Any,
    encoder: PromptEncoder,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    max_tokens: int,
    progress: Callable[[int], None],
) -> list[Prediction]:
    """Answer each sample once, with the most likely token at every step.

    A prompt that is too long and may be skipped stays in, unanswered.

    Args:
        max_new_tokens: longer completions are cut off, which usually leaves no answer.
        max_tokens: cached tokens at a time.
        progress: called with the number of samples answered so far.

    Raises:
        ValueError: a sample has no answer to compare with, or cannot be encoded; names it.
    """
    predictions: list[Prediction] = []
    for start in range(0, len(samples), PROMPTS_A_TURN):
        turn = samples[start : start + PROMPTS_A_TURN]
        prompts = {i: prompt for i, s in enumerate(turn) if (prompt := _encode(encoder, s)) is not None}
        for prompt in prompts.values():
            prompt.check_budget(max_new_tokens, max_tokens, "eval.max_tokens")
        groups = generate(
            vlm,
            [*prompts.values()],
            1,
            sampling=SamplingConfig(temperature=0, max_new_tokens=max_new_tokens),
            eos_token_id={tokenizer.eos_token_id, *vlm.end_token_ids},
            streams=[turn[i].id for i in prompts],
            max_tokens=max_tokens,
        )
        completions = dict(zip(prompts, (completion for [completion] in groups), strict=True))
        for i, sample in enumerate(turn):
            completion = completions.get(i, UNANSWERED)
            answer, num_choices = question_of(sample)
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            choice = extract_choice(text, num_choices)
            city = str(sample.metadata.get("city", ""))
            well_formed = format_reward([text]) == [1.0]
            predictions.append(
                Prediction(sample.id, city, answer, num_choices, completion, text, choice, well_formed)
            )
        progress(len(predictions))
    return predictions


def _encode(encoder: PromptEncoder, sample: Sample) -> EncodedPrompt | None:
    try:
        return encoder.encode(sample)
    except OverlongPrompt:
        if encoder.on_overlong != "skip":
            raise
        return None


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy, its 95 % interval and chance level; mean completion length in tokens; share well formed."""
    count = len(predictions)
    correct = sum(p.correct for p in predictions)
    return {
        "accuracy": correct / count,
        "accuracy_interval": wilson_interval(correct, count),
        "completion_length": statistics.fmean(len(p.completion.token_ids) for p in predictions),
        "well_formed": sum(p.well_formed for p in predictions) / count,
        "num_samples": count,
        "chance": statistics.fmean(1 / p.num_choices for p in predictions),
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion. Source: Wilson's score interval, 1927."""
    share = successes / trials
    spread = Z_95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
