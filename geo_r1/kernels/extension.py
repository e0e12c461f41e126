"""The CUDA kernels of csrc/: the module geo_r1._C, which exists if the package was built with nvcc."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_BUILD = "pip install . builds it if it finds nvcc of CUDA 12.8 or later"
_LEAST = (8, 0)  # compute capability


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    package = str(Path(__file__).parents[1])
    # Only in this package's folder: an editable install of another checkout could provide its own build.
    if "geo_r1._C" not in sys.modules and not PathFinder.find_spec("geo_r1._C", [package]):
        return None, f"geo_r1._C is not built; {_BUILD}"
    try:
        return importlib.import_module("geo_r1._C"), ""
    except ModuleNotFoundError:
        return None, f"geo_r1._C is not built; {_BUILD}"
    except ImportError as error:  # built for another Python or C library
        return None, f"geo_r1's CUDA kernels do not load: {error}"


_C, _absent = _load()


def built() -> tuple[str, str]:
    """Architectures as passed to nvcc ("80;90a") and the file; without an extension, "" and the reason."""
    return (_C.archs, str(_C.__file__)) if _C is not None else ("", _absent)


def why_not(device: torch.device, *, only: str | None = None) -> str | None:
    """Say why CUDA kernels do not run on a device; None if they do.

    Args:
        device: of the inputs.
        only: the architecture, if a kernel is written for one alone ("90a") and always built for it.
    """
    if _C is None:
        return _absent
    if device.type != getattr(_C, "runs_on", "cuda"):  # tests install a build for CPUs
        return f"device {device}"
    if device.type != "cuda":
        return None
    major, minor = capability = torch.cuda.get_device_capability(device)
    gpu = f"this GPU is {major}.{minor}"
    if capability < _LEAST:
        return f"written for compute capability 8.0 or later, {gpu}"
    if only is not None and not _fits(only, capability):
        return f"written for compute capability {'.'.join(map(str, _capability(only)))}, {gpu}"
    if only is None and not any(_fits(arch, capability) for arch in _C.archs.split(";")):
        wanted = "90a" if capability == (9, 0) else f"{major}{minor}"
        return f"built for {_C.archs}, {gpu}; GEO_R1_CUDA_ARCHS={wanted} builds for it"
    return None


def launch(name: str, like: Tensor, **arguments: Tensor | torch.dtype | str | float | None) -> None:
    """Start a launcher of csrc/ops.h on the device of `like` and its current stream.

    Tensors, all on that device, are passed as addresses, and dtypes as names. Nothing needs to wait: torch
    reuses memory that is freed after the launch only on the same stream, and so only after the kernel.
    """
    device, stream = 0, 0
    if like.device.type == "cuda":
        device, stream = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    getattr(_C, name)(device=device, stream=stream, **{k: _plain(x) for k, x in arguments.items()})


def _plain(argument: Tensor | torch.dtype | str | float | None) -> str | float | None:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    return argument


def _capability(arch: str) -> tuple[int, int]:
    major, minor = divmod(int(arch.rstrip("a")), 10)
    return major, minor


def _fits(arch: str, capability: tuple[int, int]) -> bool:
    """Code for "80" runs on 8.0 and every later 8.x; code for "90a" on 9.0 alone."""
    built = _capability(arch)
    return built == capability if arch.endswith("a") else built[0] == capability[0] and built <= capability
