"""Builds the CUDA kernels of csrc/ for the host: they run on CPU tensors, as Triton's do in its interpreter.

g++ compiles the same files with replacements of CUDA's headers and of csrc/ptx.cuh (`include/`). A launch
runs its blocks one after another; each thread is a fiber. Asynchronous work (copies and products) happens as
late as the kernel's waits allow, so a missing wait or barrier shows as a wrong result.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Literal

from csrc.nvcc import digest, with_headers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
FLAGS = (
    *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"),
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-psabi",  # g++'s remark on parameters as wide as CUtensorMap
    "-fno-extern-tls-init",  # shared arrays are thread_local here, and have no constructors
)
OWN_SOURCES = sorted(HERE.glob("*.cpp"))

Order = Literal["forward", "backward", "shuffled"]
_ORDERS: tuple[Order, ...] = ("forward", "backward", "shuffled")


def why_not() -> str | None:
    """Say what this machine lacks for the build; None if nothing."""
    if sys.platform != "linux":
        return f"the CUDA kernels run on a CPU only on Linux, this is {sys.platform}"
    if shutil.which("g++") is None:
        return "the CUDA kernels run on a CPU only where g++ is found; install it"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA kernels run on a CPU only where pybind11 is found; pip install '.[test]' brings it"
    return None


def build(source_dir: Path = CSRC, out_dir: Path = BUILD) -> Path:
    """Compile a folder's kernels and bindings.cpp into the extension `_C`, unless that was done before.

    Returns:
        The extension's file, in a folder of `out_dir` named by a digest of its inputs.

    Raises:
        RuntimeError: g++ or pybind11 is missing, or g++ fails; the message is its output.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    import pybind11

    sources = [*sorted(source_dir.glob("*.cu")), source_dir / "bindings.cpp"]
    flags = [
        *(f"-I{path}" for path in (HERE / "include", source_dir)),
        *(f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])),
        '-DGEO_R1_CUDA_ARCHS="emulated"',
    ]
    return link(sources, flags, "_C" + importlib.machinery.EXTENSION_SUFFIXES[0], out_dir)


def link(sources: Iterable[Path], flags: Sequence[str], name: str, out_dir: Path = BUILD) -> Path:
    """Compile files and the emulator into a shared library of that name, as `build` does."""
    flags = (*FLAGS, *flags)
    include_dirs = [Path(flag.removeprefix("-I")) for flag in flags if flag.startswith("-I")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda source: _compile(source, flags, include_dirs, out_dir), [*sources, *OWN_SOURCES])
        )
    library = out_dir / digest(path.name for path in objects) / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _run("g++", "-shared", *map(str, objects), out=library)
    return library


@functools.cache
def load() -> ModuleType:
    """Build the extension of csrc/ and import it as `geo_r1._C`, without putting it into `sys.modules`.

    Its attribute `runs_on` is "cpu": addresses are those of CPU tensors.
    """
    path = build()
    loader = importlib.machinery.ExtensionFileLoader("geo_r1._C", str(path))
    spec = importlib.util.spec_from_file_location("geo_r1._C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.__dict__["runs_on"] = "cpu"
    prepare(path)
    return module


def adversary(late: bool = True, order: Order = "forward", *, seed: int = 0) -> None:
    """Choose the order of events in launches of `load()` from now on; the defaults are those at the start.

    Args:
        late: copies arrive and products are computed as late as possible; False: at once.
        order: of the threads' turns between barriers, by index. With "backward" copies arrive before products
            that are under way read shared memory, with "forward" after. "shuffled" draws all of this at
            random, and lets threads overtake each other wherever they synchronise.
        seed: of the random order.
    """
    set_adversary(prepare(Path(str(load().__file__))), late, order, seed)


def set_adversary(library: ctypes.CDLL, late: bool, order: Order, seed: int = 0) -> None:
    """As `adversary`, for a library of `link()`."""
    library.emulator_adversary(int(late), _ORDERS.index(order), ctypes.c_uint(seed))


@functools.cache
def prepare(path: Path) -> ctypes.CDLL:
    """Load a library of `link()` and register its static shared arrays, to be filled before each block."""
    library = ctypes.CDLL(str(path))
    symbols = subprocess.run(["readelf", "-sW", path], check=True, capture_output=True, text=True).stdout
    found = re.findall(r": ([0-9a-f]+) +(\w+) TLS .* (\S+)$", symbols, re.MULTILINE)
    places = {symbol: (int(start, 16), int(size, 0)) for start, size, symbol in found}
    storage, _ = places["emulator_storage"]
    for symbol, (start, size) in places.items():
        if symbol.startswith("_ZZN6geo_r1"):  # a variable of a function in namespace geo_r1
            library.emulator_static_array(ctypes.c_long(start - storage), ctypes.c_ulong(size))
    return library


def _compile(source: Path, flags: Sequence[str], include_dirs: Sequence[Path], out_dir: Path) -> Path:
    files = with_headers(source, include_dirs)
    texts = (path.read_text(encoding="utf-8") for path in files)
    key = digest((*flags, _compiler(), *map(str, files), *texts))
    out = out_dir / "objects" / f"{source.stem}-{key}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        _run("g++", *flags, "-c", "-x", "c++", str(source), out=out)
    return out


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


def _run(*command: str, out: Path) -> None:
    """Run a compiler that makes one file, which appears whole or not at all."""
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True)
    if done.returncode != 0:
        beside.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    os.replace(beside, out)
