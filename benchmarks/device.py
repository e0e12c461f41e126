"""What the benchmarks run on, and how fast it is at the two things every kernel is made of.

`python3 -m benchmarks.device RECORD` writes it as JSON; exit code 2 says that there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ceilings
from benchmarks.meters import CpuMeter, CudaMeter
from geo_r1.kernels import extension

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "pytest",
    "pytest-benchmark",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "trl",
)
REPETITIONS = 10


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(device: torch.device) -> dict[str, Any]:
    """Name, sizes and versions, as a record holds them."""
    archs, _ = extension.built()  # "" where it is not built; the part of that name may build it yet
    found: dict[str, Any] = {"type": device.type, "versions": versions(), "extension": archs}
    if device.type == "cpu":
        return found | {"name": "cpu", "processor": processor(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
        "l2_mib": properties.L2_cache_size / 2**20,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Of Python and of each package that takes part and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_ceilings(device: torch.device) -> Ceilings:
    """A matrix product (bfloat16, on a CPU float32) and a copy, on random data."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product_ms = _median_ms(device, lambda: torch.mm(a, b, out=out))
    num_bytes = 2**32 if on_gpu else 2**27
    source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(device, lambda: target.copy_(source))
    return Ceilings(2 * n**3 / product_ms / 1e9, 2 * num_bytes / copy_ms / 1e6)


def _median_ms(device: torch.device, function: Callable[[], Any]) -> float:
    meter: CudaMeter | CpuMeter = CudaMeter(device) if device.type == "cuda" else CpuMeter()
    meter.warm_up(function)
    return statistics.median(meter.read(meter.repeat(function, 0.0)) for _ in range(REPETITIONS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    begin = time.perf_counter()
    ceilings = measure_ceilings(device)
    text = json.dumps({**facts(device), "ceilings": vars(ceilings), "seconds": time.perf_counter() - begin})
    options.record.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
