"""The run report: one page without scripts or requests that shows what a run learned and how.

    run folder:  run.json  recipe.toml  metrics.jsonl  summary.json  eval/<row>/gallery.jsonl  eval/images/
                 rollouts/<stage>-<step>.parquet
    written:     report.html  plots/*.png

Plots enter the page as SVG and images as they are on disk, both as data URIs, so that the file can be
mailed. Completions are untrusted text: the template escapes everything, and a content security policy in its
head forbids everything but inline style and inline images.
"""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from geo_r1.errors import UserError
from geo_r1.eval.benchmark import is_finite
from geo_r1.files import written_beside
from geo_r1.train.report.about import read_about
from geo_r1.train.report.embedded import embedded, split_completion, views
from geo_r1.train.report.gallery import read_training_gallery
from geo_r1.train.report.metrics import read_metrics
from geo_r1.train.report.plots import draw_plots, svg_of

STAGE_ORDER = ("base", "pretrain", "sft", "grpo")
GALLERY_FIELDS = ("id", "images", "labels", "answer", "correct", "completion")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `plots/*.png` from whatever a run folder holds so far; return its path.

    Every part is optional: a run that was killed or has not reached GRPO gets the parts it has data for.
    The page counts the lines of `metrics.jsonl` that hold no figures; a gallery may end in half a line.
    Values that are not finite numbers are left out of the plots.

    Args:
        run_dir: the run folder; its name is the title. The report is replaced in one move.

    Raises:
        UserError: `run_dir` is no folder; a line of a gallery other than the last is unreadable or lacks a
            field; `summary.json` is not a JSON object; a file of rollouts is broken. The message names the
            file and the line.
        OSError: a file cannot be written; the plots come after the page.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected the folder of a run, found no folder there")
    metrics, num_skipped = read_metrics(run_dir / "metrics.jsonl")
    summary = _read_summary(run_dir / "summary.json")
    chance = next((row["chance"] for row in summary.values() if "chance" in row), None)
    recipe = run_dir / "recipe.toml"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = draw_plots(metrics, chance=chance)
    environment.filters["views"] = views
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.1f} %"
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        about=_about(read_about(run_dir / "run.json")),
        stages={stage: max(steps) for stage, steps in metrics.items()},
        num_skipped=num_skipped,
        rows=summary,
        chance=chance,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        plots=[(figure.get_suptitle(), svg_of(figure)) for figure in figures.values()],
        samples=read_gallery(run_dir, order=[*summary, *STAGE_ORDER]),
        training=read_training_gallery(run_dir),
    )
    report = run_dir / "report.html"
    with written_beside(report) as partial:
        # A lone surrogate is legal in JSON and not in UTF-8: it becomes a question mark.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
    for name, figure in figures.items():
        (run_dir / "plots").mkdir(exist_ok=True)
        figure.savefig(run_dir / "plots" / f"{name}.png", dpi=160)
    return report


def _about(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what is known about a run."""
    found: dict[str, str] = {"started": facts.get("started", "").replace("T", " ")}
    if "seconds" in facts:
        found["ran for"] = f"{timedelta(seconds=round(facts['seconds']))}"
        if facts.get("sessions", 1) > 1:
            found["ran for"] += f", in {facts['sessions']} sessions"
    found["code"], found["hardware"] = facts.get("code", ""), facts.get("hardware", "")
    counts = [
        f"{facts[key]} {key[:-1]}{'s' * (facts[key] != 1)}" for key in ("ranks", "threads") if key in facts
    ]
    found["ranks"] = ", ".join(counts) + " each" * (facts.get("ranks", 1) > 1)
    found["versions"] = facts.get("versions", "")
    return [(name, value) for name, value in found.items() if value]


def read_gallery(run_dir: Path, *, order: list[str]) -> list[dict[str, Any]]:
    """Join `eval/<row>/gallery.jsonl` of all rows: samples with their images, and an attempt per row.

    `order` names the rows from first to last; others follow by name. Raises UserError as `write_report`.
    """
    samples: dict[str, dict[str, Any]] = {}
    galleries = (run_dir / "eval").glob("*/gallery.jsonl")
    for path in sorted(galleries, key=lambda path: _rank(path.parent.name, order)):
        for number, record in _read_lines(path):
            missing = [field for field in GALLERY_FIELDS if field not in record]
            if missing:
                raise UserError(f"{path}, line {number}: the sample lacks {', '.join(missing)}")
            if len(record["images"]) != len(record["labels"]):
                found = f"{len(record['images'])} images, {len(record['labels'])} labels"
                raise UserError(f"{path}, line {number}: expected a label an image, found {found}")
            if (name := record["id"]) not in samples:
                files = zip(record["images"], record["labels"], strict=True)
                images = [embedded(run_dir / file, label) for file, label in files]
                samples[name] = {
                    "id": name,
                    "city": record.get("city") or "",
                    "answer": record["answer"],
                    "question": record.get("prompt") or "",
                    "images": images,
                    "attempts": [],
                }
            samples[name]["attempts"].append(_attempt(path.parent.name, record))
    return list(samples.values())


def _attempt(row: str, record: dict[str, Any]) -> dict[str, Any]:
    """The answer of one row (base, sft, grpo) to a sample."""
    rewards = record.get("rewards") or {}
    return {
        "row": row,
        "prediction": record.get("prediction"),
        "correct": bool(record["correct"]),
        "parts": split_completion(record["completion"]),
        "rewards": {name: value for name, value in rewards.items() if is_finite(value)},
        "length": record.get("completion_length"),
    }


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object); a killed run may have left half a line at the end."""
    lines = path.read_bytes().rstrip().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r}") from error
        if record:
            yield number, record


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON object, found unreadable JSON: {error}") from error
    if not isinstance(summary, dict) or not all(isinstance(row, dict) for row in summary.values()):
        raise UserError(f"{path}: expected a JSON object of rows, found {str(summary)[:80]}")
    return summary


def _rank(name: str, order: list[str] | tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
