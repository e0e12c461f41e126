"""The folder of a run: one run at a time uses it, and starting over deletes what a run writes, nothing else.

.geo-r1-run   the folder's mark, which its run keeps locked: {host, pid, started}; empty after a run has ended

The lock is one of POSIX: the system releases it when the process ends, however it ends, and forked workers
do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from geo_r1.errors import UserError
from geo_r1.files import beside
from geo_r1.train.recipe.load import decisive, first_difference
from geo_r1.train.recipe.sections import Recipe

MARK = ".geo-r1-run"
RECIPE = "recipe.toml"
# All that a run writes into its folder. The recipe goes last: until then the rest can be compared with it.
WRITTEN = (
    "models", "checkpoints", "rollouts", "rollout-model", "eval", "tensorboard", "bad", "plots",
    "metrics.jsonl", "run.json", "summary.json", "report.html", RECIPE,
)  # fmt: skip
ANOTHER = "give another --run.dir"
OTHERWISE = f"{ANOTHER}, or --run.overwrite true"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def claimed(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder for this process, on the main rank; makes it if it is not there.

    Args:
        say: prints a line, about a run that was killed here or a file system without locks.

    Raises:
        UserError: another run uses the folder, it holds files of the same names that no run wrote, or it
            cannot be written.
    """
    mark = run_dir / MARK
    if not mark.exists() and (found := written(run_dir)):
        raise UserError(
            f"run.dir {run_dir} holds {found[0]}, which no run has written (there is no {MARK}); {ANOTHER}"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as file:
        before = file.read(4096)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"run.dir {run_dir} is in use by {_owner(before)}; wait for it or {ANOTHER}"
                ) from error
            say(f"{run_dir}: its file system has no locks, so a second run in it would not be noticed")
        else:
            if before.strip():
                say(f"{run_dir}: taking over from {_owner(before)}, which was killed")
        _replace(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}))
        try:
            yield
        finally:
            with suppress(OSError):  # a full disk; the next run will say that this one was killed
                _replace(file, "")
                if not written(run_dir):  # it never began
                    mark.unlink()
                    run_dir.rmdir()


def written(run_dir: Path) -> list[str]:
    """What a folder holds of the names that a run writes."""
    return [name for name in WRITTEN if os.path.lexists(run_dir / name)]


def clear(run_dir: Path, recipe: Recipe) -> None:
    """Delete what a run has written, and nothing else; where a name is a link to a folder, what that holds.

    Raises:
        UserError: the recipe reads something that would be deleted, or something cannot be deleted.
    """
    doomed = [(run_dir / name).resolve() for name in WRITTEN]
    for key, path in _read_by(recipe):
        if any(path.resolve().is_relative_to(one) for one in doomed):
            raise UserError(f"run.overwrite would delete {key} = {path}; move it, or {ANOTHER}")
    for name in WRITTEN:
        try:
            _delete(run_dir / name)
        except OSError as error:
            raise UserError(
                f"run.overwrite cannot delete {error.filename or run_dir / name}: {error.strerror}"
            ) from error


def check_recipe(run_dir: Path, recipe: Recipe) -> list[str]:
    """Compare the recipe with the one that made what the folder holds.

    Returns:
        The recipe's stages that are longer now.

    Raises:
        UserError: they differ in another value that decides what a run learns, or there is none.
    """
    file, found = run_dir / RECIPE, written(run_dir)
    if not found:
        return []
    try:  # keys that it leaves out have their defaults
        made = Recipe(**tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run_dir} holds {found[0]}, but not its {RECIPE}; {OTHERWISE}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged, or of another version of geo_r1; {OTHERWISE}") from error
    before, now = decisive(made), decisive(recipe)
    longer: list[str] = []
    for stage in recipe.run.stages[: -1 if recipe.run.stages[-1] == "eval" else None]:
        for key in ("steps", "epochs"):
            was, wanted = before[stage][key], now[stage][key]
            if was and wanted and wanted > was:
                before[stage][key] = wanted
                longer.append(stage)
    if changed := first_difference(before, now, ""):
        raise UserError(f"{run_dir} was made with {changed}; {OTHERWISE}")
    return longer


def finished_model(run_dir: Path, stage: str) -> Path | None:
    """The exported model of a finished stage, if there is one.

    Raises:
        UserError: there is such a folder, but no whole model in it.
    """
    folder = run_dir / "models" / stage
    if not folder.exists():
        return None
    missing = "config.json"
    if (folder / missing).is_file():
        missing = "model.safetensors"
        index = folder / f"{missing}.index.json"
        if (folder / missing).is_file():
            return folder
        if index.is_file():
            try:
                shards = sorted({*json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError, TypeError):
                shards = [index.name]
            absent = [name for name in shards if name == index.name or not (folder / name).is_file()]
            if not absent:
                return folder
            missing = absent[0]
    raise UserError(
        f"{folder} is no whole model: {missing} is missing or damaged; delete the folder to train {stage}"
    )


def _read_by(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    yield "model.path", Path(recipe.model.path)
    for stage in ("pretrain", "sft", "grpo", "eval"):
        yield f"{stage}.data", Path(getattr(recipe, stage).data)
    if recipe.data.image_root is not None:
        yield "data.image_root", recipe.data.image_root


def _delete(path: Path) -> None:
    """Rename first, so that what is half deleted has another name."""
    if path.is_symlink() and path.is_dir():  # people put checkpoints on a larger disk
        for child in path.iterdir():
            _delete(child)
    elif path.is_dir():
        gone = beside(path)
        if gone.exists():
            shutil.rmtree(gone)
        path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _owner(mark: str) -> str:
    try:
        found = json.loads(mark)
        return f"process {found['pid']} on {found['host']}, started {found['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _replace(file, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
