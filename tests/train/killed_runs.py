"""Run the trainer in forks that kill themselves with SIGKILL at a named moment; one import serves them all.

    python killed_runs.py PLAN      PLAN: JSON, [[moment, [argument, ...]], ...]

Prints the number of the signal that ended each. A moment is NAME:N, the N-th time that NAME happens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from geo_r1.train.__main__ import main
from geo_r1.train.run import run  # noqa: F401  # imported once, before the forks


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_saved(state, path):
    """A trainer state of which half the bytes reached the disk."""
    real_save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def renamed_then_dead(self, target):
    real_rename(self, target)
    die()


def half_deleted(folder, **_):
    next(path for path in Path(folder).iterdir()).unlink()
    die()


def at(number, what, then):
    """`what`, but `then` at the `number`-th call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return then(*args, **kwargs) if len(calls) == number else what(*args, **kwargs)

    return counted


real_save, real_rename, real_rmtree = torch.save, Path.rename, shutil.rmtree
MOMENTS = {
    "torch.save half done": (torch, "save", real_save, half_saved),
    "before rename": (Path, "rename", real_rename, die),
    "after rename": (Path, "rename", real_rename, renamed_then_dead),
    "rmtree half done": (shutil, "rmtree", real_rmtree, half_deleted),
}


def child(moment: str, arguments: list[str]) -> None:
    name, number = moment.rsplit(":", 1)
    owner, attribute, real, then = MOMENTS[name]
    setattr(owner, attribute, at(int(number), real, then))
    sys.exit(main(arguments))


if __name__ == "__main__":
    for moment, arguments in json.loads(sys.argv[1]):
        pid = os.fork()
        if pid == 0:
            child(moment, arguments)
        status = os.waitpid(pid, 0)[1]
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)
