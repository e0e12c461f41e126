"""The device that the benchmarks run on, and its speed at matrix products and copies.

`python3 -m benchmarks.device RECORD` writes a JSON line; exit code 2 means that there is no GPU.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import stage_options, write_line
from geo_r1.kernels import extension

PACKAGES = (
    *("torch", "triton", "transformers", "pytest", "pytest-benchmark"),
    *("liger-kernel", "cut-cross-entropy", "flash-attn", "flash-attn-3", "flash-attn-4"),
    "trl",
)
REPETITIONS = 10  # on a CPU


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(device: torch.device) -> dict[str, Any]:
    """Name, sizes and versions, as a record holds them."""
    archs, _ = extension.built()  # "" if it is not built; the next stage may build it
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
    """Versions of Python and of each installed package that matters."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Rates of a matrix product (bfloat16, on a CPU float32) and of a copy (read + write), on random data."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product_ms = median_ms(on_gpu, lambda: torch.mm(a, b, out=out))
    num_bytes = 2**32 if on_gpu else 2**27
    source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(on_gpu, lambda: target.copy_(source))
    return {"matmul_tflops": 2 * n**3 / product_ms / 1e9, "copy_gbps": 2 * num_bytes / copy_ms / 1e6}


def median_ms(on_gpu: bool, function: Callable[[], Any], gpu_ms: int = 100) -> float:
    """Median time of a function; on a GPU it is repeated for `gpu_ms`."""
    if on_gpu:
        from triton.testing import do_bench

        return do_bench(function, warmup=gpu_ms // 4, rep=gpu_ms, return_mode="median")
    return 1e3 * statistics.median(timeit.repeat(function, number=1, repeat=REPETITIONS + 1)[1:])


def main() -> int:
    options = stage_options(__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    write_line(options.record, device=facts(device), ceilings=measure_ceilings(device))
    print(options.record.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
