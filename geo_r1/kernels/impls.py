"""Which implementation of an op runs: one table, one way to choose."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch

# Op -> implementations, the preferred first. A device takes the first that runs on it; a CPU the reference.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "group_advantage": ("triton", "reference"),
    "grpo_loss": ("triton", "reference"),
    "linear_grpo_loss": ("triton", "reference"),
    "linear_logprob": ("triton", "reference"),
    "linear_cross_entropy": ("triton", "reference"),
    "packed_attention": ("triton", "reference", "flash"),
}
_KNOWN = ("reference", "triton", "cuda", "flash")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch, which it reads when a kernel is first imported: kernels run on CPU tensors, slowly.
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def available_impls() -> dict[str, tuple[str, ...]]:
    """List, for each op, the implementations that can run on this machine, the default first.

    On a GPU "triton" is the default; dtypes and sizes that it does not take (see docs/kernels.md) run as
    "reference" unless `impl=` names one, and then raise. On a CPU "triton" runs only in Triton's interpreter.

    Returns:
        A new dict from op name to names accepted by that op's `impl=`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: _runs_on(op, device) for op in _PREFERRED}


def resolve_impl(
    op: str, impl: str | None, device: torch.device, refused: Mapping[str, str] | None = None
) -> str:
    """Turn the `impl=` a user gave into the implementation that runs.

    Args:
        op: name of the op, a key of `available_impls()`.
        impl: None for the default, or one name.
        device: where the op's inputs live.
        refused: implementations that do not take these inputs, with the reason ("float64 inputs").

    Returns:
        The implementation's name.

    Raises:
        ValueError: no such op, no such implementation, or it cannot run here or with these inputs.
    """
    if op not in _PREFERRED:
        raise ValueError(f"no op {op!r}; ops are {', '.join(_PREFERRED)}")
    available = _runs_on(op, device)
    refused = refused or {}
    if impl is None:
        return next(name for name in available if name not in refused)
    if impl not in available:
        problem = "cannot run here" if impl in _KNOWN else "is not known"
        raise ValueError(
            f"{op}: impl={impl!r} {problem} (device {device}); available: {', '.join(available)}, "
            "or None for the default"
        )
    if impl in refused:
        raise ValueError(f"{op}: impl={impl!r} does not take {refused[impl]}; use None for the default")
    return impl


def _runs_on(op: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda" and _HAS_TRITON:
        return _PREFERRED[op]
    if device.type == "cpu" and _INTERPRETED:
        return ("reference", "triton")
    return ("reference",)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast runs products in on a device, None where it is off.

    Only devices that implementations run on are asked: torch cannot trace `is_autocast_available`.
    """
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
