"""Builds every Triton kernel ahead of time, for each chip, on a machine that need not have a GPU.

    python -m geo_r1.kernels.aot [module ...] [--arch 80 --arch 90] [--jobs N] [--json PATH]

Every module `*/triton.py` below this folder lists its launch table, `LAUNCHES`, and yields from `aot_cases()`
labelled calls of its real launchers on small CPU tensors that together choose every row. Here Triton's driver
is replaced by one that only names the chip, and a launch compiles and does not run: so what is built is what
the same call builds on that chip. Each cubin is then read and judged, see `judge`; any fault is exit code 1.

Limits and granules: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from geo_r1.kernels.launch import Launch

# Compute capability -> shared memory in bytes: the most that a program may ask for, and what an SM holds.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_SHARED_SM = {80: 164 * 1024, 90: 228 * 1024}
_SHARED_RESERVED = 1024  # bytes an SM keeps of it for each program

# A product in Triton's IR: precision of float32 (nothing: exact), type of the operands, rows.
_DOT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (\w+).*?)?: tensor<[\dx]+x(\w+)> \* .* -> tensor<(?:\d+x)?(\d+)x\d+x"
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Built:
    """What one kernel became, for one chip.

    Attributes:
        module: the op family, "attention".
        case: label of the first case that launched it.
        arch: compute capability, 90 for an H200.
        registers: a thread's.
        stack: bytes of a thread's stack and local memory.
        spills: instructions that load from or store to local memory.
        shared: bytes of shared memory a program asks for at launch; Triton has no other.
        dots: (operand type, rows) of each `tl.dot`; no entry for exact float32, which has no matrix
            instruction.
        matrix: matrix instructions found, "HGMMA", "HMMA", both or none.
    """

    module: str
    kernel: str
    case: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    dots: tuple[tuple[str, int], ...]
    matrix: tuple[str, ...]

    @property
    def programs_per_sm(self) -> int:
        """How many programs fit on an SM at once, by warps, registers and shared memory."""
        registers_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // registers_warp // 4 * 4 // self.num_warps  # an SM's four parts hold the same
        shared = -(-self.shared // 128) * 128 + _SHARED_RESERVED
        return min(32, 64 // self.num_warps, by_registers, _SHARED_SM[self.arch] // shared)


def judge(built: Built) -> list[str]:
    """Say what is wrong with a kernel.

    It must not spill, must fit the chip's shared memory, and must use the chip's matrix instructions where it
    multiplies matrices. On sm_90 that is HGMMA when a product of 16-bit operands has 64 rows or more and the
    program four warps or more; a smaller one cannot be an HGMMA, and other types may lack the layout for it.

    Returns:
        One line for each fault, that names the module, case and chip.
    """
    faults = []
    if built.stack or built.spills:
        faults.append(f"spills: {built.stack} bytes of stack, {built.spills} local loads and stores")
    if built.shared > SHARED_LIMIT[built.arch]:
        faults.append(f"{built.shared} bytes of shared memory, over the {SHARED_LIMIT[built.arch]} there are")
    wide = built.num_warps >= 4 and any(rows >= 64 and kind in ("f16", "bf16") for kind, rows in built.dots)
    if built.arch >= 90 and wide and "HGMMA" not in built.matrix:
        faults.append(f"no HGMMA, found {' '.join(built.matrix) or 'no matrix instruction'}")
    elif built.dots and not built.matrix:
        faults.append("tl.dot without a matrix instruction")
    place = f"{built.module}, case {built.case!r}, sm_{built.arch}, {built.kernel}"
    return [f"{place}: {fault}" for fault in faults]


@dataclass(frozen=True)
class CaseResult:
    """What one case launched on one chip.

    Attributes:
        built: kernels, by Triton's hash of all that goes into one.
        rows: (module, index in its `LAUNCHES`) of the rows chosen.
        unlisted: rows chosen that no module's `LAUNCHES` holds.
    """

    built: dict[str, Built]
    rows: frozenset[tuple[str, int]]
    unlisted: tuple[Launch, ...]


@contextmanager
def compile_only(arch: int) -> Iterator[tuple[list[CompiledKernel], list[Launch]]]:
    """Within, launches compile for `arch` and do not run; gives the kernels built and the rows chosen."""
    kernels: list[CompiledKernel] = []
    rows: list[Launch] = []
    run, options = JITFunction.run, Launch.__dict__["options"].fget

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    def chosen(self: Launch) -> dict[str, Any]:
        rows.append(self)
        return options(self)

    # All that a launch asks of a driver before it runs. Triton keeps kernels apart by device: here, the chip.
    chip = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(type(driver), "active", chip),
        mock.patch.object(JITFunction, "run", compiled),
        mock.patch.object(Launch, "options", property(chosen)),
    ):
        yield kernels, rows


def build_case(module: str, case: str, arch: int) -> CaseResult:
    """Run one case of a module for one chip."""
    cases = dict(_load(module).aot_cases())
    with compile_only(arch) as (kernels, chosen):
        cases[case]()
    listed = {
        id(row): (name, i)
        for name, loaded in (
            (name, sys.modules.get(f"{__package__}.{name}.triton")) for name in module_names()
        )
        for i, row in enumerate(getattr(loaded, "LAUNCHES", ()))
    }
    return CaseResult(
        {kernel.hash: _inspect(kernel, module, case, arch) for kernel in kernels},
        frozenset(listed[id(row)] for row in chosen if id(row) in listed),
        tuple(row for row in chosen if id(row) not in listed),
    )


def _inspect(kernel: CompiledKernel, module: str, case: str, arch: int) -> Built:
    listing = _disassemble(kernel.asm["cubin"])
    resources = _RESOURCES.search(listing)
    assert resources, f"cuobjdump printed no resource usage for {kernel.name}"
    registers, stack, local = map(int, resources.groups())
    return Built(
        module=module,
        kernel=kernel.name,
        case=case,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=registers,
        stack=stack + local,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        shared=kernel.metadata.shared,
        dots=find_dots(kernel.asm["ttir"]),
        matrix=tuple(name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", listing)),
    )


def find_dots(ttir: str) -> tuple[tuple[str, int], ...]:
    """What `Built.dots` holds, from a kernel in Triton's IR."""
    found = _DOT.findall(ttir)
    assert len(found) == ttir.count("tt.dot "), "a product is written as no Triton that was seen writes it"
    return tuple(sorted({(kind, int(rows)) for precision, kind, rows in found if kind != "f32" or precision}))


