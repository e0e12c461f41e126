"""Cross-view pairing: how often a greedily decoded model finds the satellite tile of a panorama."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_choice, well_formed
from geo_r1.data import PromptEncoder, Sample, read_samples
from geo_r1.errors import UserError
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down, is_finite, wilson_interval
from geo_r1.eval.native import complete, native_sampler
from geo_r1.eval.rows import RELATIVE, add_data, texts_of
from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.rollout import Completion, SamplingConfig


@dataclass(frozen=True)
class Prediction:
    """A model's completion of one sample, its text, and its record from `score`."""

    id: str
    completion: Completion
    text: str
    record: Mapping[str, Any]


def question_of(sample: Sample) -> tuple[str, int]:
    """The true letter of a sample, and how many choices it has.

    Raises:
        UserError: the answer is not one of the letters, or the choices are not 2 to 26; names the sample.
    """
    num_choices = sample.metadata.get("num_choices", DEFAULT_NUM_CHOICES)
    if not isinstance(num_choices, int) or not 2 <= num_choices <= 26:
        raise UserError(
            f"sample {sample.id}: num_choices must be an integer from 2 to 26, got {num_choices!r}"
        )
    answer, letters = (sample.answer or "").strip().upper(), ascii_uppercase[:num_choices]
    if answer not in list(letters):
        raise UserError(
            f"sample {sample.id}: the answer must be a letter from A to {letters[-1]}, got {sample.answer!r}"
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

    A sample that is skipped because it is too long or bad counts as unanswered.

    Args:
        max_new_tokens: longer completions are cut off, which usually leaves no answer.
        max_tokens: most tokens in the cache at a time.
        progress: called with the number of samples answered so far.

    Raises:
        UserError: a sample has no answer to compare with, or cannot be encoded; names it.
    """

    def encoded(sample: Sample) -> EncodedPrompt | None:
        prompt = encoder.encode_or_skip(sample)
        return None if isinstance(prompt, str) else prompt

    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    sampler = native_sampler(vlm, tokenizer, sampling, max_tokens, "eval.max_tokens")
    predictions: list[Prediction] = []
    for turn in complete(sampler, tokenizer, map(encoded, samples)):
        for sample, (completion, text) in zip(samples[len(predictions) :], turn, strict=False):
            record = score(Question(sample, truth_of(sample)), text)
            predictions.append(Prediction(sample.id, completion, text, record))
        progress(len(predictions))
    return predictions


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy, its 95 % interval and chance level; mean completion length in tokens; share well formed."""
    return figures([{**p.record, "length": len(p.completion.token_ids)} for p in predictions])


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Like `summarise`, from records of `score`; the mean length is over known lengths only."""
    count, correct = len(records), sum(r["correct"] for r in records)
    lengths = [r["length"] for r in records if r["length"] is not None]
    return {
        "accuracy": correct / count,
        "accuracy_interval": wilson_interval(correct, count),
        "completion_length": statistics.fmean(lengths) if lengths else None,
        "well_formed": sum(r["well_formed"] for r in records) / count,
        "answered": sum(r["answered"] for r in records) / count,
        "num_samples": count,
        "chance": statistics.fmean(1 / r["num_choices"] for r in records),
    }


def truth_of(sample: Sample) -> dict[str, Any]:
    """The answer, and the facts to break accuracy down by; raises like `question_of`."""
    answer, num_choices = question_of(sample)
    known = {key: sample.metadata.get(key) for key in ("confusers", "difficulty", "latitude", "longitude")}
    city = texts_of(sample.metadata, ["city"])["city"] or ""
    return {"answer": answer, "num_choices": num_choices, "city": city, **known}


def score(question: Question, text: str) -> dict[str, Any]:
    """Read the choice; see `Benchmark.score`."""
    truth = question.truth
    choice = extract_choice(text, truth["num_choices"])
    return {
        "answered": choice is not None,
        "prediction": choice,
        "correct": choice == truth["answer"],
        "well_formed": well_formed(text),
        **truth,
    }


def by_group(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`figures` of all records, and by number of choices, kind of confuser, difficulty and city."""
    groups: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "by_k": lambda r: r["num_choices"],
        "by_confusers": lambda r: texts_of(r, ["confusers"])["confusers"],
        "by_difficulty": _third_of(records),
        "by_city": lambda r: r["city"] or None,
    }
    return figures(records) | {name: broken_down(records, key, figures) for name, key in groups.items()}


def _third_of(records: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str | None]:
    """A function from a record to its third of the known difficulties, named by the third's bounds."""
    known = sorted(r["difficulty"] for r in records if is_finite(r["difficulty"]))
    if not known:
        return lambda r: None
    low, high = known[len(known) // 3], known[2 * len(known) // 3]
    names = (f"below {low:.3g}", f"{low:.3g} to {high:.3g}", f"{high:.3g} and above")

    def third(record: Mapping[str, Any]) -> str | None:
        value = record["difficulty"]
        return names[(value >= low) + (value >= high)] if is_finite(value) else None

    return third


def _configure(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "JSONL or parquet, as `pairs` writes it", RELATIVE)


def _questions(options: argparse.Namespace) -> list[Question]:
    return [Question(sample, truth_of(sample)) for sample in read_samples(options.data, options.images)]


# Source: Geo-R1, arXiv:2510.00072, cross-view pairing of CV-Cities, k = 5.
PUBLISHED = {
    "Qwen2.5-VL-7B": {"accuracy": 0.190, "completion_length": 204.6},
    "Geo-SFT": {"accuracy": 0.231, "completion_length": 1127.6},
    "Geo-R1-Zero": {"accuracy": 0.781, "completion_length": 587.4},
    "Geo-R1": {"accuracy": 0.824, "completion_length": 378.8},
}
BENCHMARK = Benchmark(
    name="cross-view",
    help="find the satellite tile of a panorama: accuracy and length; by k, confusers and city",
    configure=_configure,
    questions=_questions,
    score=score,
    summarise=by_group,
    columns=(
        Column("accuracy", "accuracy", "share"),
        Column("95 % interval", "accuracy_interval", "interval"),
        Column("guessing", "chance", "share"),
        Column("mean length", "completion_length", "number"),
        Column("well formed", "well_formed", "share"),
        Column("answered", "answered", "share"),
        Column("samples", "num_samples", "count"),
    ),
    published=PUBLISHED,
    breakdowns=("by_k", "by_confusers", "by_difficulty", "by_city"),
)
