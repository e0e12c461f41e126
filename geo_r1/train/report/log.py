"""A run's figures and its console: metrics.jsonl, services by choice, progress with the time left."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from geo_r1.errors import UserError, one_line
from geo_r1.files import write_text
from geo_r1.train.recipe.run_sections import LogConfig
from geo_r1.train.report.about import About
from geo_r1.train.report.metrics import read_lines
from geo_r1.train.report.services import NUM_PROMPTS, Service, TensorBoard, WandB, shown
from geo_r1.train.report.transcripts import FOLDER, Transcript, write_transcripts

SECONDS_BETWEEN_LINES = 15.0  # where the output is no terminal
SECONDS_OF_SPEED = 3600.0  # the time left is estimated from the steps of the last hour

T = TypeVar("T")


class Log:
    """Metrics and progress of the main rank; does nothing on the others.

    Only metrics.jsonl has to be written. What a run can do without (services, rollouts, report) is said once
    where it fails, and the run goes on.

    Args:
        run_dir: holds metrics.jsonl and tensorboard/.
        config: which services to write to.
        enabled: True on the main rank.
    """

    def __init__(self, run_dir: Path, config: LogConfig, enabled: bool, recipe: dict[str, Any]) -> None:
        self.enabled, self.run_dir = enabled, run_dir
        self.path = run_dir / "metrics.jsonl"
        self.console = Console(quiet=not enabled)
        self.progress: Progress | None = None
        self.last_line = 0.0
        self.failed: set[str] = set()
        self.about: About | None = None
        self.services: list[Service] = []
        if enabled and config.tensorboard:
            file, folder = run_dir / "recipe.toml", run_dir / "tensorboard"
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            self._open(lambda: TensorBoard(folder, text), f"TensorBoard's {folder}", OSError)
        if enabled and config.wandb:
            self._open(lambda: WandB(run_dir, config.project, recipe), "Weights & Biases", Exception)

    def describe(self, facts: dict[str, Any]) -> None:
        """Keep run.json, with these facts of the session, from now on."""
        if self.enabled:
            self.about = About(self.run_dir / "run.json", facts)
            self._save_about()
            self.say(f"{self.run_dir}: {', '.join(f'{name} {fact}' for name, fact in facts.items())}")

    def rewind(self, stage: str, step: int) -> None:
        """Delete a stage's figures after `step` steps, and lines that hold no figures."""
        if not self.enabled or not self.path.exists():
            return
        rows, num_skipped = read_lines(self.path)
        if num_skipped:
            self.say(f"{self.path}: {num_skipped} lines without the figures of a step are left out")
        kept = [line for line, row in rows if row["stage"] != stage or row["step"] <= step]
        self._metrics(lambda: write_text(self.path, "".join(f"{line.decode()}\n" for line in kept)))

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record the figures of a stage's n-th step everywhere; n counts from 1.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if not self.enabled:
            return
        self._metrics(lambda: self._append(json.dumps({"stage": stage, "step": step, **metrics}) + "\n"))
        self._serve(lambda service: service.figures(stage, step, metrics))

    def rollouts(self, stage: str, step: int, transcripts: Sequence[Transcript]) -> None:
        """Record what a policy said in a step: a parquet file, and some for the services."""
        if not self.enabled or not transcripts:
            return
        folder = self.run_dir / FOLDER
        self.optional("rollouts", folder, lambda: write_transcripts(self.run_dir, stage, step, transcripts))
        if self.services:
            samples = self.optional("samples", folder, lambda: [*map(shown, transcripts[:NUM_PROMPTS])])
            if samples:
                self._serve(lambda service: service.samples(stage, step, samples))

    def result(self, row: str, summary: Mapping[str, Any]) -> None:
        """Tell the services how a finished model did on held-out samples."""
        self._serve(lambda service: service.result(row, summary))

    def optional(self, what: str, path: Path, write: Callable[[], T]) -> T | None:
        """Write something that the run can do without; if that fails, say so, once of its kind."""
        try:
            return write()
        except (OSError, UserError) as error:
            if what not in self.failed:
                self.failed.add(what)
                self.say(f"{what}: {path} cannot be written, the run goes on without: {_cause(error)}")
            return None

    def say(self, text: str) -> None:
        """Print a line above the progress line; where the output is no terminal, after date and time."""
        self._print(one_line(text))

    def start(self, what: str, total: int, done: int = 0, *, ends: bool = True) -> None:
        """Begin a progress line; without a terminal, print one, unless it is an aside without `ends`."""
        if not self.enabled:
            return
        terminal = self.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(
            *columns,
            console=self.console,
            disable=not terminal,
            speed_estimate_period=SECONDS_OF_SPEED,
        )
        self.progress.add_task(what, total=total, completed=done, figures="")
        self.progress.start()
        if ends and not terminal:
            self.last_line = time.monotonic()
            self.say(f"{what} {done}/{total}")

    def advance(self, what: str, done: int, total: int, figures: str, *, ends: bool = True) -> None:
        """Move the progress line; without a terminal, print one now and then, and at the end with `ends`."""
        if self.progress is None:
            return
        self.progress.update(self.progress.task_ids[0], completed=done, figures=figures)
        now = time.monotonic()
        if now - self.last_line > SECONDS_BETWEEN_LINES or (ends and done == total):
            self.last_line = now
            self._save_about()
            if not self.console.is_terminal:
                self._print("  ".join(filter(None, [f"{what} {done}/{total}", figures, self._left()])))

    @contextmanager
    def aside(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show another progress line for a while. Yields a function that sets its number of done items."""
        before = self.progress
        if before is not None:
            before.stop()
        self.start(what, total, ends=False)
        try:
            yield lambda done: self.advance(what, done, total, "", ends=False)
        finally:
            self.stop()
            self.progress = before
            if before is not None:
                before.start()

    def stop(self) -> None:
        """End the progress line."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def close(self) -> None:
        """Flush and leave all services."""
        self.stop()
        self._serve(lambda service: service.close())
        self._save_about()

    def _open(self, service: Callable[[], Service], name: str, errors: type[Exception]) -> None:
        try:
            self.services.append(service())
        except UserError:  # its package is missing
            raise
        except errors as error:
            self.say(f"{name} cannot be written, the run goes on without: {_cause(error)}")

    def _serve(self, call: Callable[[Service], None]) -> None:
        for service in [*self.services]:
            try:
                call(service)
            except service.errors as error:
                self.services.remove(service)
                self.say(f"{service.name} failed and gets nothing more, the run goes on: {_cause(error)}")

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _metrics(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def _print(self, line: str) -> None:
        when = "" if self.console.is_terminal else f"{datetime.now():%Y-%m-%d %H:%M:%S}  "
        self.console.print(when + line, highlight=False, markup=False, soft_wrap=True)

    def _save_about(self) -> None:
        if self.about is not None:
            self.optional("run.json", self.about.path, self.about.save)

    def _left(self) -> str:
        """The time that the steps left will take, or that all took."""
        assert self.progress is not None
        task = self.progress.tasks[0]
        seconds = task.elapsed if task.finished else task.time_remaining
        if seconds is None:
            return ""
        duration = timedelta(seconds=round(seconds))
        return f"in {duration}" if task.finished else f"{duration} left"


def _cause(error: Exception) -> str:
    """What went wrong, with its file if that is known."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclass
class Phases:
    """Seconds that a step spends in each of its phases, including the device's work that they start."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":  # once per phase, which takes far longer than the wait
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