@cache
def _disassemble(cubin: bytes) -> str:
    """Resource usage and machine code of a cubin, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def module_names() -> list[str]:
    """Names of the op families, each a folder with a module `triton`."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def _load(module: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{module}.triton")


def list_cases(modules: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(module, label) of every case, and a line for each module that does not list its cases well."""
    cases, faults = [], []
    for module, loaded in ((module, _load(module)) for module in modules):
        labels = [label for label, _ in getattr(loaded, "aot_cases", tuple)()]
        faults += [f"{module}: case {label!r} stands twice" for label, n in Counter(labels).items() if n > 1]
        if not labels:
            faults.append(f"{module}: no case; aot_cases() must launch every kernel")
        if not hasattr(loaded, "LAUNCHES"):
            faults.append(f"{module}: no LAUNCHES, the rows of its launch tables")
        cases += [(module, label) for label in dict.fromkeys(labels)]
    return cases, faults


def uncovered(modules: Iterable[str], arch: int, rows: Collection[tuple[str, int]]) -> list[str]:
    """A line for each row of a module's tables that no case chose on one chip."""
    return [
        f"{module}: no case chooses row {i} of LAUNCHES on sm_{arch}: {row.options}"
        for module in modules
        for i, row in enumerate(getattr(_load(module), "LAUNCHES", ()))
        if (module, i) not in rows
    ]


def build(modules: list[str], arches: list[int], num_jobs: int) -> tuple[list[Built], list[str]]:
    """Build every case for every chip, in processes.

    Returns:
        The kernels, each once, and a line for each fault found.
    """
    cases, faults = list_cases(modules)
    kernels: dict[str, Built] = {}
    rows: dict[int, set[tuple[str, int]]] = {arch: set() for arch in arches}
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(build_case, *case, arch): (*case, arch) for case in cases for arch in arches}
        _show_progress(jobs)
    for job, (module, case, arch) in jobs.items():
        place = f"{module}, case {case!r}, sm_{arch}"
        if error := job.exception():
            faults.append(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        result = job.result()
        if not result.built:
            faults.append(f"{place}: launched no kernel")
        kernels = result.built | kernels  # the first case keeps a kernel that several build
        rows[arch] |= result.rows
        faults += [f"{place}: launched with a row that LAUNCHES lacks: {row}" for row in result.unlisted]
    ordered = sorted(kernels.values(), key=lambda b: (b.module, b.kernel, b.case, b.arch))
    for built in ordered:
        faults += judge(built)
    for arch in arches:
        faults += uncovered(modules, arch, rows[arch])
    return ordered, faults


def _show_progress(jobs: dict[Future[CaseResult], tuple[str, str, int]]) -> None:
    """Wait for all jobs: a bar on a terminal, else a line for each."""
    console = Console(stderr=True)
    if console.is_terminal:
        for _ in track(as_completed(jobs), "building kernels", total=len(jobs), console=console):
            pass
        return
    for i, job in enumerate(as_completed(jobs), 1):
        module, case, arch = jobs[job]
        print(f"{i}/{len(jobs)} {module}, {case}, sm_{arch}", file=sys.stderr, flush=True)


def table(kernels: Iterable[Built]) -> str:
    """The kernels as aligned text, one a line."""
    lines: list[tuple[str, ...]] = [
        ("kernel", "case", "arch", "warps", "stages", "registers", "shared KiB", "programs/SM", "matrix")
    ]
    for built in kernels:
        numbers = (built.num_warps, built.num_stages, built.registers, f"{built.shared / 1024:.1f}")
        after = (built.programs_per_sm, "+".join(built.matrix) or "-")
        lines.append(tuple(map(str, (built.kernel, built.case, f"sm_{built.arch}", *numbers, *after))))
    return align_columns(lines, "<<>>>>>><")


def align_columns(lines: Sequence[Sequence[str]], aligns: str) -> str:
    """Lines of cells as text; `aligns` has a "<" for each column of words, a ">" for one of numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{align}{width}}" for text, align, width in zip(line, aligns, widths, strict=True))
        for line in lines
    )


def write_json(path: Path, kernels: Iterable[Built], faults: list[str]) -> None:
    records = [asdict(built) | {"programs_per_sm": built.programs_per_sm} for built in kernels]
    record = {"triton": triton.__version__, "kernels": records, "faults": faults}
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that what exists is whole."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m geo_r1.kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("modules", nargs="*", metavar="module", help="advantage, say; none means all")
    parser.add_argument("--arch", type=int, action="append", choices=SHARED_LIMIT, help="both if not given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; one a core if not given")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the kernels and the faults here too")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: no folder {options.json.parent}")
    known = module_names()
    for module in options.modules:
        if module not in known:
            parser.error(f"no module {module!r}; modules are {', '.join(known)}")

    kernels, faults = build(options.modules or known, options.arch or list(SHARED_LIMIT), options.jobs)
    print(table(kernels))
    if options.json:
        write_json(options.json, kernels, faults)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
