"""Prompts in training order, encoded in this process or ahead of time by worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from geo_r1.data.prompt import PromptEncoder
from geo_r1.data.sample import Sample
from geo_r1.data.source import Source
from geo_r1.data.workers import Prepared, Task, Workers
from geo_r1.models.packed import EncodedPrompt

PREFETCH = 2  # number of upcoming calls that workers prepare


class PromptLoader:
    """Draws samples by position and encodes their prompts; the same bits with any number of workers.

    Use it in a `with` statement, or call `close`.

    Args:
        source: provides the samples. Workers draw from an endless source, so it must pickle; from a finite
            one, the main process draws and sends the samples to the workers.
        encoder: encodes the prompts; its `on_overlong` and `on_bad_sample` are the rules for samples
            that are too long or bad.
        seed: determines the training order.
        num_workers: number of worker processes; with 0, `load` does the work itself.
        cache_bytes: limit on the decoded images in the caches of all workers together.
        timeout: seconds that a worker may take for a prompt.

    Attributes:
        bad: why samples were left out as bad since the start, by file and row, or id.
    """

    def __init__(
        self,
        source: Source,
        encoder: PromptEncoder,
        *,
        seed: int,
        num_workers: int = 0,
        cache_bytes: int = 0,
        timeout: float = 600.0,
    ) -> None:
        encoder = encoder.with_cache(cache_bytes // max(num_workers, 1))
        self._task = Task(source, encoder, seed)
        self._workers = Workers(self._task, num_workers, timeout) if num_workers else None
        self._futures: dict[int, Future[Prepared]] = {}
        self.bad: dict[str, str] = {}

    def __enter__(self) -> PromptLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, even in the middle of their work."""
        self._futures.clear()
        if self._workers is not None:
            self._workers.close()

    def load(
        self, positions: Sequence[int], upcoming: Sequence[Sequence[int]] = ()
    ) -> list[tuple[Sample, EncodedPrompt] | None]:
        """Samples and prompts at these positions; None for a sample that is skipped as too long or bad.

        Args:
            upcoming: positions of the next calls, the next one first. Workers start on those of the first
                PREFETCH calls; prompts that an earlier call announced and this one does not are dropped.
                A wrong guess only costs time.

        Raises:
            UserError: a sample or a prompt is wrong, or a worker was killed or hangs; says what to do.
        """
        if self._workers is None:
            prepared: list[Prepared] = [self._task.prepare(position) for position in positions]
        else:
            ahead = [position for call in upcoming[:PREFETCH] for position in call]
            wanted = dict.fromkeys((*positions, *ahead))
            for position in self._futures.keys() - wanted.keys():
                self._futures.pop(position).cancel()
            for position in wanted:
                if position not in self._futures:
                    self._futures[position] = self._workers.submit(
                        position, self._draw(position) if self._task.source.size else None
                    )
            prepared = [self._futures[position].result() for position in positions]
            self._futures = {position: self._futures[position] for position in ahead}
        loaded: list[tuple[Sample, EncodedPrompt] | None] = []
        for position, (sent, prompt) in zip(positions, prepared, strict=True):
            sample = sent or self._draw(position)
            if isinstance(prompt, str):
                self.bad[sample.where or sample.id] = prompt
            loaded.append((sample, prompt) if isinstance(prompt, EncodedPrompt) else None)
        return loaded

    def _draw(self, position: int) -> Sample:
        return self._task.source.draw(position, self._task.seed)
