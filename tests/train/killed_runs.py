"""Moments at which a run kills itself with SIGKILL. A moment is NAME:N, the N-th time that NAME happens."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from geo_r1.train.state.shards import Writer


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(self, plan, planner):
    """Shards of a checkpoint of which half the bytes reached the disk."""
    real_write(self, plan, planner).wait()
    for shard in Path(self.path).glob("*.distcp"):
        os.truncate(shard, shard.stat().st_size // 2)
    die()


def renamed_then_dead(self, target):
    real_rename(self, target)
    die()


def half_deleted(folder, **_):
    next(path for path in Path(folder).iterdir()).unlink()
    die()


def always(*_, **__):
    return True


def at(number, what, then, counts):
    """`what`, but `then` at the `number`-th call that counts."""
    calls = []

    def counted(*args, **kwargs):
        calls.extend([args] * counts(*args))
        return then(*args, **kwargs) if len(calls) == number and counts(*args) else what(*args, **kwargs)

    return counted


real_write, real_finish = Writer.write_data, Writer.finish
real_rename, real_rmtree = Path.rename, shutil.rmtree
# Of renames only those of folders: torch renames a file of its own in every checkpoint.
MOMENTS = {
    "shards half written": (Writer, "write_data", real_write, half_written, always),
    "before metadata": (Writer, "finish", real_finish, die, always),
    "before rename": (Path, "rename", real_rename, die, lambda path, _: path.is_dir()),
    "after rename": (Path, "rename", real_rename, renamed_then_dead, lambda path, _: path.is_dir()),
    "rmtree half done": (shutil, "rmtree", real_rmtree, half_deleted, always),
}


def arm(moment: str) -> None:
    """Make this process kill itself at a moment to come."""
    name, number = moment.rsplit(":", 1)
    owner, attribute, real, then, counts = MOMENTS[name]
    setattr(owner, attribute, at(int(number), real, then, counts))
