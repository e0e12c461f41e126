"""Builds every Triton kernel ahead of time for each chip; needs no GPU.

    python -m geo_r1.kernels.aot [family ...] [--arch 80 --arch 90] [--jobs N] [--json PATH]

Each family's `triton` module lists its launch tables in `LAUNCHES`. Its `aot_cases()` yields labelled calls
of the real launchers on small CPU tensors, which together choose every row. A stand-in for Triton's driver
names the chip, and a launch compiles without running, so it builds what the same call would build on that
chip. `judge` then reads each cubin. The exit code is 1 if anything is at fault.

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
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from geo_r1.kernels.launch import Launch

# Shared memory in bytes by compute capability: the limit for one program, and the total of an SM.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_SHARED_SM = {80: 164 * 1024, 90: 228 * 1024}
_SHARED_RESERVED = 1024  # bytes that an SM reserves for each program

# A product in Triton's IR: precision of float32 (none: exact), type of the operands, rows.
_DOT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (\w+).*?)?: tensor<[\dx]+x(\w+)> \* .* -> tensor<(?:\d+x)?(\d+)x\d+x"
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Built:
    """One kernel, built for one chip.

    Attributes:
        family: the family of ops, such as "attention".
        case: label of the first case that launched it.
        arch: compute capability, 90 for an H200.
        registers: per thread.
        stack: bytes of stack and local memory per thread.
        spills: instructions that load from or store to local memory.
        shared: bytes of shared memory per program; Triton asks for all of it at launch.
        dots: (operand type, rows) of each `tl.dot`; no entry for exact float32, which has no matrix
            instruction.
        matrix: matrix instructions found, "HGMMA", "HMMA", both or none.
    """

    family: str
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
        by_registers = 65536 // registers_warp // 4 * 4 // self.num_warps  # even over an SM's four parts
        shared = -(-self.shared // 128) * 128 + _SHARED_RESERVED
        return min(32, 64 // self.num_warps, by_registers, _SHARED_SM[self.arch] // shared)


def judge(built: Built) -> list[str]:
    """List the faults of a kernel, one line each with its family, case and chip.

    A kernel must not spill, must fit the chip's shared memory, and must use the chip's matrix instructions
    where it multiplies matrices. On sm_90 that is HGMMA if a product of 16-bit operands has at least 64 rows
    and the program has at least four warps. A smaller product cannot be an HGMMA, and other types may lack
    the layout for it.
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
    place = f"{built.family}, case {built.case!r}, sm_{built.arch}, {built.kernel}"
    return [f"{place}: {fault}" for fault in faults]


@contextmanager
def compile_only(arch: int) -> Iterator[tuple[list[CompiledKernel], list[Launch]]]:
    """Compile launches for `arch` without running them; yields the kernels built and the rows chosen."""
    kernels: list[CompiledKernel] = []
    rows: list[Launch] = []
    run, options = JITFunction.run, Launch.__dict__["options"].fget

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    def chosen(self: Launch) -> dict[str, Any]:
        rows.append(self)
        return options(self)

    # All that a launch asks of the driver. Triton caches kernels by device, so each chip is its own device.
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


def build_case(family: str, case: str, arch: int) -> tuple[dict[str, Built], set[int], list[dict[str, Any]]]:
    """Run one case of a family for one chip.

    Returns:
        Kernels by Triton's hash, indices of the rows of `LAUNCHES` that were chosen, and the options of
        chosen rows that `LAUNCHES` lacks.
    """
    module = _load(family)
    with compile_only(arch) as (kernels, chosen):
        dict(module.aot_cases())[case]()
    listed = {id(row): i for i, row in enumerate(module.LAUNCHES)}
    return (
        {kernel.hash: _inspect(kernel, family, case, arch) for kernel in kernels},
        {listed[id(row)] for row in chosen if id(row) in listed},
        [row.options for row in chosen if id(row) not in listed],
    )


