"""Map a function over many images in worker processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

from geo_r1.errors import UserError

CHUNK = 16  # images or questions sent to a process at a time
AHEAD = 8  # chunks queued for each process

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    progress: Callable[[int], None] | None = None,
    chunk: int = CHUNK,
) -> Iterator[Result]:
    """Call `work` on each item in worker processes; yields the results in order.

    Args:
        num_workers: number of processes; with 0, this process does the work.
        progress: called with the number of items just finished.
        chunk: number of items sent to a process at a time.

    Raises:
        UserError: a process ended unexpectedly. Errors of `work` are passed on.
    """
    stream = iter(items)
    chunks = iter(lambda: list(islice(stream, chunk)), [])
    for results in _results(partial(_each, work), chunks, num_workers):
        if progress:
            progress(len(results))
        yield from results


def _results(work: Callable[[Any], Any], chunks: Iterator[Any], num_workers: int) -> Iterator[Any]:
    if num_workers == 0:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(num_workers, context, _follow_parent)
    try:
        waiting = deque(executor.submit(work, chunk) for chunk in islice(chunks, AHEAD * num_workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(executor.submit(work, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that works on images ended unexpectedly (mostly a lack of memory): lower "
            "--num-workers (0 needs no such processes)"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _each(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]
