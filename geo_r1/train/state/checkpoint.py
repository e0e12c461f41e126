"""Checkpoints: written beside, then renamed, so what exists is whole.

checkpoints/<stage>-000100/    a stage's state: its tensors by torch.distributed.checkpoint, the rest in
                               trainer.json, and manifest.json of its files; any number of ranks and any
                               strategy can read it
checkpoints/damaged-...        a checkpoint that was not what had been written, and was set aside
checkpoints/<stage>-best.json  [step, value] of each evaluation that was better than all before it

Every rank writes the shards that it holds, so ranks on several machines need a shared file system.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from geo_r1.errors import UserError
from geo_r1.files import beside, publish
from geo_r1.train.parallel.ranks import PATIENCE, Ranks, rank_losses
from geo_r1.train.state.manifest import Damage, Reader, check_files
from geo_r1.train.state.shards import State, Writer, check, plain_of, reason_of, tensors_of


class DamagedCheckpointError(UserError):
    """A checkpoint's files are not what was written."""


class Checkpoints:
    """The checkpoints of one stage of a run. All ranks call the same methods in the same order.

    Args:
        keep: newest checkpoints that stay on disk, at least 1; the best one stays besides.
    """

    def __init__(self, run_dir: Path, stage: str, ranks: Ranks, keep: int) -> None:
        self.run_dir, self.stage, self.ranks, self.keep = run_dir, stage, ranks, keep
        # The background save needs a group of its own: its messages must not mix with the trainer's.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.size > 1 else None
        marks = ranks.gather(_marks(run_dir, stage))[0]
        self._best: tuple[int, float] | None = marks[-1] if marks else None
        if ranks.is_main:  # forget what a killed run marked and never wrote
            _mark(run_dir, stage, marks)
        self._pending: tuple[Path, Future[Metadata]] | None = None

    def folder(self, step: int) -> Path:
        return checkpoint_folder(self.run_dir, self.stage, step)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one, as rank 0 sees it."""
        return self.ranks.gather(newest_checkpoint(self.run_dir, self.stage))[0]

    def holds(self, step: int) -> bool:
        """True if the checkpoint of a step is there, or under way."""
        under_way = self._pending is not None and self._pending[0] == self.folder(step)
        return under_way or self.newest() == self.folder(step)

    def save(self, step: int, state: State, *, wait: bool = False) -> None:
        """Copy the state to host memory and write it in the background; the state may change at once.

        Waits for the previous save first. Deletes old checkpoints once this one is complete.

        Args:
            state: the same names on every rank. A tensor that is no DTensor has the same value on every rank.
            wait: return only when the checkpoint is complete.

        Raises:
            UserError, RankLost: as `wait`, about the previous save or, with `wait`, this one.
        """
        self.wait()
        folder = self.folder(step)
        assert not folder.exists(), f"{folder} is there already"
        clean = partial(prune, self.run_dir, self.stage, self.keep)
        writer = Writer(folder, plain_of(state), clean, self.ranks.rank, self.ranks.size)
        pending = dcp.async_save(tensors_of(state), storage_writer=writer, **self._peers())
        assert isinstance(pending, Future)
        self._pending = folder, pending
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way, if any, is on disk under its name.

        Raises:
            UserError: it failed; names the checkpoint and the reason.
            RankLost: another rank has ended.
        """
        if self._pending is not None:
            (folder, pending), self._pending = self._pending, None
            self._explain(pending.result, f"checkpoint {folder} cannot be written")

    def failed(self) -> bool:
        """True if the save under way has failed; `wait` says why."""
        pending = self._pending and self._pending[1]
        return pending is not None and pending.done() and pending.exception() is not None

    def load(self, folder: Path, state: State) -> State:
        """Fill the state from a checkpoint, whatever ranks and strategy wrote it.

        Args:
            state: as for `save`. Tensors are overwritten; numbers and "trainer" are replaced. Other sections
                of the checkpoint are not read.

        Returns:
            The state itself.

        Raises:
            DamagedCheckpointError: a file is missing or has changed since it was written; no tensor was
                touched.
            UserError: the checkpoint is of another model, or cannot be read.
            RankLost: another rank has ended.
        """
        with self.ranks.together():
            try:
                check_files(folder, self.ranks.rank, self.ranks.size)
            except Damage as damage:
                raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {damage}") from damage
        with self.ranks.together():
            plain = check(folder, state)
        load = partial(dcp.load, tensors_of(state), storage_reader=Reader(folder), **self._peers())
        self._explain(load, f"checkpoint {folder} cannot be read")
        for section in plain.keys() & state.keys():
            state[section].update(plain[section])
        return state

    def set_aside(self, folder: Path) -> Path:
        """Rename a damaged checkpoint, so that the one before it is the newest; returns its new path."""
        aside = folder.with_name(f"damaged-{folder.name}")
        if self.ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        self.ranks.barrier()
        marks = self.ranks.gather(_marks(self.run_dir, self.stage))[0]
        self._best = marks[-1] if marks else None
        return aside

    def check_room(self, state: State, export_bytes: int) -> None:
        """Refuse to begin where the disk cannot hold one more checkpoint and the export.

        Args:
            state: as for `save`.

        Raises:
            UserError: on every rank; names the folder and what it takes.
        """
        needed = export_bytes + sum(x.numel() * x.element_size() for x in tensors_of(state).values())
        folder = self.run_dir / "checkpoints"
        with self.ranks.together():
            free = shutil.disk_usage(folder if folder.exists() else self.run_dir).free
            if self.ranks.is_main and free < needed:
                sizes = f"take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
                raise UserError(
                    f"{folder}: a checkpoint and the model of {self.stage} {sizes}; make room, or give "
                    "another --run.dir"
                )

    def mark_best(self, step: int, value: float) -> None:
        """Remember that the checkpoint of a step, complete or under way, is better than all before it."""
        self._best = step, value
        if self.ranks.is_main:
            _mark(self.run_dir, self.stage, [*_marks(self.run_dir, self.stage), self._best])

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best checkpoint, if one was marked."""
        return self._best

    def finish(self) -> None:
        """Delete all checkpoints but the last, from which a finished stage can be extended."""
        self.wait()
        if self.ranks.is_main:
            prune(self.run_dir, self.stage, 1)
        self.ranks.barrier()

    def close(self) -> None:
        """Let a save under way end, well or not, before the process group goes."""
        if self._pending is not None:
            self._pending[1].exception()
            self._pending = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _peers(self) -> dict[str, Any]:
        alone = self.ranks.size == 1
        if alone:  # for good: the writing thread warns later
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return {"process_group": self._group, "no_dist": alone}

    def _explain(self, function: Callable[[], Any], failure: str) -> None:
        """Call a function of torch's, whose exceptions hold the tracebacks of all ranks."""
        try:
            with rank_losses():
                function()
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            where = f"rank {rank}: " if self.ranks.size > 1 else ""
            raise UserError(f"{failure}: {where}{reason_of(cause)}") from error


