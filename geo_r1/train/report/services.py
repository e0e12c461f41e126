"""Where figures go besides the run's folder: TensorBoard and Weights & Biases.

Each service has the same methods. One that fails is dropped by the log; the run goes on.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from geo_r1.data import load_image
from geo_r1.errors import UserError
from geo_r1.train.recipe.run_sections import STAGES
from geo_r1.train.report.transcripts import Transcript, prompt_text, utf8

NUM_PROMPTS, NUM_COMPLETIONS = 4, 4  # of a record of rollouts
SHEET_IMAGES, SHEET_HEIGHT = 12, 112  # pixels
RESULTS = ("accuracy", "well_formed", "completion_length")

Shown = tuple[str, str, Image.Image | None]  # a sample's id, its text, its images side by side


class Service(Protocol):
    """A place that figures go to."""

    name: str
    errors: ClassVar[type[Exception]]  # what its calls raise when it fails

    def figures(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a stage's n-th step."""

    def samples(self, stage: str, step: int, samples: Sequence[Shown]) -> None:
        """What a policy said in a step."""

    def result(self, row: str, summary: Mapping[str, Any]) -> None:
        """How a finished model did on held-out samples."""

    def close(self) -> None:
        """Leave the service."""


class TensorBoard:
    """Event files in the run's folder.

    Written at once: torch's SummaryWriter has a thread for that, and a full disk ends it with a traceback.
    """

    name = "TensorBoard"
    errors: ClassVar[type[Exception]] = OSError

    def __init__(self, folder: Path, recipe: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.event, self.summary = Event, summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter((folder / name).open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        self._add(0, summary.text("recipe", _block(recipe)))

    def figures(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, *(self.summary.scalar(f"{stage}/{name}", value) for name, value in metrics.items()))

    def samples(self, stage: str, step: int, samples: Sequence[Shown]) -> None:
        for number, (_, text, sheet) in enumerate(samples, 1):
            self._add(step, self.summary.text(f"{stage}/sample {number}", _block(text)))
            if sheet is not None:
                pixels = np.asarray(sheet)
                self._add(step, self.summary.image(f"{stage}/sample {number}", pixels, dataformats="HWC"))

    def result(self, row: str, summary: Mapping[str, Any]) -> None:
        self._add(0, *(self.summary.scalar(f"eval/{row}/{name}", summary[name]) for name in RESULTS))

    def close(self) -> None:
        self.records.close()

    def _add(self, step: int, *summaries: Any) -> None:
        for summary in summaries:
            self._write(self.event(step=step, summary=summary))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        self.records.flush()


class WandB:
    """A run of Weights & Biases, the same one when the run goes on. Each stage has its own steps."""

    name = "Weights & Biases"
    errors: ClassVar[type[Exception]] = Exception  # of many kinds; each call below is the library's alone

    def __init__(self, run_dir: Path, project: str, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb needs the wandb package: pip install '.[wandb]'") from None
        self.wandb = wandb
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=project, name=run_dir.name, id=name, config=dict(recipe), resume="allow"
        )
        for stage in STAGES:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.save(str(run_dir / "recipe.toml"), base_path=str(run_dir), policy="now")

    def figures(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        figures = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.run.log({f"{stage}/step": step, **figures})

    def samples(self, stage: str, step: int, samples: Sequence[Shown]) -> None:
        rows = [
            [name, None if sheet is None else self.wandb.Image(sheet), text] for name, text, sheet in samples
        ]
        table = self.wandb.Table(columns=["sample", "images", "text"], data=rows)
        self.run.log({f"{stage}/step": step, f"{stage}/samples": table})

    def result(self, row: str, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({f"eval/{row}/{name}": summary[name] for name in RESULTS})

    def close(self) -> None:
        self.run.finish()


def shown(transcript: Transcript) -> Shown:
    """A sample's id, its prompt with some completions and their rewards, and its images side by side.

    Raises:
        UserError: an image can no longer be read.
    """
    sample = transcript.sample
    said = zip(transcript.reward, transcript.texts, strict=True)
    lines = [utf8(sample.id), "", prompt_text(sample.messages), f"true answer: {sample.answer}"]
    for reward, text in list(said)[:NUM_COMPLETIONS]:
        lines += ["", "no reward" if reward is None else f"reward {reward:.3g}", text]
    images = [load_image(image, sample.id) for image in sample.images[:SHEET_IMAGES]]
    return utf8(sample.id), utf8("\n".join(lines)), _sheet(images)


def _sheet(images: Sequence[Image.Image]) -> Image.Image | None:
    if not images:
        return None
    scaled = [
        image.resize(
            (max(1, round(image.width * SHEET_HEIGHT / image.height)), SHEET_HEIGHT),
            Image.Resampling.NEAREST if image.height < SHEET_HEIGHT else Image.Resampling.LANCZOS,
        )
        for image in images
    ]
    sheet = Image.new("RGB", (sum(image.width + 4 for image in scaled) - 4, SHEET_HEIGHT), "white")
    left = 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width + 4
    return sheet


def _block(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
