"""Where the time of a training step goes.

    vision     packing, token embeddings and the vision tower, forward
    text       the text layers, forward
    loss       language head and loss, forward; our fused loss computes their gradients here, too
    backward   all other gradients

They follow one another and leave nothing out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

PHASES = ("vision", "text", "loss", "backward")


class PhaseClock:
    """Notes when each phase of each step ends: on a GPU events in its stream, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps: list[dict[str, Any]] = []

    def start(self) -> None:
        self.steps.append({"start": self._now()})

    def end(self, phase: str) -> None:
        self.steps[-1][phase] = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def shares(self, num_steps: int) -> dict[str, float]:
        """Each phase's share of the time of the last steps; 0 for one that they did not have."""
        between: Callable[[Any, Any], float] = (
            (lambda begin, end: begin.elapsed_time(end)) if self.on_gpu else lambda begin, end: end - begin
        )
        spent = dict.fromkeys(PHASES, 0.0)
        for step in self.steps[-num_steps:]:
            begin = step["start"]
            for phase in PHASES:
                if phase in step:
                    spent[phase] += between(begin, step[phase])
                    begin = step[phase]
        total = sum(spent.values())
        return {phase: seconds / total for phase, seconds in spent.items()}
