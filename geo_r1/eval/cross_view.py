"""Cross-view pairing: the share of held-out panoramas whose satellite tile is found, greedily decoded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_choice
from geo_r1.data import PromptEncoder, Sample
from geo_r1.models import PackedVLM
from geo_r1.rewards import format_reward
from geo_r1.rollout import Completion, SamplingConfig, generate

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
PROMPTS_A_TURN = 64  # between two moves of the progress line


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

    Args:
        max_new_tokens: longer completions are cut off, which usually leaves no answer.
        max_tokens: cached tokens at a time.
        progress: called with the number of samples answered so far.

    Raises:
        ValueError: a sample has no answer to compare with, or cannot be encoded; names it.
    """
    predictions = []
    for start in range(0, len(samples), PROMPTS_A_TURN):
        turn = samples[start : start + PROMPTS_A_TURN]
        for sample in turn:
            if sample.answer is None:
                raise ValueError(f"sample {sample.id} has no answer to evaluate against")
        groups = generate(
            vlm,
            [encoder.encode(sample) for sample in turn],
            1,
            sampling=SamplingConfig(temperature=0, max_new_tokens=max_new_tokens),
            eos_token_id=tokenizer.eos_token_id,
            streams=[sample.id for sample in turn],
            max_tokens=max_tokens,
        )
        for sample, [completion] in zip(turn, groups, strict=True):
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            num_choices = sample.metadata.get("num_choices") or DEFAULT_NUM_CHOICES
            choice = extract_choice(text, num_choices)
            city = str(sample.metadata.get("city", ""))
            well_formed = format_reward([text]) == [1.0]
            predictions.append(
                Prediction(
                    sample.id, city, str(sample.answer), num_choices, completion, text, choice, well_formed
                )
            )
        progress(len(predictions))
    return predictions


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
