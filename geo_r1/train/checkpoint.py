"""Checkpoints and exported models: written beside, then renamed, so what exists is whole.

checkpoints/<stage>-000100/   a transformers folder (weights, tokenizer, image processor) + trainer.pt
models/<stage>/               the same without trainer.pt: what a finished stage leaves
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

TRAINER_STATE = "trainer.pt"


def save_folder(
    folder: Path, model: PreTrainedModel, companions: list[Any], state: dict[str, Any] | None = None
) -> None:
    """Write a transformers folder, with the trainer's state if given; it appears whole or not at all.

    Args:
        companions: tokenizer and image processor, saved beside the weights.
    """
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for piece in (model, *companions):
        piece.save_pretrained(partial)
    if state is not None:
        torch.save(state, partial / TRAINER_STATE)
    for file in partial.iterdir():  # on the disk before the name is
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    assert not folder.exists(), f"{folder} is there already"
    partial.rename(folder)


def checkpoint_folder(run_dir: Path, stage: str, step: int) -> Path:
    return run_dir / "checkpoints" / f"{stage}-{step:06d}"


def newest_checkpoint(run_dir: Path, stage: str) -> Path | None:
    """The whole checkpoint of a stage with the most steps, if there is one."""
    found = sorted(
        (run_dir / "checkpoints").glob(f"{stage}-[0-9]*"), key=lambda p: int(p.name.split("-")[-1])
    )
    return found[-1] if found else None


def restore(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Load a checkpoint's weights into the model and return the trainer's state.

    Raises:
        ValueError: the checkpoint is of another model, or a file of it is missing or broken; names it.
    """
    try:
        family: Any = type(model)
        loaded, report = family.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        state = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"checkpoint {folder} cannot be read: {reason}") from error
    if not isinstance(state, dict) or not {"step", "optimizer"} <= state.keys():
        raise ValueError(f"checkpoint {folder} cannot be read: {TRAINER_STATE} holds no trainer's state")
    if report["missing_keys"]:
        raise ValueError(f"checkpoint {folder} is of another model: it has no {min(report['missing_keys'])}")
    own, saved = model.state_dict(), loaded.state_dict()
    for name in sorted(own.keys() | saved.keys()):
        shapes = [list(weights[name].shape) if name in weights else "absent" for weights in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"checkpoint {folder} is of another model: {name} is {shapes[0]} there, {shapes[1]} here"
            )
    model.load_state_dict(saved)
    return state


def prune(run_dir: Path, stage: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a stage, and what a killed run left half-written."""
    folder = run_dir / "checkpoints"
    found = sorted(folder.glob(f"{stage}-[0-9]*"), key=lambda p: int(p.name.split("-")[-1]))
    for old in found[: len(found) - keep]:
        old.rename(_partial(old))
    for partial in folder.glob(f".{stage}-*.partial"):
        shutil.rmtree(partial)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
