"""Builds geo_r1._C, the extension of csrc/, wherever nvcc is found: without a GPU, without torch.

    python -m csrc.nvcc      # in a checkout: what has changed, into geo_r1/

setup.py builds by the same functions. Variables that are read:

    GEO_R1_BUILD_CUDA    0: do not build (what is there stays); 1: no nvcc is an error; not set: where it is.
    GEO_R1_CUDA_ARCHS    compute capabilities as nvcc writes them, "80;90a"; not set: 80, 90a and 100.
    CUDA_HOME, CUDA_PATH the toolkit; neither set: nvcc on PATH, else in /usr/local/cuda.

Objects, and for each the words of ptxas that gate.py judges, are kept in build/csrc/. One is made again when
the content of its source or of a header changed, or the command, or nvcc.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

_DEFAULT_HOME = Path("/usr/local/cuda")
_DEFAULT_ARCHS = ("80", "90a", "100")
_OLDEST = (12, 8)  # the first that knows 100; earlier ones were not tried
_LEAST_ARCH = 80  # the first with bfloat16 and asynchronous copies
_ALTERS_COMMANDS = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


class UnavailableError(Exception):
    """Nothing is built here, and why."""


class BuildError(Exception):
    """What was asked for cannot be built."""


@dataclass(frozen=True)
class Toolchain:
    """An nvcc, its release (13, 0), all that it says of its version, and what to build for."""

    nvcc: Path
    release: tuple[int, int]
    version: str
    archs: tuple[str, ...]


def find_toolchain(environ: Mapping[str, str] = os.environ) -> Toolchain:
    """Find what to build with.

    Raises:
        UnavailableError: nothing is to be built, or no nvcc is found, or a too old one, and none is demanded.
        BuildError: a variable holds what it cannot, or demands an nvcc that is not there.
    """
    wish = environ.get("GEO_R1_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"GEO_R1_BUILD_CUDA={wish}: expected 0 (do not build) or 1 (no nvcc is an error)")
    if wish == "0":
        raise UnavailableError("GEO_R1_BUILD_CUDA=0")
    try:
        nvcc = find_nvcc(environ)
        version = _ask(nvcc, "--version")
        release = read_release(version)
        if release < _OLDEST:
            needed, found = (".".join(map(str, numbers)) for numbers in (_OLDEST, release))
            raise UnavailableError(f"{nvcc} is {found}, and CUDA {needed} or later is needed")
    except UnavailableError as reason:
        if wish == "1":
            raise BuildError(f"GEO_R1_BUILD_CUDA=1, but {reason}") from None
        raise
    known = re.findall(r"compute_(\d+)$", _ask(nvcc, "--list-gpu-arch"), re.MULTILINE)
    return Toolchain(nvcc, release, version, parse_archs(environ.get("GEO_R1_CUDA_ARCHS", ""), known))


def find_nvcc(environ: Mapping[str, str]) -> Path:
    """The nvcc of the toolkit that the environment names, else of PATH, else of the usual place."""
    if sys.platform != "linux":
        raise UnavailableError(f"CUDA kernels are built on Linux only, this is {sys.platform}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ.get(name):
            nvcc = Path(home, "bin", "nvcc")
            if not nvcc.is_file():
                raise UnavailableError(f"there is no {nvcc} ({name}={home})")
            return nvcc
    if found := shutil.which("nvcc", path=environ.get("PATH", "")):
        return Path(found)
    nvcc = _DEFAULT_HOME / "bin" / "nvcc"
    if not nvcc.is_file():
        raise UnavailableError(f"there is no nvcc on PATH nor in {nvcc.parent}, and CUDA_HOME is not set")
    return nvcc


def read_release(version: str) -> tuple[int, int]:
    """(13, 0) from what `nvcc --version` prints."""
    found = re.search(r"release (\d+)\.(\d+)", version)
    if not found:
        raise BuildError(f"nvcc --version names no release: {version.strip()!r}")
    return int(found[1]), int(found[2])


def parse_archs(text: str, known: list[str]) -> tuple[str, ...]:
    """The compute capabilities asked for, each once; if none are, those of the default that nvcc knows.

    Args:
        text: "80;90a", separated by semicolons or commas.
        known: numbers that this nvcc lists; from 90 on each has an "a" too, which nvcc does not list.
    """
    names = {name for number in known for name in (number, f"{number}a") if int(number) >= _LEAST_ARCH}
    names -= {name for name in names if name.endswith("a") and int(name[:-1]) < 90}
    asked = tuple(dict.fromkeys(arch.strip() for arch in re.split("[;,]", text) if arch.strip()))
    for arch in asked:
        if arch not in names:
            choices = ", ".join(sorted(names, key=lambda name: (int(name.rstrip("a")), name)))
            raise BuildError(
                f"GEO_R1_CUDA_ARCHS={text}: {arch!r} is none of what nvcc and csrc/ know: {choices}"
            )
    return asked or tuple(arch for arch in _DEFAULT_ARCHS if arch in names)


def _ask(nvcc: Path, option: str) -> str:
    done = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{nvcc} {option} fails: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True)
class Unit:
    """A source and what becomes of it.

    Attributes:
        source: relative to the project.
        archs: what its kernels are built for.
        command: makes the object; its outputs are added to it.
        key: what the result depends on apart from the content of files.
    """

    source: Path
    archs: tuple[str, ...]
    command: tuple[str, ...]
    key: str

    def output(self, root: Path, suffix: str) -> Path:
        """.o the object, .log what ptxas said, .stamp what both were made from."""
        return root / "build" / "csrc" / f"{self.source.stem}{suffix}"


def list_units(root: Path, toolchain: Toolchain) -> list[Unit]:
    """Every source of csrc/, the largest first: it takes longest.

    Names that hold "_sm90" are built for 90a alone, whatever else is asked for: their kernels are made of
    instructions that no other chip has, and their launchers must be there in any case.
    """
    sources = [*root.glob("csrc/*.cu"), root / "csrc" / "bindings.cpp"]
    return [
        _unit(source.relative_to(root), toolchain)
        for source in sorted(sources, key=lambda source: (-source.stat().st_size, source.name))
    ]


def _unit(source: Path, toolchain: Toolchain) -> Unit:
    common: tuple[str, ...] = (
        str(toolchain.nvcc),
        "-std=c++17",
        "-O3",
        "--Werror",
        "all-warnings",
        "-I",
        "csrc",
    )
    common += ("-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden")
    told = "\n".join([toolchain.version, *(f"{name}={os.environ.get(name)}" for name in _ALTERS_COMMANDS)])
    if source.suffix == ".cpp":
        try:
            import pybind11
        except ImportError:
            raise BuildError("building csrc/ needs pybind11; try: pip install pybind11") from None
        common += (f'-DGEO_R1_CUDA_ARCHS="{";".join(toolchain.archs)}"',)
        common += ("-isystem", sysconfig.get_path("include"))
        # pip keeps pybind11 in a new folder for each build, so its version stands for where it is.
        key = [*common, f"pybind11 {pybind11.__version__}", told]
        return Unit(source, (), (*common, "-isystem", pybind11.get_include()), "\n".join(key))
    archs = ("90a",) if "_sm90" in source.name else toolchain.archs
    # One chip after another, not --threads: then ptxas says of one kernel after another what it took.
    command = (*common, "-lineinfo", "-Xptxas", "-v")
    command += tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    return Unit(source, archs, command, "\n".join([*command, told]))


class _Contents:
    """What is in files, as a run of the build first saw it: an edit while a compiler runs is not lost."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._digests: dict[str, str] = {}
        for path in root.glob("csrc/*"):
            if path.is_file():
                self.digest(str(path.relative_to(root)))

    def digest(self, path: str) -> str:
        if path not in self._digests:
            try:
                self._digests[path] = hashlib.sha256((self._root / path).read_bytes()).hexdigest()
            except FileNotFoundError:
                self._digests[path] = "missing"
        return self._digests[path]

    def fingerprint(self, key: str, dependencies: list[str]) -> str:
        parts = [key, *(f"{path} {self.digest(path)}" for path in dependencies)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_stale(unit: Unit, root: Path, contents: _Contents | None = None) -> bool:
    """Whether a source must be compiled."""
    if not all(unit.output(root, suffix).exists() for suffix in (".o", ".log", ".stamp")):
        return True
    stamp = json.loads(unit.output(root, ".stamp").read_text(encoding="utf-8"))
    return stamp["made_from"] != (contents or _Contents(root)).fingerprint(unit.key, stamp["dependencies"])


def build(toolchain: Toolchain, root: Path = ROOT) -> Path:
    """Compile what is stale, as many at a time as there are cores, and link.

    Returns:
        The extension, in build/csrc/.

    Raises:
        BuildError: with nvcc's own words.
    """
    units, contents = list_units(root, toolchain), _Contents(root)
    built = root / "build" / "csrc" / EXTENSION
    built.parent.mkdir(parents=True, exist_ok=True)
    stale = [unit for unit in units if is_stale(unit, root, contents)]
    if stale:
        release, archs = ".".join(map(str, toolchain.release)), ";".join(toolchain.archs)
        _say(f"geo_r1._C by {toolchain.nvcc} {release}, for {archs}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(_compile, unit, root, contents): unit for unit in stale}
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                _say(f"[{number}/{len(stale)}] {jobs[job].source.name} ({job.result():.0f} s)")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _link(toolchain, units, root, built)
    return built


def _compile(unit: Unit, root: Path, contents: _Contents) -> float:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=root / "build" / "csrc", prefix=f".{unit.source.stem}.") as folder:
        made, depends = Path(folder, "made.o"), Path(folder, "depends")
        said = _run([*unit.command, "-MMD", "-MF", depends, "-o", made, "-c", unit.source], root)
        listed = depends.read_text(encoding="utf-8").partition(" : ")[2].replace("\\\n", " ")
        dependencies = [path.replace("\\ ", " ") for path in re.split(r"(?<!\\)\s+", listed) if path]
        stamp = {"made_from": contents.fingerprint(unit.key, dependencies), "dependencies": dependencies}
        unit.output(root, ".stamp").unlink(missing_ok=True)  # until both others are there
        made.replace(unit.output(root, ".o"))
        _write(unit.output(root, ".log"), said)
        _write(unit.output(root, ".stamp"), json.dumps(stamp, indent=1))
    return time.monotonic() - start


def _link(toolchain: Toolchain, units: list[Unit], root: Path, built: Path) -> None:
    objects = [
        str(unit.output(root, ".o").relative_to(root)) for unit in sorted(units, key=lambda unit: unit.source)
    ]
    # torch shows its own CUDA runtime to every library, and the one linked in here must not be taken for it:
    # its symbols are hidden. -s: no table of the others either.
    command = [str(toolchain.nvcc), "-shared", "-cudart", "static", "-nodlink"]
    command += ["-Xlinker", "--exclude-libs=ALL,-s", *objects]
    made_from = _Contents(root).fingerprint("\n".join([toolchain.version, *command]), objects)
    stamp = built.with_suffix(".stamp")
    if built.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
        return
    with tempfile.TemporaryDirectory(dir=built.parent, prefix=".link.") as folder:
        made = Path(folder, "made.so")
        _run([*command, "-o", made], root)
        stamp.unlink(missing_ok=True)
        made.replace(built)
        _write(stamp, made_from)


def _run(command: list[str | Path], root: Path) -> str:
    done = subprocess.run(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        # Without what ptxas says of kernels that came out well.
        report = re.compile(r"ptxas info\s*:(?! \()|\s+\d+ bytes stack frame")
        words = [line for line in done.stdout.splitlines() if not report.match(line)]
        after = "nvcc fails; GEO_R1_BUILD_CUDA=0 installs without CUDA kernels"
        raise BuildError("\n".join([" ".join(map(str, command)), *words, after]))
    return done.stdout


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def install(built: Path, target: Path) -> None:
    """Put the extension in its place, by renaming: a process that has the one before keeps it whole."""
    if target.exists() and target.read_bytes() == built.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.copyfile(built, beside)
    beside.chmod(0o755)
    beside.replace(target)


def main() -> int:
    try:
        install(build(find_toolchain()), ROOT / "geo_r1" / EXTENSION)
    except UnavailableError as reason:
        _say(f"csrc: not built, {reason}")
    except BuildError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
