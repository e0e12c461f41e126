"""Compare recipes that differ in one thing: `python -m geo_r1.train.ablate recipes/ablations_world.toml`.

A TOML file names a recipe, changes for all runs, and the variants:

    recipe = "world.toml"                    # beside this file
    dir = "runs/ablations"
    set = { "grpo.steps" = 60 }              # for all

    [[variant]]
    name = "no length reward"
    group = "rewards"                        # heading in the table and the plot
    start = "Geo-R1/sft"                     # goes on from that variant's model instead of training one again
    set = { "rewards.weights" = { length = 0 } }

Each variant is a run of the trainer in a folder of its own, one after the other. A finished run is not
repeated, and one that was stopped goes on. After each, the comparison so far is written: ablations.md, .json
and .png.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import Field, ValidationError, field_validator

from geo_r1.errors import UserError, exit_code_of, one_line
from geo_r1.files import write_text, written_beside
from geo_r1.train.recipe.load import decisive, find_recipe, first_difference, load_recipe, read_toml
from geo_r1.train.recipe.run_sections import STAGES, Section, Stage
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.report.plots import PALETTE

TRAINER = "geo_r1.train"
COLUMNS = ("variant", "chance", "before GRPO", "after GRPO", "95 % interval", "mean length", "well formed")

FIGURES = {"accuracy", "accuracy_interval", "chance", "completion_length", "well_formed"}


class Variant(Section):
    """One run, and its place in the comparison."""

    name: str
    group: str
    start: str | None = None
    """`variant/stage`: a model of an earlier variant; by default, the recipe's own."""
    stages: tuple[Stage, ...] | None = None
    """By default the recipe's stages after `start`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe, with dots, and their values."""

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Ablations(Section):
    """A comparison: what its runs share, and its variants."""

    recipe: Path
    dir: Path
    set: dict[str, Any] = Field(default_factory=dict)
    variant: Annotated[tuple[Variant, ...], Field(min_length=1)]

    @field_validator("variant")
    @classmethod
    def _distinct(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        folders = [variant.folder for variant in variants]
        for variant, folder in zip(variants, folders, strict=True):
            if not folder or folders.count(folder) > 1:
                raise ValueError(
                    f"the variant {variant.name!r} needs a name of its own, in letters or digits"
                )
        return variants


@dataclass(frozen=True)
class Planned:
    """A variant's run: its arguments to the trainer, and the recipe that they make."""

    variant: Variant
    arguments: list[str]
    recipe: Recipe

    @property
    def summary(self) -> dict[str, Any] | None:
        """Figures by model, once the run has ended.

        Raises:
            UserError: the file is damaged, or its run had another recipe.
        """
        path = self.recipe.run.dir / "summary.json"
        if not path.is_file():
            return None
        try:
            made = Recipe(**read_toml(path.parent / "recipe.toml"))
            figures = json.loads(path.read_text(encoding="utf-8"))
            rows = figures.values() if isinstance(figures, dict) else ()
            if not rows or not all(isinstance(row, dict) and row.keys() >= FIGURES for row in rows):
                raise ValueError(f"{path.name} lacks {', '.join(sorted(FIGURES))} of a model")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path.parent} is no whole run: {error}; delete it") from error
        if changed := first_difference(_decisive(made), _decisive(self.recipe), ""):
            raise UserError(f"{path.parent} was made with {changed}; give another --dir, or delete it")
        return figures


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """The values that a run's figures depend on: those that decide its models, its stages, its evaluation."""
    values = decisive(recipe)
    values["run"]["stages"] = list(recipe.run.stages)
    return values | {"eval": recipe.eval.model_dump(mode="json")}


