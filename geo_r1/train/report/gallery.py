"""The report's part on training: chosen prompts of chosen steps, and what the policy answered then.

    read:    rollouts/<stage>-<step>.parquet

A run may have recorded far more than a page that is mailed can hold. The page shows a few steps from first to
newest, a few prompts of each, the best and the worst completion of a prompt and some of the others; it says
how many more there are, and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_r1.data.sample import IMAGE_MARKER
from geo_r1.eval.benchmark import is_finite
from geo_r1.train.report.embedded import Picture, embedded, split_completion
from geo_r1.train.report.transcripts import PART, read_transcripts, transcript_files

# With as many photographs and as long texts as these allow, the page has 7 MB.
NUM_STEPS = 6
NUM_PROMPTS = 2  # of a step
NUM_COMPLETIONS = 8  # of a prompt
NUM_PICTURES = 7  # of a prompt
PICTURE_PIXELS = 512  # the longer side
NUM_CHARACTERS = 8_000  # of a text; of a longer one, its two ends
LABEL_CHARACTERS = 24  # text before a picture that is no longer is its name


@dataclass(frozen=True, slots=True)
class Spoken:
    """A completion.

    Attributes:
        rank: "best", "worst" or neither.
        figures: rewards by function, and the advantage, as far as they are numbers.
        length: in tokens.
    """

    name: str
    rank: str
    reward: float | None
    figures: dict[str, float]
    length: int
    ended: bool
    parts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its best and its worst completion, and others; how many of what are left out."""

    id: str
    position: int
    text: str
    answer: str | None
    pictures: list[Picture]
    pictures_left_out: int
    extremes: list[Spoken]
    others: list[Spoken]
    left_out: int


@dataclass(frozen=True, slots=True)
class Step:
    stage: str
    step: int
    prompts: list[Prompt]
    left_out: int
    file: str


@dataclass(frozen=True, slots=True)
class TrainingGallery:
    steps: list[Step]
    left_out: int


def read_training_gallery(run_dir: Path) -> TrainingGallery | None:
    """What the page shows of a run's rollouts, the newest step last; None where none were recorded.

    Raises:
        ValueError: a file is broken; names it.
    """
    files = transcript_files(run_dir)
    if not files:
        return None
    chosen = _spread(files, NUM_STEPS)
    steps = []
    for stage, step, path in chosen:
        prompts, count = read_transcripts(path, NUM_PROMPTS)
        shown = [_prompt(rows) for rows in prompts]
        steps.append(Step(stage, step, shown, count - len(shown), path.relative_to(run_dir).as_posix()))
    return TrainingGallery(steps, len(files) - len(chosen))


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _prompt(rows: list[dict[str, Any]]) -> Prompt:
    first = rows[0]
    # best first; those that nothing scored last, else in order
    scored = sorted((row for row in rows if is_finite(row["reward"])), key=lambda row: -row["reward"])
    unscored = [row for row in rows if not is_finite(row["reward"])]
    if len(scored) > 1 and scored[0]["reward"] > scored[-1]["reward"]:
        extremes = [_spoken(scored[0], "best"), _spoken(scored[-1], "worst")]
        rest = [*scored[1:-1], *unscored]
    else:
        extremes, rest = [_spoken(row) for row in [*scored, *unscored][:2]], [*scored, *unscored][2:]
    others = rest[: NUM_COMPLETIONS - len(extremes)]
    labels = _labels(first["prompt"], len(first["images"]))
    pictures = [
        embedded(image["bytes"] or b"", label, largest=PICTURE_PIXELS)
        for image, label in zip(first["images"][:NUM_PICTURES], labels, strict=False)
    ]
    return Prompt(
        first["sample_id"],
        first["position"],
        _cut(first["prompt"]),
        None if first["answer"] is None else _cut(first["answer"]),
        pictures,
        len(labels) - len(pictures),
        extremes,
        [_spoken(row) for row in others],
        len(rest) - len(others),
    )


def _spoken(row: dict[str, Any], rank: str = "") -> Spoken:
    number = f"completion {row['completion'] + 1}"
    figures = {name.removeprefix(PART): row[name] for name in row if name.startswith(PART)}
    figures["advantage"] = row["advantage"]
    return Spoken(
        f"{rank}: {number}" if rank else number,
        rank,
        row["reward"] if is_finite(row["reward"]) else None,
        {name: value for name, value in figures.items() if is_finite(value)},
        row["num_tokens"],
        row["ended"],
        split_completion(_cut(row["text"])),
    )


def _labels(prompt: str, count: int) -> Sequence[str]:
    """What a prompt calls its pictures: the word before each, as in ` A<image>`; else their numbers."""
    numbers = [f"image {i + 1}" for i in range(count)]
    before = prompt.split(IMAGE_MARKER)[:-1]
    if len(before) != count:  # the text has markers of its own
        return numbers
    names = [text.strip().rstrip(":").strip("()[]") for text in before]
    return [
        name if 0 < len(name) <= LABEL_CHARACTERS and "\n" not in name else number
        for name, number in zip(names, numbers, strict=True)
    ]


def _cut(text: str) -> str:
    left_out = len(text) - NUM_CHARACTERS
    if left_out <= 0:
        return text
    half = NUM_CHARACTERS // 2
    return f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