def checkpoint_folder(run_dir: Path, stage: str, step: int) -> Path:
    return run_dir / "checkpoints" / f"{stage}-{step:06d}"


def newest_checkpoint(run_dir: Path, stage: str) -> Path | None:
    """The whole checkpoint of a stage with the most steps, if there is one."""
    return next(reversed(_whole(run_dir, stage)), None)


def prune(run_dir: Path, stage: str, keep: int) -> None:
    """Delete all but the best and the newest `keep` checkpoints of a stage, and half-written ones.

    Args:
        keep: 0 deletes the best one, too.
    """
    found, marks = _whole(run_dir, stage), _marks(run_dir, stage)
    spared = checkpoint_folder(run_dir, stage, marks[-1][0]) if keep and marks else None
    for old in found[: max(0, len(found) - keep)]:
        if old != spared:
            old.rename(beside(old))
    for unfinished in (run_dir / "checkpoints").glob(f".{stage}-[0-9]*.partial"):
        shutil.rmtree(unfinished)
    if not keep:
        _mark(run_dir, stage, [])


def _whole(run_dir: Path, stage: str) -> list[Path]:
    found = [
        path
        for path in (run_dir / "checkpoints").glob(f"{stage}-*")
        if re.fullmatch(r"\d{6,}", path.name.removeprefix(f"{stage}-")) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def _marks_file(run_dir: Path, stage: str) -> Path:
    return run_dir / "checkpoints" / f"{stage}-best.json"


def _marks(run_dir: Path, stage: str) -> list[tuple[int, float]]:
    """Step and value of the checkpoints that were marked and are whole, in that order."""
    file = _marks_file(run_dir, stage)
    try:
        marks = json.loads(file.read_text()) if file.exists() else []
    except ValueError as error:
        reason = f"{file} cannot be read: {reason_of(error)}; without it, no step is the best"
        raise UserError(reason) from error
    return [(step, value) for step, value in marks if checkpoint_folder(run_dir, stage, step).exists()]


def _mark(run_dir: Path, stage: str, marks: list[tuple[int, float]]) -> None:
    file = _marks_file(run_dir, stage)
    if marks:
        file.parent.mkdir(exist_ok=True)
        beside(file).write_text(json.dumps(marks))
        publish(beside(file), file)
    else:
        file.unlink(missing_ok=True)
        beside(file).unlink(missing_ok=True)