def plan(file: Path, folder: Path | None = None, more: Sequence[str] = ()) -> list[Planned]:
    """Every run of a comparison, checked before the first one starts.

    Args:
        folder: in place of the file's `dir`.
        more: arguments for all runs, such as `--run.threads 1`.

    Raises:
        UserError: the file is missing, malformed, or one of its recipes is wrong; names the variant.
    """
    try:
        ablations = Ablations(**read_toml(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
    folder = ablations.dir if folder is None else folder
    planned: dict[str, Planned] = {}
    for variant in ablations.variant:
        changes = {**ablations.set, **variant.set, "run.dir": str(folder / variant.folder)}
        where = f"{file}: variant {variant.name!r}"
        if variant.start is not None:
            before, _, stage = variant.start.rpartition("/")
            if before not in planned or stage not in planned[before].recipe.run.stages[:-1]:
                known = [f"{name}/{s}" for name, p in planned.items() for s in p.recipe.run.stages[:-1]]
                found = f"before it there are {', '.join(known) or 'no models'}"
                raise UserError(f"{where} starts from {variant.start!r}; {found}")
            made = planned[before].recipe.run
            changes["model.path"] = str(made.dir / "models" / stage)
            changes["run.stages"] = [s for s in made.stages if s in STAGES[STAGES.index(stage) + 1 :]]
        if variant.stages is not None:
            changes["run.stages"] = list(variant.stages)
        texts = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()
        }
        options = [f"--{key}={text}" for key, text in texts.items()]
        arguments = [str(file.parent / ablations.recipe), *options, *more]
        try:
            recipe = load_recipe(arguments)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if recipe.run.stages[-1] != "eval":
            raise UserError(f"{where} does not end with eval")
        planned[variant.name] = Planned(variant, arguments, recipe)
    return list(planned.values())


def run_all(planned: Sequence[Planned], folder: Path, launch: Sequence[str]) -> None:
    """Run what has no summary yet; write the comparison after each.

    Raises:
        UserError: a run did not finish; the same command goes on with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(planned, 1):
        name = run.variant.name
        if run.summary is None:
            print(one_line(f"geo_r1: {name} ({number} of {len(planned)})"), flush=True)
            code = _run([*launch, TRAINER, *run.arguments])
            if code or run.summary is None:  # a run that was asked to stop has exit code 0
                raise UserError(
                    f"the run of {name!r} ended before its evaluation (exit code {code}); "
                    "the same command goes on with it"
                )
        write_comparison([run for run in planned if run.summary is not None], folder)
    print(one_line(f"geo_r1: comparison: {folder / 'ablations.md'}, {folder / 'ablations.png'}"))


def _run(command: Sequence[str]) -> int:
    """Run a command to its end. A request to stop is passed on, and the command stops when it is ready."""
    with subprocess.Popen(command) as child:
        before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child, too
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, interrupted)


def rows_of(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """One row per finished variant: figures of its last model, and the accuracy before GRPO."""
    rows = []
    for run in planned:
        summary = run.summary
        assert summary is not None
        model = next(stage for stage in ("grpo", "sft", "base") if stage in summary)
        earlier = [stage for stage in ("sft", "base") if stage in summary and model == "grpo"]
        before = summary[earlier[0]]["accuracy"] if earlier else None
        own = {"variant": run.variant.name, "group": run.variant.group, "model": model, "before": before}
        rows.append({**own, **summary[model]})
    return rows


def _by_group(rows: Sequence[dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
    """Each group's name, then its rows."""
    for group in dict.fromkeys(row["group"] for row in rows):
        yield group
        yield from (row for row in rows if row["group"] == group)


def write_comparison(planned: Sequence[Planned], folder: Path) -> None:
    """Write `ablations.json`, `.md` and `.png` of the variants that have ended."""
    rows = rows_of(planned)
    write_text(folder / "ablations.json", json.dumps(rows, indent=2))
    write_text(folder / "ablations.md", markdown(rows))
    with written_beside(folder / "ablations.png") as partial:
        draw(rows).savefig(partial, dpi=160, format="png")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a table, with a line for each group's name."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for row in _by_group(rows):
        name = (row if isinstance(row, str) else row["variant"]).replace("|", "\\|")
        if isinstance(row, str):
            lines.append(f"| **{name}** |" + " |" * (len(COLUMNS) - 1))
            continue
        low, high = row["accuracy_interval"]
        before = "" if row["before"] is None else f"{row['before']:.1%}"
        shares = f"{row['chance']:.1%} | {before} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%}"
        lines.append(f"| {name} | {shares} | {row['completion_length']:.1f} | {row['well_formed']:.1%} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A line per variant: its accuracy with the interval, a ring for before GRPO, a tick for guessing."""
    lines = list(_by_group(rows))
    figure = Figure(figsize=(7.2, 0.7 + 0.26 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    ink, grey, color = "#20242b", "#8a9099", PALETTE[0]
    for y, line in enumerate(lines):
        if isinstance(line, str):
            continue
        accuracy, (low, high) = 100 * line["accuracy"], line["accuracy_interval"]
        errors = [[accuracy - 100 * low], [100 * high - accuracy]]
        axes.errorbar(accuracy, y, xerr=errors, fmt="o", color=color, markersize=5, linewidth=1.4)
        axes.plot(100 * line["chance"], y, "|", color=grey, markersize=9)
        if line["before"] is not None:
            axes.plot(100 * line["before"], y, "o", color=color, markerfacecolor="white", markersize=5)
    names = [line if isinstance(line, str) else line["variant"] for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8.5)
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
        label.set_color(ink)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy on held-out cities, %", fontsize=8.5, color=ink)
    marks = [
        Line2D([], [], marker="o", color=color, label="with its 95 % interval"),
        Line2D([], [], marker="o", color=color, markerfacecolor="white", linewidth=0, label="before GRPO"),
        Line2D([], [], marker="|", color=grey, linewidth=0, markersize=9, label="guessing"),
    ]
    axes.legend(handles=marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5, color="#c9cdd4")
    axes.grid(axis="x", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd4")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m geo_r1.train.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments go to every run: --run.threads 1",
    )
    parser.add_argument("file", help="TOML file of the comparison, or ablations_world")
    parser.add_argument("--dir", type=Path, help="folder of the runs, in place of the file's")
    parser.add_argument("--launch", default=f"{shlex.quote(sys.executable)} -m", metavar="COMMAND",
                        help="what starts a module: 'torchrun --nproc-per-node 8 -m'")  # fmt: skip
    options, more = parser.parse_known_args(argv)

    def compare() -> None:
        planned = plan(find_recipe(options.file), options.dir, more)
        try:
            run_all(planned, planned[0].recipe.run.dir.parent, shlex.split(options.launch))
        except OSError as error:  # a folder that cannot be written, a launcher that does not exist
            raise UserError(f"{error.filename}: {error.strerror}") from error

    return exit_code_of(compare)


if __name__ == "__main__":
    sys.exit(main())
