"""Runs of the trainer on any number of ranks, as torchrun would start them; one import serves them all.

    python forked_ranks.py      reads a job a line from stdin, as JSON, and answers with what became of it

A job that was waited for in vain is killed. Each rank writes to files of its own.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import killed_runs
import pytest
import small_runs as runs

PATIENCE = 240.0  # seconds until a job that has not ended hangs; DeepSpeed may compile something once
# What libraries write to stderr besides.
NOISE = re.compile(
    r"DeepSpeed |(\[rank\d+\]:)?\[W\d|Exception raised from|frame #|<omitting python frames>|$"
)
STRATEGIES = {  # by a short name: number of ranks, options
    "one": (1, {"parallel__strategy": "ddp"}),
    "one fsdp2": (1, {"parallel__strategy": "fsdp2"}),
    "ddp": (2, {"parallel__strategy": "ddp"}),
    "fsdp2": (2, {"parallel__strategy": "fsdp2"}),
    "hsdp": (2, {"parallel__strategy": "fsdp2", "parallel__shard_size": 1}),
    "zero 2": (2, {"parallel__strategy": "deepspeed", "parallel__zero_stage": 2}),
    "zero 3": (2, {"parallel__strategy": "deepspeed", "parallel__zero_stage": 3}),
    "zero 3 of three": (3, {"parallel__strategy": "deepspeed", "parallel__zero_stage": 3}),
}
Signal = tuple[int, int, int]


@dataclass(frozen=True)
class Ended:
    """What became of a job.

    Attributes:
        codes: each rank's exit code; a signal's number, negative; None where it hung and was killed for that.
        stderr, stdout: of each rank.
        killed: whether the rank that was to be killed was still there.
        seconds: from the kill, or from the start where there was none, to the last rank's end.
    """

    codes: list[int | None]
    stderr: list[str]
    stdout: list[str]
    killed: bool
    seconds: float

    @property
    def said(self) -> list[str]:
        """Lines that all ranks said on stderr, the noise of libraries left out."""
        lines = "".join(self.stderr).splitlines()
        return [line for line in lines if not NOISE.match(line)]


def run(
    argv: list[str],
    ranks: int = 1,
    *,
    moment: str | None = None,
    stop: Signal | None = None,
    kill: tuple[int, int, float] | None = None,
) -> Ended:
    """Run a recipe on some ranks, each a process, and wait for all of them.

    Args:
        moment: of killed_runs, where every rank kills itself.
        stop: (signal, rank, n): that rank gets that signal at the end of its n-th step.
        kill: (rank, n, seconds): that rank gets SIGKILL so long after its n-th sign of life; it gives the
            first when all ranks have met, and one at the end of each step.
    """
    job = {"argv": argv, "ranks": ranks, "moment": moment, "stop": stop, "kill": kill}
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(job | {"folder": folder}), file=_server().stdin, flush=True)
        answer = _server().stdout.readline()
    assert answer, "the server of forks has ended"
    return Ended(**json.loads(answer))


def train(run_dir: Path, *stages: str, strategy: str, stop: Signal | None = None, **changes) -> Ended:
    """A run that has to succeed, with a strategy of STRATEGIES; options as in `small_runs.arguments`."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks, options = STRATEGIES[strategy]
    ended = run(runs.arguments(run_dir, *stages, **options | changes), ranks, stop=stop)
    assert ended.codes == [0] * ranks, "\n".join(ended.stderr)
    return ended


@cache
def _server() -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, [str(runs.HERE), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    atexit.register(server.communicate)  # its stdin closes, and so it ends
    return server


# The server. From here on, all runs there and in its forks.


def rank_of_job(job: dict, rank: int, port: int, alive: int) -> None:
    """Be one rank: never returns to the server's loop."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output(job, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})

    from geo_r1.train.__main__ import main
    from geo_r1.train.parallel.ranks import Ranks
    from geo_r1.train.report.log import Log

    start, write, count = Ranks.start, Log.write, [0]

    def started(threads: int) -> Ranks:
        ranks = start(threads)
        os.write(alive, b".")
        return ranks

    def written(self, stage, step, metrics):
        write(self, stage, step, metrics)
        os.write(alive, b".")
        count[0] += 1
        if job["stop"] and job["stop"][1:] == [rank, count[0]]:
            os.kill(os.getpid(), job["stop"][0])

    Ranks.start, Log.write = started, written
    if job["moment"]:
        killed_runs.arm(job["moment"])
    sys.exit(main(job["argv"]))


def output(job: dict, rank: int, name: str) -> Path:
    return Path(job["folder"], f"{name}{rank}")


def fork_ranks(job: dict) -> tuple[list[int], list[int]]:
    """Process ids, and pipes that each rank holds open as long as it lives."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids, pipes = [], []
    for rank in range(job["ranks"]):
        pipe, alive = os.pipe()
        pid = os.fork()
        if pid == 0:
            for other in [*pipes, pipe]:
                os.close(other)
            rank_of_job(job, rank, port, alive)
        os.close(alive)
        pids.append(pid)
        pipes.append(pipe)
    return pids, pipes


def carry_out(job: dict) -> Ended:
    start = time.monotonic()
    pids, pipes = fork_ranks(job)
    killed = False
    if job["kill"]:
        victim, signs, seconds = job["kill"]
        pipe = pipes[victim]
        killed = lives_on(pipe, start + PATIENCE, signs) and lives_on(pipe, time.monotonic() + seconds)
        if killed:
            os.kill(pids[victim], signal.SIGKILL)
            start = time.monotonic()
    hung = [lives_on(pipe, start + PATIENCE) for pipe in pipes]
    seconds = time.monotonic() - start
    for pid, hangs in zip(pids, hung, strict=True):
        if hangs:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for pipe in pipes:
        os.close(pipe)
    return Ended(
        [None if hangs else code for code, hangs in zip(codes, hung, strict=True)],
        *([output(job, i, name).read_text() for i in range(len(pids))] for name in ("stderr", "stdout")),
        killed,
        seconds,
    )


def lives_on(pipe: int, until: float, signs: float = math.inf) -> bool:
    """Wait for so many signs of life of the rank that holds the pipe, but not longer; False: it has ended."""
    while signs > 0 and (left := until - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            if not os.read(pipe, 1):
                return False
            signs -= 1
    return True


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    import geo_r1.train.run

    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    geo_r1.train.run.write_report = lambda run_dir: run_dir  # it has tests of its own
    for line in sys.stdin:  # and nothing around it that a fork, as it ends, would undo
        os.write(answers, json.dumps(vars(carry_out(json.loads(line)))).encode() + b"\n")
