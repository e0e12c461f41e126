"""Processes that encode prompts.

They come from a fork server that never saw a GPU. A worker and the main process hold the two ends of a pipe
that nobody else has, so each notices the other's death. (The standard library's executor of processes does
not notice a worker that dies while it sends: its pipes are shared.)
"""

from __future__ import annotations

import atexit
import pickle
import signal
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

import torch
from torch import Tensor
from torch import multiprocessing as mp

from geo_r1.data.prompt import OverlongPrompt, PromptEncoder
from geo_r1.data.sample import Sample
from geo_r1.data.source import Source
from geo_r1.models.packed import EncodedPrompt

# Sent to all processes of a job at once, and for the main one to answer: it may yet need its workers.
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHARED_BYTES = 1 << 20  # from here on pixels come through shared memory, which takes a file descriptor each


@dataclass(frozen=True)
class Prepared:
    """A prompt, None if it is too long; what the cache had of its pictures and had not.

    Attributes:
        sample: None from a worker that was given it.
    """

    sample: Sample | None
    prompt: EncodedPrompt | None
    hits: int
    misses: int


@dataclass(frozen=True)
class Task:
    """How to prepare any position's prompt."""

    source: Source
    encoder: PromptEncoder
    seed: int

    def prepare(self, position: int, sample: Sample | None) -> Prepared:
        sample = self.source.draw(position, self.seed) if sample is None else sample
        cache = self.encoder.cache
        hits, misses = cache.hits, cache.misses
        try:
            prompt = self.encoder.encode(sample)
        except OverlongPrompt:
            if self.encoder.on_overlong != "skip":
                raise
            prompt = None
        return Prepared(sample, prompt, cache.hits - hits, cache.misses - misses)


@dataclass(frozen=True)
class Parcel:
    """What a worker sends: large pixels in shared memory, all else in one string of bytes."""

    content: bytes
    pixels: Tensor | None

    @classmethod
    def pack(cls, prepared: Prepared) -> Parcel:
        prompt = prepared.prompt
        if prompt is None or prompt.pixel_values is None or prompt.pixel_values.nbytes < SHARED_BYTES:
            return cls(pickle.dumps(prepared), None)
        try:
            pixels = prompt.pixel_values.share_memory_()
        except RuntimeError as error:
            raise ValueError(
                f"sample {prompt.sample_id}: no shared memory for {prompt.pixel_values.nbytes >> 20} MiB of "
                "pixels; give /dev/shm more room (containers: --shm-size), or set data.num_workers = 0"
            ) from error
        return cls(pickle.dumps(replace(prepared, prompt=replace(prompt, pixel_values=None))), pixels)

    def open(self) -> Prepared:
        prepared: Prepared = pickle.loads(self.content)
        if self.pixels is None or prepared.prompt is None:
            return prepared
        return replace(prepared, prompt=replace(prepared.prompt, pixel_values=self.pixels))


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection

    def ask(self, position: int, sample: Sample | None) -> Parcel:
        try:
            self.connection.send((position, sample))
            answer: Parcel | Exception = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)  # what it shares through the kernel goes before it does
            code = self.process.exitcode
            if code is None:
                raise
            raise ValueError(
                f"a process that prepares prompts ended unexpectedly (exit code {code}; -9 is mostly a lack "
                "of memory): lower data.num_workers (0 needs no such processes) or data.cache_mib"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


class Workers:
    """Processes, and a thread for each to wait for its answers; work goes to whichever is idle.

    Args:
        task: what they do. A source without end must pickle; of one with an end, only samples are sent.
    """

    def __init__(self, task: Task, num_workers: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by each worker
        util.get_temp_dir()  # made here it is shared, and removed though workers are killed in the end
        if task.source.size is not None:
            task = replace(task, source=Source(_not_here, task.source.size))  # samples come with the work
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers, "prompts")
        resource_tracker.ensure_running()  # when it starts it unblocks signals, which are blocked below
        atexit.register(self.close)  # before multiprocessing's own, which would wait for the workers
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(task, there), daemon=True)
            with _blocked_signals(), there:
                process.start()
            self._workers.append(_Worker(process, here))
            self._idle.put(self._workers[-1])

    def submit(self, position: int, sample: Sample | None) -> Future[Parcel]:
        return self._threads.submit(self._ask, position, sample)

    def _ask(self, position: int, sample: Sample | None) -> Parcel:
        worker = self._idle.get()
        try:
            return worker.ask(position, sample)
        finally:
            self._idle.put(worker)  # one that has died answers so every time

    def close(self) -> None:
        atexit.unregister(self.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # it holds nothing that would need tidying up
        self._threads.shutdown()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process that starts in here never gets these signals; this one gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(task: Task, connection: Connection) -> None:
    """What a worker does: answer until the main process is gone."""
    for number in NOT_FOR_WORKERS:  # the fork server may be older than our mask
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            position, sample = connection.recv()
        except (EOFError, ConnectionError):
            return
        answer: Parcel | Exception
        try:
            prepared = task.prepare(position, sample)
            answer = Parcel.pack(prepared if sample is None else replace(prepared, sample=None))
        except Exception as error:  # whatever it is, it is raised where the prompt was asked for
            error.add_note(traceback.format_exc())
            answer = error
        try:
            connection.send(answer)
        except ConnectionError:
            return


def _not_here(index: int) -> Sample:
    raise AssertionError(f"sample {index} is in the main process")
