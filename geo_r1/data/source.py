"""Sources of samples, by number: a file with an end, or the world without one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from geo_r1.data.sample import Sample
from geo_r1.errors import UserError


@dataclass(frozen=True, eq=False)
class Source:
    """Samples by index.

    Attributes:
        sample: index -> sample, the same at every call. In a source without end it must pickle, as
            functions of modules, their partials and `exemplars.Numbered` do.
        size: the number of samples; None if there is no end.
        difficulty: of each sample, any unit; with it the first epoch goes from easy to hard.
    """

    sample: Callable[[int], Sample]
    size: int | None
    difficulty: tuple[float, ...] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], curriculum: bool = False) -> Source:
        """A source with these samples.

        Args:
            curriculum: start with the easy ones, by their column `difficulty`.

        Raises:
            UserError: a sample has no such column, or no number in it; names it.
        """
        difficulty = tuple(map(_difficulty, samples)) if curriculum else None
        return cls(samples.__getitem__, len(samples), difficulty)

    def draw(self, position: int, seed: int) -> Sample:
        """The sample at a position of the training order.

        Every epoch of a file is shuffled anew, but for the first one where there are difficulties: that goes
        from easy to hard, and only equally hard samples are shuffled. The order is a function of the seed
        alone, so a resumed run and any number of ranks see the same one.
        """
        if self.size is None:
            return self.sample(position)
        epoch, offset = divmod(position, self.size)
        if self.difficulty is not None and epoch == 0:
            return self.sample(_easy_to_hard(self, seed)[offset])
        return self.sample(_shuffled(self.size, seed, epoch)[offset])

    def num_steps(self, steps: int | None, epochs: float | None, per_step: int) -> int:
        """A duration in steps of `per_step` samples; at least one."""
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
