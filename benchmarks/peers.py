"""Our implementations as providers; which peers are here, and why one is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Provider
from benchmarks.meters import Tensors
from geo_r1.kernels import available_impls


def why_missing(package: str, *, needs_gpu: bool = True) -> str | None:
    """None where a package can be imported and run here, else the reason why not."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if needs_gpu and not torch.cuda.is_available():
        return f"{package} needs a GPU"
    return None


def why_not_compiled() -> str | None:
    """None where torch.compile is timed: for a CPU it takes longer than the small sizes are worth."""
    return None if torch.cuda.is_available() else "torch.compile is timed on a GPU only"


def ours(
    op: str,
    build: Callable[[str], Callable[[], Tensors]],
    unpack: Callable[[Tensors], Sequence[Tensor]] = tuple,
) -> list[Provider]:
    """A provider for each implementation of an op of ours; `build` makes its function."""
    return [
        Provider(f"geo_r1 {impl}", lambda impl=impl: build(impl), kind="ours", unpack=unpack)
        for impl in _impls(op)
    ]


def our_names(op: str) -> list[str]:
    return [f"geo_r1 {impl}" for impl in _impls(op)]


def _impls(op: str) -> list[str]:
    """On a CPU the reference alone: Triton's interpreter is not worth timing."""
    return [impl for impl in available_impls()[op] if torch.cuda.is_available() or impl == "reference"]
