"""Sources of samples by index: a finite file, or the endless procedural world."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from geo_r1.data.sample import Sample
from geo_r1.errors import UserError


@dataclass(frozen=True, eq=False)
class Source:
    """Samples by index.

    Attributes:
        sample: index -> sample, the same at every call. For an endless source it must pickle, as module
            functions, their partials and `exemplars.Numbered` do.
        size: the number of samples; None for an endless source.
        difficulty: one number per sample, in any unit; if given, the first epoch goes from easy to hard.
        bad: why rows of its file are left out, by file and row.
    """

    sample: Callable[[int], Sample]
    size: int | None
    difficulty: tuple[float, ...] | None = None
    bad: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, samples: Sequence[Sample], curriculum: bool = False, bad: Mapping[str, str] | None = None
    ) -> Source:
        """A source with these samples.

        Args:
            curriculum: go from easy to hard in the first epoch, by the column `difficulty`.

        Raises:
            UserError: a sample's `difficulty` is missing or not a number; names the sample.
        """
        difficulty = tuple(map(_difficulty, samples)) if curriculum else None
        return cls(samples.__getitem__, len(samples), difficulty, bad or {})

    def draw(self, position: int, seed: int) -> Sample:
        """The sample at a position of the training order.

        Every epoch of a file has its own shuffle. With difficulties, the first epoch goes from easy to hard,
        and only equally hard samples are shuffled. The order depends on the seed alone, so a resumed run
        and any number of ranks see the same one.
        """
        if self.size is None:
            return self.sample(position)
        epoch, offset = divmod(position, self.size)
        if self.difficulty is not None and epoch == 0:
            return self.sample(_easy_to_hard(self, seed)[offset])
        return self.sample(_shuffled(self.size, seed, epoch)[offset])

    def num_steps(self, steps: int | None, epochs: float | None, per_step: int) -> int:
        """A duration in steps of `per_step` samples; at least one step."""
        if steps is not None:
            return steps
        assert epochs is not None and self.size is not None
        return max(1, round(epochs * self.size / per_step))


def _difficulty(sample: Sample) -> float:
    value = sample.metadata.get("difficulty")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = "has none" if value is None else f"has {value!r:.80}"
        raise UserError(
            f"sample {sample.id}: data.curriculum needs a number in the column 'difficulty'; it {found}"
        )
    return float(value)


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return order


@lru_cache(maxsize=4)
def _easy_to_hard(source: Source, seed: int) -> list[int]:
    assert source.size is not None and source.difficulty is not None
    return sorted(_shuffled(source.size, seed, 0), key=source.difficulty.__getitem__)
