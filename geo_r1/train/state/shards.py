"""A state on disk: tensors in shards, by torch.distributed.checkpoint, and everything else in trainer.json.

A state is {section: {name: tensor, DTensor or number}}. Its section "trainer" is anything that JSON can hold.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from geo_r1.errors import UserError
from geo_r1.files import beside, publish, sync
from geo_r1.train.state.manifest import Reader, write_manifest, write_sums

TRAINER, PLAIN = "trainer", "trainer.json"
State = dict[str, dict[str, Any]]
# Raised while unpickling, depending on the bytes of a broken file.
MALFORMED = (AttributeError, EOFError, ImportError, LookupError, TypeError, ValueError)


class Writer(dcp.FileSystemWriter):
    """Writes a checkpoint beside; rank 0 gives it its name when every rank has written its part."""

    def __init__(self, folder: Path, plain: State, then: Callable[[], None], rank: int, size: int) -> None:
        # Tensors are on the host already, and the copying thread would open a context on GPU 0.
        super().__init__(beside(folder), per_thread_copy_ahead=0)
        self.folder, self.then, self.own_rank, self.size = folder, then, rank, size
        self.plain = json.dumps(plain)  # now: the trainer goes on

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # Tensors that every rank holds whole are copied and written by one rank each.
        return {
            name: tensor.to("cpu", copy=True)
            for index, (name, tensor) in enumerate(state_dict.items())
            if isinstance(tensor, DTensor) or index % self.size == self.own_rank
        }

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan  # rank 0 makes the folder, in prepare_global_plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        unfinished = beside(self.folder)
        if unfinished.exists():  # of a run that was killed
            shutil.rmtree(unfinished)
        unfinished.parent.mkdir(exist_ok=True)
        unfinished.mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch's serializer hides a full disk behind "unexpected pos"
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        folder = beside(self.folder)
        write_sums(folder, [*folder.glob(f"{plan.storage_data.prefix}*")], self.own_rank)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        unfinished = beside(self.folder)
        (unfinished / PLAIN).write_text(self.plain)
        sync(unfinished / PLAIN)  # torch has synced the shards
        write_manifest(unfinished)
        publish(unfinished, self.folder)
        self.then()


def values_of(state: State) -> Iterator[tuple[str, str, Any]]:
    """Section, name and value of all tensors and numbers."""
    for section, values in state.items():
        if section != TRAINER:
            yield from ((section, name, value) for name, value in values.items())


def tensors_of(state: State) -> dict[str, Tensor]:
    """All tensors by section.name, without their gradients."""
    return {f"{section}.{name}": x.detach() for section, name, x in values_of(state) if isinstance(x, Tensor)}


def plain_of(state: State) -> State:
    """The part of a state that is no tensor."""
    plain: State = {TRAINER: state[TRAINER]}
    for section, name, value in values_of(state):
        if not isinstance(value, Tensor):
            plain.setdefault(section, {})[name] = value
    return plain


def check(folder: Path, state: State) -> State:
    """Compare a checkpoint with the state that it will fill; returns its part that is no tensor.

    Raises:
        UserError: they differ, or the checkpoint cannot be read.
    """
    try:
        tensors = Reader(folder).read_metadata().state_dict_metadata
        plain = json.loads((folder / PLAIN).read_text())
        if not isinstance(plain, dict) or not isinstance(plain.get(TRAINER), dict):
            raise ValueError(f"{PLAIN} holds no trainer's state")
    except (OSError, pickle.UnpicklingError, *MALFORMED) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {reason_of(error)}") from error
    own = {f"{section}.{name}": _kind(value) for section, name, value in values_of(state)}
    saved = {name: _kind(value) for name, value in tensors.items()}
    saved |= {f"{section}.{name}": _kind(value) for section, name, value in values_of(plain)}
    asked = tuple(f"{section}." for section in state)
    for name in sorted(own.keys() | {name for name in saved if name.startswith(asked)}):
        there, here = saved.get(name), own.get(name, "absent")
        if there is None:
            raise UserError(f"checkpoint {folder} is of another model: it has no {name}")
        if there != here:
            raise UserError(f"checkpoint {folder} is of another model: {name} is {there} there, {here} here")
    return plain


def _kind(value: Any) -> str:
    """Equal for a value in a checkpoint and the one that takes it."""
    if isinstance(value, TensorStorageMetadata):
        return f"{list(value.size)} {value.properties.dtype}".replace("torch.", "")
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}".replace("torch.", "")
    return "a number"


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong, with the file's name if it is about one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
