"""Runs of the trainer on any number of ranks, as torchrun would start them; one import serves them all.

    python forked_ranks.py      reads a job a line from stdin, as JSON, and answers with what became of it

As torchrun does, it holds the ranks' store, and when a rank fails it sends the others SIGTERM and, later,
SIGKILL. A job that does not end is killed. Each rank writes to files of its own.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import killed_runs
import pytest
import small_runs as runs
import torch.distributed as dist

PATIENCE = 240.0  # seconds until a job that has not ended hangs; DeepSpeed may compile something once
GRACE = 10.0  # seconds between SIGTERM and SIGKILL; torchrun's --shutdown-timeout
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
        codes: each rank's exit code; a signal's number, negative; None where the job hung and was killed.
        stderr, stdout: of each rank.
        struck: whether the rank that `strike` names was still there.
        seconds: from the strike, or from the start where there was none, to the last rank's end.
    """

    codes: list[int | None]
    stderr: list[str]
    stdout: list[str]
    struck: bool
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
    strike: tuple[int, int, int, float] | None = None,
) -> Ended:
    """Run a recipe on some ranks, each a process, and wait for all of them.

    Args:
        moment: of killed_runs, where every rank kills itself.
        stop: (signal, rank, n): that rank gets that signal at the end of its n-th step.
        strike: (signal, rank, n, seconds): that rank gets that signal so long after its n-th sign of life; it
            gives the first when all ranks have met, and one at the end of each step.
    """
    job = {"argv": argv, "ranks": ranks, "moment": moment, "stop": stop, "strike": strike}
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
    paths = os.pathsep.join(
        filter(None, [str(runs.HERE), str(runs.HERE.parent), os.environ.get("PYTHONPATH")])
    )
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


def rank_of_job(job: dict, rank: int, alive: int) -> NoReturn:
    """Be one rank."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output(job, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"], "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in own.items()})

    from geo_r1.train.__main__ import rank_main
    from geo_r1.train.parallel.ranks import Ranks
    from geo_r1.train.report.log import Log

    start, write, count = Ranks.start, Log.write, [0]

    def started(*options) -> Ranks:
        ranks = start(*options)
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
    rank_main(job["argv"])


def output(job: dict, rank: int, name: str) -> Path:
    return Path(job["folder"], f"{name}{rank}")


def hold_store(pipe: int) -> NoReturn:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(pipe, str(store.port).encode())
    while True:
        signal.pause()


def fork(be: Callable[[int], NoReturn]) -> tuple[int, int]:
    """Process id of a fork, and a pipe that it writes to, and holds open as long as it lives."""
    pipe, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        be(alive)
    os.close(alive)
    return pid, pipe


def end(pid: int, pipe: int, number: int = 0) -> int:
    """The exit code of a fork, which gets a signal first."""
    os.kill(pid, number)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def carry_out(job: dict) -> Ended:
    store = fork(hold_store)
    job["port"] = os.read(store[1], 9).decode()
    start = time.monotonic()
    living = {rank: fork(partial(rank_of_job, job, rank)) for rank in range(job["ranks"])}
    number, victim, signs, seconds = job["strike"] or (0, 0, math.inf, 0)
    struck, strike_at, kill_at = False, math.inf, start + PATIENCE
    codes: list[int | None] = [None] * job["ranks"]
    while living and (now := time.monotonic()) < kill_at:
        if now >= strike_at and victim in living:
            os.kill(living[victim][0], number)
            struck, start, strike_at = True, now, math.inf
        ready, _, _ = select.select([p for _, p in living.values()], [], [], min(strike_at, kill_at) - now)
        for rank, (_, pipe) in [*living.items()]:
            if pipe in ready and os.read(pipe, 1):
                signs -= rank == victim
                if signs == 0 and not struck:
                    strike_at = min(strike_at, time.monotonic() + seconds)
            elif pipe in ready:
                codes[rank] = end(*living.pop(rank))
                if codes[rank] and not any(codes[:rank] + codes[rank + 1 :]):  # the first that fails
                    kill_at = time.monotonic() + GRACE
                    for other, _ in living.values():
                        os.kill(other, signal.SIGTERM)
    failed = any(codes)
    for rank, fork_ in living.items():
        code = end(*fork_, signal.SIGKILL)
        codes[rank] = code if failed else None
    end(*store, signal.SIGKILL)
    told = ([output(job, i, name).read_text() for i in range(job["ranks"])] for name in ("stderr", "stdout"))
    return Ended(codes, *told, struck, time.monotonic() - start)


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    from quick import quicken

    import geo_r1.train.run

    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    geo_r1.train.run.write_report = lambda run_dir: run_dir  # it has tests of its own
    quicken()
    for line in sys.stdin:  # and nothing around it that a fork, as it ends, would undo
        os.write(answers, json.dumps(vars(carry_out(json.loads(line)))).encode() + b"\n")
