"""A group: one prompt and its completions, from sampling to the packed batch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from geo_r1.data import Sample
from geo_r1.models import EncodedPrompt
from geo_r1.rollout import Completion


@dataclass
class Group:
    """A prompt, N completions, and what is known about each of them. In SFT, N is 1.

    Attributes:
        sample: the row of data; None on a rank that only computes the group's share of a micro-batch.
        position: place in the training order.
        version: number of updates behind the weights that sampled the completions.
        reward: [N] total rewards, task units; None where no function scored the completion.
        by_function: [N] rewards of each reward function.
        advantage_N: [N] float32, no unit; None until it is computed, and in SFT.
    """

    sample: Sample | None
    prompt: EncodedPrompt
    completions: Sequence[Completion] = ()
    position: int = 0
    version: int = 0
    reward: list[float | None] = field(default_factory=list)
    by_function: Mapping[str, list[float | None]] = field(default_factory=dict)
    advantage_N: Tensor | None = None

    @property
    def reward_std(self) -> float:
        """Standard deviation of the rewards; exactly 0 if all are equal, when the group teaches nothing."""
        scores = [value for value in self.reward if value is not None]
        return statistics.stdev(scores) if len(scores) > 1 and min(scores) < max(scores) else 0.0

    @property
    def completion_len(self) -> list[int]:
        """[N] tokens of each completion."""
        return [len(completion.token_ids) for completion in self.completions]

    def part(self, indices: Sequence[int]) -> Group:
        """The group with only these completions and their advantages: all that a packed batch needs."""
        return replace(
            self,
            sample=None,
            completions=[self.completions[i] for i in indices],
            reward=[],
            by_function={},
            advantage_N=None if self.advantage_N is None else self.advantage_N[list(indices)],
        )
