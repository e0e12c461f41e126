"""Chooses which implementation of an op runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from geo_r1.kernels import extension

# Op -> implementations. A GPU takes the first that runs on it, unless a record says otherwise. A CPU takes
# the reference, since all others run there in an interpreter.
_IMPLS: dict[str, tuple[str, ...]] = {
    "group_advantage": ("triton", "reference", "cuda"),
    "grpo_loss": ("triton", "reference", "cuda"),
    "linear_grpo_loss": ("triton", "reference", "cuda"),
    "linear_logprob": ("triton", "reference", "cuda"),
    "linear_cross_entropy": ("triton", "reference", "cuda"),
    "packed_attention": ("triton", "reference", "cuda", "flash"),
}
_KNOWN = ("reference", "triton", "cuda", "flash")
# Ops whose CUDA kernels are written for one architecture.
_CUDA_ONLY = {"packed_attention": "90a"}

# (op, device as torch.cuda.get_device_name gives it) -> (our fastest implementation, the record in
# benchmarks/results/ that shows it). Empty: nothing has been measured on a GPU yet.
_FASTEST: dict[tuple[str, str], tuple[str, str]] = {}

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's switch for interpreting kernels on CPU tensors, which is slow. Triton reads it when a kernel is
# first imported.
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_F = TypeVar("_F", bound=Callable[..., object])


def _constant(function: _F) -> _F:
    """Let a tracer call the function and keep its result, since it cannot trace device queries.

    Does what torch.compiler.assume_constant_result does without importing torch._dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available_impls() -> dict[str, tuple[str, ...]]:
    """List, for each op, the implementations that can run on this machine, the default first.

    On a GPU the default is "triton", or an implementation that a benchmark record of that GPU shows to be
    faster. Inputs that it does not take (see docs/kernels.md) go to the next one; an implementation that
    `impl=` names raises instead. "cuda" needs a build for this GPU, and runs only if named or with a record.
    `packed_attention` takes "flash" for segments of more than 64 tokens. On a CPU "triton" runs only in
    Triton's interpreter.
    `python -m geo_r1.kernels` prints this list with the reasons.

    Returns:
        A new dict from op name to names accepted by that op's `impl=`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: runs_on(op, device) for op in _IMPLS}


def resolve_impl(
    op: str, impl: str | None, device: torch.device, refused: Mapping[str, str] | None = None
) -> str:
    """Turn a user's `impl=` into the implementation that runs.

    Args:
        op: name of the op, a key of `available_impls()`.
        impl: None for the default, or one name.
        device: of the op's inputs.
        refused: implementations that do not take these inputs, with the reason ("float64 inputs").

    Returns:
        The implementation's name.

    Raises:
        ValueError: no such op, no such implementation, or it cannot run here or on these inputs.
    """
    if op not in _IMPLS:
        raise ValueError(f"no op {op!r}; ops are {', '.join(_IMPLS)}")
    available = runs_on(op, device)
    refused = refused or {}
    if impl is None:
        return next(name for name in available if name not in refused)
    if impl not in available:
        problem = "cannot run here" if impl in _KNOWN else "is not known"
        raise ValueError(
            f"{op}: impl={impl!r} {problem} ({why_not(op, impl, device)}); "
            f"available: {', '.join(available)}, or None for the default"
        )
    if impl in refused:
        raise ValueError(f"{op}: impl={impl!r} does not take {refused[impl]}; use None for the default")
    return impl


def implementations(op: str) -> tuple[str, ...]:
    """All implementations of an op, whether or not they can run here."""
    return _IMPLS[op]


@_constant
def runs_on(op: str, device: torch.device) -> tuple[str, ...]:
    """Implementations of an op that can run on a device, the default first."""
    names = [name for name in _IMPLS[op] if why_not(op, name, device) is None]
    fastest, _ = fastest_on(op, device) or (names[0], "")
    first = "reference" if device.type == "cpu" else fastest
    return tuple(sorted(names, key=lambda name: name != first))


@_constant
def why_not(op: str, impl: str, device: torch.device) -> str | None:
    """Say why an implementation of an op cannot run on a device; None if it can."""
    if impl not in _IMPLS[op]:
        return f"{op} has none" if impl in _KNOWN else f"device {device}"
    if impl == "cuda":
        return extension.why_not(device, only=_CUDA_ONLY.get(op))
    if impl == "triton" and not _HAS_TRITON:
        return "triton is not installed"
    interpreted = impl == "triton" and device.type == "cpu" and _INTERPRETED
    if device.type == "cuda" and impl == "flash":
        return _why_no_flash(device)
    return None if impl == "reference" or device.type == "cuda" or interpreted else f"device {device}"


def _why_no_flash(device: torch.device) -> str | None:
    """Say why the libraries' kernels cannot run on a GPU."""
    if torch.version.hip:
        return "an AMD GPU, where log-sum-exps have another layout"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"for compute capability 8.0 or later, this GPU is {capability[0]}.{capability[1]}"
    return None


@_constant
def fastest_on(op: str, device: torch.device) -> tuple[str, str] | None:
    """The fastest implementation on a device and the name of the record that shows it, or None."""
    return _FASTEST.get((op, torch.cuda.get_device_name(device))) if device.type == "cuda" else None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype for products on a device; None if autocast is off.

    Only asks about devices that implementations run on: torch cannot trace `is_autocast_available`.
    """
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
