"""Builds the CUDA kernels of csrc/ for this GPU, in place: `python3 -m benchmarks.extension RECORD`.

A record describes its commit, so an earlier build is brought up to date, or removed if that fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from benchmarks.lines import stage_options, write_line
from csrc import nvcc


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = stage_options(__doc__, argv)
    if options.device == "cpu":
        write_line(options.record, skipped="no GPU to build for")
        return 0
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    try:
        toolchain = nvcc.find_toolchain({"GEO_R1_CUDA_ARCHS": arch, **os.environ})
        versions = {"nvcc": ".".join(map(str, toolchain.release))}
        target = nvcc.ROOT / "geo_r1" / nvcc.EXTENSION
        target.unlink(missing_ok=True)
        write_line(options.record, device={"extension": "", "versions": versions})
        nvcc.install(nvcc.build(toolchain), target)
    except nvcc.UnavailableError as reason:
        write_line(options.record, skipped=str(reason))
        return 0
    except nvcc.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    from geo_r1.kernels import extension  # only once it is built

    archs, _ = extension.built()
    write_line(options.record, device={"extension": archs, "versions": versions})
    if (problem := extension.why_not(torch.device("cuda"))) is not None:
        print(problem, file=sys.stderr)
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
