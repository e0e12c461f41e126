"""Builds geo_r1._C, the extension of csrc/, if nvcc is found; needs neither a GPU nor torch.

    python -m csrc.nvcc      # in a checkout: compiles what has changed and installs it into geo_r1/

setup.py builds with the same functions. They read these environment variables:

    GEO_R1_BUILD_CUDA    0: build nothing and keep any earlier build; 1: fail without nvcc; unset: build if
                         nvcc is found.
    GEO_R1_CUDA_ARCHS    compute capabilities as nvcc writes them, "80;90a"; unset: 80, 90a and 100.
    CUDA_HOME, CUDA_PATH the toolkit; if neither is set: nvcc on PATH, else in /usr/local/cuda.

build/csrc/ keeps the objects and, beside each, the output of ptxas, which gate.py judges. A source is
compiled again if it, a header that it includes, the command or nvcc has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

_DEFAULT_HOME = Path("/usr/local/cuda")
_DEFAULT_ARCHS = ("80", "90a", "100")
_OLDEST = (12, 8)  # the first release that knows 100
_LEAST_ARCH = 80  # the first with bfloat16 and asynchronous copies
_FLAGS: tuple[str, ...] = ("-std=c++17", "-O3", "--Werror", "all-warnings", "-I", "csrc")
_FLAGS += ("-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden")
_ALTERS_COMMANDS = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


class UnavailableError(Exception):
    """The reason why nothing is built here."""


class BuildError(Exception):
    """The reason why a requested build fails."""


@dataclass(frozen=True)
class Toolchain:
    """An nvcc, its release (13, 0), the output of `nvcc --version`, and the architectures to build for."""

    nvcc: Path
    release: tuple[int, int]
    version: str
    archs: tuple[str, ...]


def find_toolchain(environ: Mapping[str, str] = os.environ) -> Toolchain:
    """Find an nvcc and read the variables.

    Raises:
        UnavailableError: GEO_R1_BUILD_CUDA is 0, or it is unset and nvcc is missing or too old.
        BuildError: a variable has a wrong value, or GEO_R1_BUILD_CUDA is 1 and nvcc is missing or too old.
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
    """The nvcc of the toolkit named in the environment, else on PATH, else in the default folder."""
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
    """(13, 0) from the output of `nvcc --version`."""
    found = re.search(r"release (\d+)\.(\d+)", version)
    if not found:
        raise BuildError(f"nvcc --version names no release: {version.strip()!r}")
    return int(found[1]), int(found[2])


