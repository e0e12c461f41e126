"""A run's figures: metrics.jsonl, TensorBoard and W&B by choice, a progress line, seconds and memory."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from geo_r1.errors import UserError
from geo_r1.files import naming_file, write_text
from geo_r1.train.recipe.run_sections import LogConfig

SECONDS_BETWEEN_LINES = 15.0  # where the output is no terminal


class Log:
    """Metrics and progress of the main rank; does nothing on the others.

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
                raise UserError("log.wandb needs the wandb package: pip install '.[wandb]'") from None
            digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()  # the same when it goes on
            self.wandb = wandb.init(
                project=config.project, name=run_dir.name, id=digest[:16], config=recipe, resume="allow"
            )

    def rewind(self, stage: str, step: int) -> None:
        """Delete a stage's figures after `step` steps, and a line that a killed run left half-written."""
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
        with naming_file(self.path), self.path.open("a", encoding="utf-8") as file:
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
            figures = TextColumn("{task.fields[figures]}")
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, figures, console=self.console)
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
        """Show another progress line for a while. Yields a function that sets its number of done items."""
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
