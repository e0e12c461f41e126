"""Where samples come from, by number: a file that ends, or the world that does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from geo_r1.data.sample import Sample


@dataclass(frozen=True)
class Source:
    """Samples by index.

    Attributes:
        sample: index -> sample, the same at every call.
        size: how many there are; None for no end.
    """

    sample: Callable[[int], Sample]
    size: int | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Source:
        return cls(samples.__getitem__, len(samples))

    def draw(self, position: int, seed: int) -> Sample:
        """The sample at a position of the training order: every epoch of a file is shuffled anew.

        The order is a function of the seed alone, so a resumed run and any number of ranks see the same one.
        """
        if self.size is None:
            return self.sample(position)
        epoch, offset = divmod(position, self.size)
        return self.sample(_shuffled(self.size, seed, epoch)[offset])

    def num_steps(self, steps: int | None, epochs: float | None, per_step: int) -> int:
        """Steps of `per_step` samples that a duration means here; at least one."""
        if steps is not None:
            return steps
        assert epochs is not None and self.size is not None
        return max(1, round(epochs * self.size / per_step))


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return order
