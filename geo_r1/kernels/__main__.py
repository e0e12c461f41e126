"""Prints which kernels are built here, which run by default on each device, and why.

python -m geo_r1.kernels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from geo_r1.kernels import available_impls, extension, impls
from geo_r1.kernels.attention import libraries
from geo_r1.kernels.launch import CHIPS

CHIP_NAMES = tuple(f"sm_{chip}" for chip in CHIPS)
HEADINGS = ("op", "default", "because", "by name", "cannot run")


def main() -> None:
    lines = aligned(built())
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        lines += ["", title(device), *(f"  {line}" for line in report(device))]
    print("\n".join(lines))


def built() -> list[tuple[str, str]]:
    """Each thing that the implementations need, and whether it is installed."""
    archs, place = extension.built()
    found = (
        f"{library.package or 'torch'} {libraries.version(library.package)}"
        for library in libraries.installed()
    )
    triton = libraries.version("triton") or "not installed"
    return [
        ("CUDA kernels", f"built for {archs}: {place}" if archs else f"none: {place}"),
        ("Triton", f"{triton}; its kernels are built and judged for {listed(CHIP_NAMES)}"),
        ("flash", listed(found)),
    ]


def title(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}: {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def report(device: torch.device) -> list[str]:
    """A table of the ops, and the reasons why some implementations cannot run."""
    rows: list[Sequence[str]] = [HEADINGS]
    reasons: dict[str, None] = {}  # each once, in order
    for op in available_impls():
        default, *others = impls.runs_on(op, device)
        missing = [name for name in impls.implementations(op) if name not in (default, *others)]
        rows.append((op, default, because(op, device, default), listed(others), listed(missing)))
        reasons |= dict.fromkeys(f"no {name}: {impls.why_not(op, name, device)}" for name in missing)
    return [*aligned(rows), *reasons]


def because(op: str, device: torch.device, default: str) -> str:
    """The reason why an implementation is the default."""
    name, record = impls.fastest_on(op, device) or ("", "")
    if name == default:
        return f"fastest in benchmarks/results/{record}"
    return "always on a CPU" if device.type == "cpu" else "first that runs"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "-"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


if __name__ == "__main__":
    main()
