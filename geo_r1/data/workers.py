"""Processes that encode prompts.

A fork server that has never touched a GPU starts them. Only a worker and the main process hold the ends of
their pipe, so each notices if the other dies. NOTES.md says why torch's DataLoader and the standard library's
executor do not suffice.
"""

from __future__ import annotations

import atexit
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

import torch
from torch import multiprocessing as mp

from geo_r1.data.prompt import PromptEncoder
from geo_r1.data.sample import Sample
from geo_r1.data.source import Source
from geo_r1.errors import UserError
from geo_r1.models.packed import EncodedPrompt

# These reach all processes of a job, but are meant for the main one, which may still need its workers.
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHARED_BYTES = 1 << 20  # larger pixels go through shared memory, one file descriptor each

BEATS = 10  # per timeout

Prompt = EncodedPrompt | str | None  # see `PromptEncoder.encode_or_skip`
Prepared = tuple[Sample | None, Prompt]  # no sample if the main process sent it


@dataclass(frozen=True)
class Task:
    """How to prepare the prompt at a position of the training order."""

    source: Source
    encoder: PromptEncoder
    seed: int

    def prepare(self, position: int, sample: Sample | None = None) -> tuple[Sample, Prompt]:
        """The sample and its prompt, or why it has none."""
        sample = self.source.draw(position, self.seed) if sample is None else sample
        return sample, self.encoder.encode_or_skip(sample)


@dataclass(eq=False)
class _Worker:
    """A worker process, asked by one thread at a time.

    Attributes:
        asked: identifies the question that it has not answered; None while it is idle.
        late: it took too long, and was killed.
    """

    process: BaseProcess
    connection: Connection
    asked: object = None
    late: bool = False

    def ask(self, position: int, sample: Sample | None, timeout: float) -> Prepared:
        self.asked = object()
        try:
            self.connection.send((position, sample))
            answer: Prepared | UserError = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            self.process.join(5)  # the process ends shortly after its pipe closes
            if self.late:
                what = f"position {position} of the training order" if sample is None else sample.id
                raise UserError(
                    f"a process that prepares prompts has not answered for {timeout:g} s (run.hang_timeout): "
                    f"it was stopped, or sample {what} takes for ever"
                ) from error
            code = self.process.exitcode
            if code is None or code >= 0:
                raise RuntimeError("a process that prepares prompts failed; see its own traceback") from error
            raise UserError(
                f"a process that prepares prompts ended unexpectedly (exit code {code}; -9 is mostly a lack "
                "of memory): lower data.num_workers (0 needs no such processes) or data.cache_mib"
            ) from error
        finally:
            self.asked = None
        if isinstance(answer, UserError):
            raise answer
        return answer


class Workers:
    """Worker processes, with one thread each to wait for the answers; work goes to an idle worker.

    Args:
        task: the work. An endless source must pickle; of a finite one, only samples are sent.
        timeout: seconds after which a worker that has not answered is killed.
    """

    def __init__(self, task: Task, num_workers: int, timeout: float) -> None:
        self.timeout = timeout
        self._closed = threading.Event()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by each worker
        util.get_temp_dir()  # created here: all share it, and it is removed although workers get killed
        if task.source.size is not None:
            task = replace(task, source=Source(_not_here, task.source.size))  # samples come with the work
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers, "prompts")
        resource_tracker.ensure_running()  # starting it later would unblock the signals blocked below
        atexit.register(self.close)  # runs before multiprocessing's handler, which would wait for the workers
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(task, there), daemon=True)
            with _blocked_signals(), there:
                process.start()
            self._workers.append(_Worker(process, here))
            self._idle.put(self._workers[-1])
        threading.Thread(target=self._watch, name="late prompts", daemon=True).start()

    def submit(self, position: int, sample: Sample | None) -> Future[Prepared]:
        return self._threads.submit(self._ask, position, sample)

    def _ask(self, position: int, sample: Sample | None) -> Prepared:
        worker = self._idle.get()
        try:
            return worker.ask(position, sample, self.timeout)
        finally:
            self._idle.put(worker)  # a dead worker gives the same error every time

    def _watch(self) -> None:
        """Kill workers that take too long; in beats, since a job that was suspended can be resumed."""
        before, missed = [worker.asked for worker in self._workers], [0] * len(self._workers)
        while not self._closed.wait(self.timeout / BEATS):
            for index, worker in enumerate(self._workers):
                same = worker.asked is not None and worker.asked is before[index]
                missed[index] = missed[index] + 1 if same else 0
                before[index] = worker.asked
                if missed[index] >= BEATS:
                    worker.late = True
                    worker.process.kill()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # it has nothing to clean up
        self._threads.shutdown()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process started inside never gets these signals; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(task: Task, connection: Connection) -> None:
    """A worker's main loop: it answers until the main process is gone."""
    for number in NOT_FOR_WORKERS:  # the fork server may be older than our mask
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the main process has gone
        while True:
            position, given = connection.recv()
            try:
                sample, prompt = task.prepare(position, given)
                send(connection, (None if given else sample, prompt))
            except UserError as error:  # the main process raises it again
                connection.send(error)


def send(connection: Connection, prepared: Prepared) -> None:
    """Send a prompt, with large pixels through shared memory.

    Raises:
        UserError: shared memory is full.
    """
    prompt = prepared[1]
    if (
        not isinstance(prompt, EncodedPrompt)
        or prompt.pixel_values is None
        or prompt.pixel_values.nbytes < SHARED_BYTES
    ):
        connection.send_bytes(pickle.dumps(prepared))
        return
    try:
        prompt.pixel_values.share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"sample {prompt.sample_id}: no shared memory for {prompt.pixel_values.nbytes >> 20} MiB of "
            "pixels; give /dev/shm more room (containers: --shm-size), or set data.num_workers = 0"
        ) from error
    connection.send(prepared)


def _not_here(index: int) -> Sample:
    raise AssertionError(f"sample {index} is in the main process")
