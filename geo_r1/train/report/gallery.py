"""The report's part on training: prompts of a few steps, and what the policy answered to them.

    read:    rollouts/<stage>-<step>.parquet

A run may have recorded far more than a page that is mailed can hold. The page shows a few steps from first to
newest, a few prompts of each, and the best, the worst and some other completions of a prompt. It says how
many more there are, and where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geo_r1.data.messages import IMAGE_MARKER
from geo_r1.eval.benchmark import is_finite
from geo_r1.train.report.embedded import embedded, split_completion
from geo_r1.train.report.transcripts import PART, read_transcripts, transcript_files

# With as many photographs and as long texts as these allow, the page has 7 MB.
NUM_STEPS = 6
NUM_PROMPTS = 2  # per step
NUM_COMPLETIONS = 8  # per prompt
NUM_IMAGES = 7  # per prompt
IMAGE_PIXELS = 512  # the longer side
NUM_CHARACTERS = 8_000  # per text; the middle of a longer one is left out
LABEL_CHARACTERS = 24  # longer text before an image is not its name


def read_training_gallery(run_dir: Path) -> dict[str, Any] | None:
    """The part of a run's rollouts that the page shows, the newest step last; None if none were recorded.

    The keys are those of the template; `left_out` counts steps, prompts or completions that are not shown.

    Raises:
        UserError: a file is broken; names it.
    """
    files = transcript_files(run_dir)
    if not files:
        return None
    chosen = files
    if len(files) > NUM_STEPS:  # evenly spaced, the first and the last among them
        chosen = [files[round(i * (len(files) - 1) / (NUM_STEPS - 1))] for i in range(NUM_STEPS)]
    steps = []
    for stage, step, path in chosen:
        prompts, count = read_transcripts(path, NUM_PROMPTS)
        steps.append(
            {
                "stage": stage,
                "step": step,
                "prompts": [_prompt(rows) for rows in prompts],
                "left_out": count - len(prompts),
                "file": path.relative_to(run_dir).as_posix(),
            }
        )
    return {"steps": steps, "left_out": len(files) - len(chosen)}


def _prompt(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A prompt with its best and worst completion and some others."""
    first = rows[0]
    # best first; rows without a reward last, else in order
    scored = sorted((row for row in rows if is_finite(row["reward"])), key=lambda row: -row["reward"])
    ordered = [*scored, *(row for row in rows if not is_finite(row["reward"]))]
    if len(scored) > 1 and scored[0]["reward"] > scored[-1]["reward"]:
        extremes = [_spoken(scored[0], "best"), _spoken(scored[-1], "worst")]
        rest = [row for row in ordered if row is not scored[0] and row is not scored[-1]]
    else:
        extremes, rest = [_spoken(row) for row in ordered[:2]], ordered[2:]
    others = [_spoken(row) for row in rest[: NUM_COMPLETIONS - len(extremes)]]
    labels = _labels(first["prompt"], len(first["images"]))
    images = [
        embedded(image["bytes"] or b"", label, largest=IMAGE_PIXELS)
        for image, label in zip(first["images"][:NUM_IMAGES], labels, strict=False)
    ]
    return {
        "id": first["sample_id"],
        "position": first["position"],
        "text": _cut(first["prompt"]),
        "answer": None if first["answer"] is None else _cut(first["answer"]),
        "images": images,
        "images_left_out": len(labels) - len(images),
        "extremes": extremes,
        "others": others,
        "left_out": len(rest) - len(others),
    }


def _spoken(row: dict[str, Any], rank: str = "") -> dict[str, Any]:
    """A completion that is the "best", the "worst" or neither, with its rewards by function."""
    number = f"completion {row['completion'] + 1}"
    figures = {name.removeprefix(PART): row[name] for name in row if name.startswith(PART)}
    figures["advantage"] = row["advantage"]
    return {
        "name": f"{rank}: {number}" if rank else number,
        "rank": rank,
        "reward": row["reward"] if is_finite(row["reward"]) else None,
        "figures": {name: value for name, value in figures.items() if is_finite(value)},
        "length": row["num_tokens"],
        "ended": row["ended"],
        "parts": split_completion(_cut(row["text"])),
    }


def _labels(prompt: str, count: int) -> list[str]:
    """A prompt's names for its images: the word before each, as in ` A<image>`; else their numbers."""
    labels = [f"image {i + 1}" for i in range(count)]
    before = prompt.split(IMAGE_MARKER)[:-1]
    for i, text in enumerate(before if len(before) == count else ()):  # else the text has markers of its own
        name = text.strip().rstrip(":").strip("()[]")
        if 0 < len(name) <= LABEL_CHARACTERS and "\n" not in name:
            labels[i] = name
    return labels


def _cut(text: str) -> str:
    left_out, half = len(text) - NUM_CHARACTERS, NUM_CHARACTERS // 2
    if left_out <= 0:
        return text
    return f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
