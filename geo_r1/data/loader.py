"""Prompts of a training order, encoded in this process or ahead of time in others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from geo_r1.data.prompt import PromptEncoder
from geo_r1.data.sample import Sample
from geo_r1.data.source import Source
from geo_r1.data.workers import Parcel, Prepared, Task, Workers
from geo_r1.models.packed import EncodedPrompt

PREFETCH = 2  # how many of the upcoming calls are prepared ahead


class LoaderOptions(Protocol):
    """The part of a recipe that a loader is made of."""

    @property
    def num_workers(self) -> int: ...

    @property
    def cache_mib(self) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """A sample, its place in the training order, and its prompt."""

    position: int
    sample: Sample
    prompt: EncodedPrompt


class PromptLoader:
    """Draws samples by position and encodes their prompts; the same bits with any number of workers.

    Use it in a `with` statement, or close it.

    Args:
        source: what is drawn from. A source without end is drawn from in the workers, so it must pickle; of
            one with an end only the drawn samples go there.
        encoder: with its rule for prompts that are too long.
        seed: of the training order.
        num_workers: processes; 0 does all work here, when it is asked for.
        cache_bytes: for decoded pictures, all workers together.
    """

    def __init__(
        self,
        source: Source,
        encoder: PromptEncoder,
        *,
        seed: int,
        num_workers: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        encoder = encoder.with_cache(cache_bytes // max(num_workers, 1))
        self._task = Task(source, encoder, seed)
        self._workers = Workers(self._task, num_workers) if num_workers else None
        self._futures: dict[int, Future[Parcel]] = {}

    @classmethod
    def of(cls, options: LoaderOptions, source: Source, encoder: PromptEncoder, seed: int) -> PromptLoader:
        """The loader that a recipe's section `data` asks for."""
        return cls(
            source,
            encoder,
            seed=seed,
            num_workers=options.num_workers,
            cache_bytes=options.cache_mib << 20,
        )

    def __enter__(self) -> PromptLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they do."""
        self._futures.clear()
        if self._workers is not None:
            self._workers.close()

    def load(self, positions: Sequence[int], upcoming: Sequence[Sequence[int]] = ()) -> list[Encoded | None]:
        """Samples and prompts at these positions; None where a prompt is too long and `on_overlong` is skip.

        Args:
            upcoming: positions of the next calls, the next one first. Workers prepare those of PREFETCH calls
                from now on; what was announced before and is not any more is dropped. A wrong guess only
                costs time.

        Raises:
            ValueError: a sample or a prompt is wrong, or a worker was killed; one line that says what to do.
        """
        if self._workers is None:
            return [self._encoded(position, self._task.prepare(position, None)) for position in positions]
        ahead = [position for call in upcoming[:PREFETCH] for position in call]
        wanted = dict.fromkeys((*positions, *ahead))
        for position in self._futures.keys() - wanted.keys():
            self._futures.pop(position).cancel()
        for position in wanted:
            if position not in self._futures:
                self._futures[position] = self._submit(self._workers, position)
        prepared = [self._futures[position].result().open() for position in positions]
        self._futures = {position: self._futures[position] for position in ahead}
        return [self._encoded(position, item) for position, item in zip(positions, prepared, strict=True)]

    def _submit(self, workers: Workers, position: int) -> Future[Parcel]:
        source = self._task.source
        here = None if source.size is None else source.draw(position, self._task.seed)
        return workers.submit(position, here)

    def _encoded(self, position: int, prepared: Prepared) -> Encoded | None:
        if prepared.prompt is None:
            return None
        sample = prepared.sample or self._task.source.draw(position, self._task.seed)
        return Encoded(position, sample, prepared.prompt)
