"""The eval stage: every model of the run on held-out samples, a table, a gallery."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.table import Table

from geo_r1.data import Sample, load_image
from geo_r1.data.decoding import ImageError
from geo_r1.data.source import Source
from geo_r1.eval.cross_view import Prediction, predict, summarise
from geo_r1.files import write_text
from geo_r1.models import PackedVLM
from geo_r1.train.context import RunContext
from geo_r1.train.report.transcripts import prompt_text
from geo_r1.train.rl.scoring import Scorer


def evaluate_model(context: RunContext, vlm: PackedVLM, row: str, source: Source) -> dict[str, Any]:
    """Evaluate a model as one row of the table; writes eval/<row>/ and returns its summary.

    Args:
        vlm: whole on every rank.
    """
    config = context.recipe.eval
    count = _count(source, config.num_samples)
    predictions = _predict(context, vlm, source, count, f"eval {row}")
    summary = summarise(predictions)
    if context.ranks.is_main:
        folder = context.run_dir / "eval" / row
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / "predictions.jsonl", map(_record, predictions))
        shown = [source.sample(index) for index in range(min(config.gallery, count))]
        _write_lines(folder / "gallery.jsonl", _gallery(context, shown, predictions))
        write_text(folder / "summary.json", json.dumps(summary, indent=2))
        context.log.result(row, summary)
    context.ranks.barrier()
    return summary


def validate(
    context: RunContext, vlm: PackedVLM, stage: str, source: Source
) -> tuple[dict[str, float], float]:
    """Figures of a model in training on the first held-out samples, and its accuracy; writes nothing."""
    config = context.recipe.eval
    count = _count(source, config.every_num_samples or config.num_samples)
    summary = summarise(_predict(context, vlm, source, count, f"{stage}: eval"))
    figures = {name: float(summary[name]) for name in ("accuracy", "well_formed", "completion_length")}
    context.log.say(f"{stage}: accuracy {figures['accuracy']:.1%} on {count} held-out samples")
    return figures, figures["accuracy"]


def _count(source: Source, wanted: int) -> int:
    return min(size for size in (wanted, source.size) if size)


def _predict(context: RunContext, vlm: PackedVLM, source: Source, count: int, what: str) -> list[Prediction]:
    """Predictions of the first `count` samples, each made by one rank, on every rank."""
    config = context.recipe.eval
    samples = [source.sample(index) for index in context.ranks.share(count)]
    with context.ranks.together(), context.log.aside(what, len(samples)) as advance:
        mine = predict(
            vlm,
            context.tokenizer,
            context.encoder,
            samples,
            max_new_tokens=config.max_new_tokens,
            max_tokens=config.max_tokens,
            progress=advance,
        )
    shares = context.ranks.gather(mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def write_summary(context: RunContext, rows: dict[str, dict[str, Any]]) -> None:
    """Write summary.json, a summary by row, and print the table."""
    write_text(context.run_dir / "summary.json", json.dumps(rows, indent=2))
    table = Table(title=f"Cross-view pairing, held out (chance {rows['base']['chance']:.0%})")
    for column in ("model", "accuracy", "95 % interval", "mean length", "well formed", "samples"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        low, high = row["accuracy_interval"]
        table.add_row(
            name,
            f"{row['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['completion_length']:.1f}",
            f"{row['well_formed']:.1%}",
            str(row["num_samples"]),
        )
    context.log.console.print(table)


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _record(prediction: Prediction) -> dict[str, Any]:
    read = {
        name: prediction.record[name] for name in ("city", "answer", "prediction", "correct", "well_formed")
    }
    said = {"completion": prediction.text, "completion_length": len(prediction.completion.token_ids)}
    return {"id": prediction.id, **read, **said}


def _label(index: int, num_images: int, prediction: Prediction) -> str:
    """What an image is called: a panorama and as many tiles as choices, or just a number."""
    if num_images != prediction.record["num_choices"] + 1:
        return f"image {index + 1}"
    return ascii_uppercase[index - 1] if index else "panorama"


def _gallery(
    context: RunContext, samples: list[Sample], predictions: list[Prediction]
) -> Iterable[dict[str, Any]]:
    if not samples:
        return
    told = predictions[: len(samples)]
    with closing(Scorer(context)) as scorer:
        table = scorer.score(samples, [[p.completion] for p in told], [[p.text] for p in told])
    folder = context.run_dir / "eval" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (sample, prediction) in enumerate(zip(samples, told, strict=True)):
        paths = []
        for index, image in enumerate(sample.images):
            path = folder / f"{number:03d}_{index}.png"
            try:
                load_image(image, sample.id, root=sample.image_root).save(path)
            except ImageError:  # the sample was skipped as bad
                continue
            paths.append(path.relative_to(context.run_dir).as_posix())
        rewards = {name: values[number] for name, values in table.per_function.items()}
        yield _record(prediction) | {
            "prompt": prompt_text(sample.messages),
            "images": paths,
            "labels": [_label(index, len(paths), prediction) for index in range(len(paths))],
            "rewards": {name: value for name, value in rewards.items() if value is not None},
        }