def _inspect(kernel: CompiledKernel, family: str, case: str, arch: int) -> Built:
    listing = _disassemble(kernel.asm["cubin"])
    resources = _RESOURCES.search(listing)
    assert resources, f"cuobjdump printed no resource usage for {kernel.name}"
    registers, stack, local = map(int, resources.groups())
    return Built(
        family=family,
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
    """Find the products of a kernel in Triton's IR, as `Built.dots` holds them."""
    found = _DOT.findall(ttir)
    assert len(found) == ttir.count("tt.dot "), "the IR writes a product in a way that we do not know"
    return tuple(sorted({(kind, int(rows)) for precision, kind, rows in found if kind != "f32" or precision}))


@cache
def _disassemble(cubin: bytes) -> str:
    """Resource usage and machine code of a cubin, read by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def family_names() -> list[str]:
    """Folders of this package with Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def _load(family: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{family}.triton")


def list_cases(families: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(family, label) of every case, and a line for each fault in a family's list."""
    cases, faults = [], []
    for family, module in ((family, _load(family)) for family in families):
        labels = [label for label, _ in getattr(module, "aot_cases", tuple)()]
        faults += [f"{family}: case {label!r} stands twice" for label, n in Counter(labels).items() if n > 1]
        if not labels:
            faults.append(f"{family}: no case; aot_cases() must launch every kernel")
        if not hasattr(module, "LAUNCHES"):
            faults.append(f"{family}: no LAUNCHES, the rows of its launch tables")
        cases += [(family, label) for label in dict.fromkeys(labels)]
    return cases, faults


def uncovered(families: Iterable[str], arch: int, chosen: Collection[tuple[str, int]]) -> list[str]:
    """A line for each row of a family's tables that no case chose on one chip."""
    return [
        f"{family}: no case chooses row {i} of LAUNCHES on sm_{arch}: {row.options}"
        for family in families
        for i, row in enumerate(getattr(_load(family), "LAUNCHES", ()))
        if (family, i) not in chosen
    ]


def build(families: list[str], arches: list[int], num_jobs: int) -> tuple[list[Built], list[str]]:
    """Build every case for every chip, in parallel processes.

    Returns:
        The kernels, each once, and a line for each fault found.
    """
    cases, faults = list_cases(families)
    kernels: dict[str, Built] = {}
    chosen: dict[int, set[tuple[str, int]]] = {arch: set() for arch in arches}
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(build_case, *case, arch): (*case, arch) for case in cases for arch in arches}
        for i, job in enumerate(as_completed(jobs), 1):
            family, case, arch = jobs[job]
            print(f"{i}/{len(jobs)} {family}, {case}, sm_{arch}", file=sys.stderr, flush=True)
    for job, (family, case, arch) in jobs.items():
        place = f"{family}, case {case!r}, sm_{arch}"
        if error := job.exception():
            faults.append(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        built, rows, unlisted = job.result()
        if not built:
            faults.append(f"{place}: launched no kernel")
        kernels = built | kernels  # a kernel of several cases keeps the first one's label
        chosen[arch] |= {(family, row) for row in rows}
        faults += [f"{place}: launched with a row that LAUNCHES lacks: {options}" for options in unlisted]
    ordered = sorted(kernels.values(), key=lambda b: (b.family, b.kernel, b.case, b.arch))
    for kernel in ordered:
        faults += judge(kernel)
    for arch in arches:
        faults += uncovered(families, arch, chosen[arch])
    return ordered, faults


def table(kernels: Iterable[Built]) -> str:
    """The kernels as aligned text, one per line."""
    lines: list[tuple[str, ...]] = [
        ("kernel", "case", "arch", "warps", "stages", "registers", "shared KiB", "programs/SM", "matrix")
    ]
    for built in kernels:
        numbers = (built.num_warps, built.num_stages, built.registers, f"{built.shared / 1024:.1f}")
        after = (built.programs_per_sm, "+".join(built.matrix) or "-")
        lines.append(tuple(map(str, (built.kernel, built.case, f"sm_{built.arch}", *numbers, *after))))
    return align_columns(lines, "<<>>>>>><")


def align_columns(lines: Sequence[Sequence[str]], aligns: str) -> str:
    """Lines of cells as text; `aligns` has "<" for each column of words and ">" for each of numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{align}{width}}" for text, align, width in zip(line, aligns, widths, strict=True))
        for line in lines
    )


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A gate's command line, with `--json`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the kernels and faults here")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: no folder {options.json.parent}")
    return options


def conclude(text: str, total: str, record: dict[str, Any], path: Path | None) -> int:
    """Print a gate's table, faults and totals, write its record, and return the exit code."""
    faults = record["faults"]
    print(text)
    if path:  # written beside and renamed, so the file is never half written
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{total}, {len(faults)} faults")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("python -m geo_r1.kernels.aot", __doc__)
    parser.add_argument("families", nargs="*", metavar="family", help="for example advantage; default: all")
    parser.add_argument("--arch", type=int, action="append", choices=SHARED_LIMIT, help="default: both")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    options = parse(parser, arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    known = family_names()
    for family in options.families:
        if family not in known:
            parser.error(f"no family {family!r}; families are {', '.join(known)}")

    kernels, faults = build(options.families or known, options.arch or list(SHARED_LIMIT), options.jobs)
    records = [asdict(built) | {"programs_per_sm": built.programs_per_sm} for built in kernels]
    record = {"triton": triton.__version__, "kernels": records, "faults": faults}
    return conclude(table(kernels), f"{len(kernels)} kernels", record, options.json)


if __name__ == "__main__":
    sys.exit(main())