def parse_archs(text: str, known: list[str]) -> tuple[str, ...]:
    """The requested compute capabilities, each once; by default those of 80, 90a and 100 that nvcc knows.

    Args:
        text: "80;90a", separated by semicolons or commas.
        known: numbers that this nvcc lists. From 90 on each has a variant "a", which nvcc does not list.
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
    """A source file and how to compile it.

    Attributes:
        source: relative to the project.
        archs: the architectures of its kernels.
        command: compiles the source; the path of the object follows.
        key: a digest of everything that the object depends on.
    """

    source: Path
    archs: tuple[str, ...]
    command: tuple[str, ...]
    key: str

    def output(self, root: Path, suffix: str) -> Path:
        """.o the object, .log the output of ptxas, .stamp the key of both."""
        return root / "build" / "csrc" / f"{self.source.stem}{suffix}"


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def with_headers(source: Path, include_dirs: Sequence[Path]) -> list[Path]:
    """A source and every header that it includes from its own or the given folders, sorted."""
    seen: set[Path] = set()
    todo = [source.resolve()]
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in re.findall(r'^#include ["<]([^">]+)', path.read_text(encoding="utf-8"), re.MULTILINE):
            candidates = (folder / name for folder in (path.parent, *include_dirs))
            found = next((file.resolve() for file in candidates if file.is_file()), None)
            if found is not None and found not in seen:
                todo.append(found)
    return sorted(seen)


def list_units(root: Path, toolchain: Toolchain) -> list[Unit]:
    """Every source of csrc/. The largest comes first, since it compiles longest.

    A file with "_sm90" in its name is built for 90a alone, whatever GEO_R1_CUDA_ARCHS says: only that chip
    has its instructions, and the extension needs its launchers in any case.
    """
    sources = [*root.glob("csrc/*.cu"), root / "csrc" / "bindings.cpp"]
    sources.sort(key=lambda source: (-source.stat().st_size, source.name))
    return [_unit(source.relative_to(root), root, toolchain) for source in sources]


def _unit(source: Path, root: Path, toolchain: Toolchain) -> Unit:
    archs: tuple[str, ...] = ()
    command: tuple[str, ...] = (str(toolchain.nvcc), *_FLAGS)
    place: tuple[str, ...] = ()  # not part of the key
    told = [toolchain.version, *(f"{name}={os.environ.get(name)}" for name in _ALTERS_COMMANDS)]
    if source.suffix == ".cpp":
        try:
            import pybind11
        except ImportError:
            raise BuildError("building csrc/ needs pybind11; try: pip install pybind11") from None
        command += (f'-DGEO_R1_CUDA_ARCHS="{";".join(toolchain.archs)}"',)
        command += ("-isystem", sysconfig.get_path("include"))
        # pip installs pybind11 into a new folder for each build, so its version stands for its path.
        place = ("-isystem", pybind11.get_include())
        told.append(f"pybind11 {pybind11.__version__}")
    else:
        archs = ("90a",) if "_sm90" in source.name else toolchain.archs
        # Without --threads nvcc compiles one chip after another, and ptxas reports one kernel after another.
        command += ("-lineinfo", "-Xptxas", "-v")
        command += tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    contents = (path.read_text(encoding="utf-8") for path in with_headers(root / source, [root / "csrc"]))
    return Unit(source, archs, (*command, *place), digest([*command, *told, *contents]))


def is_stale(unit: Unit, root: Path) -> bool:
    """True if a source must be compiled."""
    if not all(unit.output(root, suffix).exists() for suffix in (".o", ".log", ".stamp")):
        return True
    return unit.output(root, ".stamp").read_text(encoding="utf-8") != unit.key


def build(toolchain: Toolchain, root: Path = ROOT) -> Path:
    """Compile stale sources, as many at a time as there are cores, and link.

    Returns:
        The extension, in build/csrc/.

    Raises:
        BuildError: nvcc failed; the message is its output.
    """
    units = list_units(root, toolchain)
    built = root / "build" / "csrc" / EXTENSION
    built.parent.mkdir(parents=True, exist_ok=True)
    stale = [unit for unit in units if is_stale(unit, root)]
    if stale:
        release, archs = ".".join(map(str, toolchain.release)), ";".join(toolchain.archs)
        _say(f"geo_r1._C by {toolchain.nvcc} {release}, for {archs}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(_compile, unit, root): unit for unit in stale}
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                _say(f"[{number}/{len(stale)}] {jobs[job].source.name} ({job.result():.0f} s)")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _link(toolchain, units, root, built)
    return built


def _compile(unit: Unit, root: Path) -> float:
    start = time.monotonic()
    log = _make(unit.output(root, ".o"), (*unit.command, "-c", str(unit.source)), root)
    _write(unit.output(root, ".log"), log)
    # The key was made before the compiler ran: a source that was edited meanwhile is still stale.
    _write(unit.output(root, ".stamp"), unit.key)
    return time.monotonic() - start


def _link(toolchain: Toolchain, units: list[Unit], root: Path, built: Path) -> None:
    units = sorted(units, key=lambda unit: unit.source)
    objects = [str(unit.output(root, ".o").relative_to(root)) for unit in units]
    # torch exposes its own CUDA runtime to every library. The one linked in here must not be mistaken for
    # it, so its symbols are hidden. -s drops the table of the others.
    command: tuple[str, ...] = (str(toolchain.nvcc), "-shared", "-cudart", "static", "-nodlink")
    command += ("-Xlinker", "--exclude-libs=ALL,-s", *objects)
    key = digest([toolchain.version, *command, *(unit.key for unit in units)])
    stamp = built.with_suffix(".stamp")
    if not (built.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key):
        _make(built, command, root)
        _write(stamp, key)


def _make(out: Path, command: tuple[str, ...], root: Path) -> str:
    """Run a command that makes one file, whole or not at all; returns what the command printed."""
    out.with_suffix(".stamp").unlink(missing_ok=True)  # until everything is written
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        made = Path(folder, out.name)
        done = subprocess.run(
            [command[0], "-o", made, *command[1:]],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            # Leave out the reports of ptxas on kernels that compiled.
            report = re.compile(r"ptxas info\s*:(?! \()|\s+\d+ bytes stack frame")
            words = [line for line in done.stdout.splitlines() if not report.match(line)]
            after = "nvcc fails; GEO_R1_BUILD_CUDA=0 installs without CUDA kernels"
            raise BuildError("\n".join([" ".join(command), *words, after]))
        made.replace(out)
    return done.stdout


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def install(built: Path, target: Path) -> None:
    """Put the extension in place by renaming, so a process that uses the old file keeps it."""
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
