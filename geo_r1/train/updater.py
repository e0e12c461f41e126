"""The optimiser's step, its schedule, and what happens when a step is not finite."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from geo_r1.errors import UserError
from geo_r1.files import written_beside
from geo_r1.models import PackedBatch
from geo_r1.train.context import RunContext
from geo_r1.train.parallel.optim import build_optimizer, set_learning_rate
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import OptimConfig


@dataclass
class Progress:
    """How far a stage has come.

    Together with weights and optimiser this decides the rest of the stage: samples and random streams are
    functions of these numbers and the seed.

    Attributes:
        step: steps taken.
        drawn: positions of the training order that were used.
        bad_steps: steps skipped because a loss or a gradient was not finite.
        pending: rollouts drawn for later steps (see `RolloutQueue.state`); up to date in a checkpoint only.
    """

    step: int = 0
    drawn: int = 0
    bad_steps: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)


class Updater:
    """A policy's optimiser and its schedule; skips and counts steps that are not finite.

    Attributes:
        num_updates: calls of `apply` that changed weights.
    """

    def __init__(
        self, context: RunContext, stage: str, policy: Policy, config: OptimConfig, num_steps: int
    ) -> None:
        self.context, self.stage, self.policy = context, stage, policy
        self.config, self.num_steps = config, num_steps
        self.progress = Progress()
        self.num_updates = 0
        self.optimizer = policy.attach(build_optimizer(policy.vlm.model, config), config.max_grad_norm)

    def apply(self, loss: float, micro_batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Clip and update; returns `grad_norm` and `learning_rate`.

        If the loss or the gradient is not finite, nothing changes; the step is counted and its batch saved.

        Args:
            loss: of the step, over all ranks.
            micro_batches: this rank's batches, from which the gradient came.

        Raises:
            UserError: more than `run.max_bad_steps` steps were not finite.
        """
        rate = set_learning_rate(self.optimizer, self.config, self.progress.step, self.num_steps)
        norm = self.policy.update(self.optimizer, self.config.max_grad_norm, math.isfinite(loss))
        if math.isfinite(loss) and math.isfinite(norm):
            self.num_updates += 1
        else:
            self._count_bad_step(loss, norm, micro_batches)
        figures = {"grad_norm": norm, "learning_rate": rate}
        return figures | ({"bad_steps": float(self.progress.bad_steps)} if self.progress.bad_steps else {})

    def _count_bad_step(self, loss: float, norm: float, micro_batches: Sequence[PackedBatch]) -> None:
        context, step = self.context, self.progress.step + 1
        self.progress.bad_steps += 1
        folder = context.run_dir / "bad"
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.stage}-{step:06d}-rank{context.ranks.rank}.pt"
        buffer = io.BytesIO()  # on a file, torch hides a full disk behind "unexpected pos"
        torch.save([batch.tensors() for batch in micro_batches], buffer)
        with written_beside(file) as partial:
            partial.write_bytes(buffer.getvalue())
        what = f"step {step}: loss {loss}, gradient {norm}"
        context.log.say(f"{self.stage} {what}: skipped; its batch is in {folder}")
        if self.progress.bad_steps > context.recipe.run.max_bad_steps:
            raise UserError(
                f"{self.stage} {what}: {self.progress.bad_steps} steps were not finite, run.max_bad_steps is "
                f"{context.recipe.run.max_bad_steps}; lower the learning rate or check the rewards. Their "
                f"batches are in {folder}"
            )
