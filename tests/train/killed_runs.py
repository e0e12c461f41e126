"""Moments at which a run kills itself with SIGKILL, or fails. NAME:N is the N-th time that NAME happens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from saved_states import die

from geo_r1.errors import OutageError, UserError
from geo_r1.train.state.shards import Writer
from geo_r1.train.updater import Updater


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


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def defect(*_, **__):
    return [*zip([1], [], strict=True)]


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
    "mistake": (Updater, "apply", Updater.apply, raising(UserError("sample 7 has no answer")), always),
    "outage": (Updater, "apply", Updater.apply, raising(OutageError("the server has gone")), always),
    "defect": (Updater, "apply", Updater.apply, defect, always),
}


def arm(moment: str) -> None:
    """Make this process kill itself at a moment to come."""
    name, number = moment.rsplit(":", 1)
    owner, attribute, real, then, counts = MOMENTS[name]
    setattr(owner, attribute, at(int(number), real, then, counts))
