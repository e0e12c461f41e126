"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B by choice, and a progress line."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from geo_r1.files import write_text
from geo_r1.train.recipe.run_sections import LogConfig

SECONDS_BETWEEN_LINES = 15.0  # where the output is no terminal


class Log:
    """Metrics and progress of the main rank; on the others it does nothing.

    Args:
        run_dir: holds metrics.jsonl and tensorboard/.
        config: which services to write to.
        enabled: True on the main rank.
    """

    def __init__(self, run_dir: Path, config: LogConfig, enabled: bool, recipe: dict[str, Any]) -> None:
        self.enabled = enabled
        self.path = run_dir / "metrics.jsonl"
        self.console = Console(quiet=not enabled)
        self.progress: Progress | None = None
        self.last_line = 0.0
        self.tensorboard = None
        self.wandb = None
        if enabled and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        if enabled and config.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("log.wandb needs the wandb package: pip install '.[wandb]'") from None
            name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[
                :16
            ]  # the same when it goes on
            self.wandb = wandb.init(
                project=config.project, name=run_dir.name, id=name, config=recipe, resume="allow"
            )

    def rewind(self, stage: str, step: int) -> None:
        """Forget a stage's figures after `step` steps, and a line that a killed run left half-written."""
        if not self.enabled or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["stage"] != stage or row["step"] <= step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record the figures of a stage's n-th step everywhere; n counts from 1."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(f"{stage}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"{stage}/{name}": value for name, value in metrics.items()})

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a progress line."""
        self.last_line = time.monotonic()
        if self.enabled and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self.progress.add_task(what, total=total, completed=done, figures="")
            self.progress.start()

    def advance(self, what: str, done: int, total: int, figures: str) -> None:
        """Move the progress line; without a terminal, print one now and then."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, figures=figures)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or done == total:
            self.last_line = time.monotonic()
            self.say(f"{what} {done}/{total}  {figures}")

    @contextmanager
    def aside(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress line of its own; the one that was there comes back after it. Yields what moves it."""
        before = self.progress
        if before is not None:
            before.stop()
        self.start(what, total)
        try:
            yield lambda done: self.advance(what, done, total, "")
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
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
