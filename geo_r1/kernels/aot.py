"""Builds every Triton kernel ahead of time for each chip; needs no GPU.

    python -m geo_r1.kernels.aot [family ...] [--arch 80 --arch 90] [--jobs N] [--json PATH]

Each family's `triton` module lists its launch tables in `LAUNCHES`. Its `aot_cases()` yields labelled calls
of the real launchers on small CPU tensors, which together choose every row. A stand-in for Triton's driver
names the chip, and a launch compiles without running, so it builds what the same call would build on that
chip. `built.py` then judges each cubin. The exit code is 1 if anything is at fault.

For an H200 the gate also estimates how long the kernels take, see `floor.py`, and compares the instructions
that they spend on an element with the limit of their launch row.
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
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from geo_r1.kernels import floor, launch, sass
from geo_r1.kernels.built import CHIPS, H200, Built, align_columns, chip_table, judge, table
from geo_r1.kernels.launch import Launch

# Triton writes the same PTX for these chips as for sm_80, so that they need its assembler only.
_SAME_PTX = {86: 80, 89: 80}

# A product in Triton's IR: precision of float32 (none: exact), type of the operands, rows.
_DOT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (\w+).*?)?: tensor<[\dx]+x(\w+)> \* .* -> tensor<(?:\d+x)?(\d+)x\d+x"
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@contextmanager
def compile_only(arch: int) -> Iterator[tuple[list[tuple[CompiledKernel, Launch | None]], list[Launch]]]:
    """Compile launches for `arch` without running them.

    Yields:
        Each kernel with the row that was chosen before it, and all rows chosen.
    """
    kernels: list[tuple[CompiledKernel, Launch | None]] = []
    rows: list[Launch] = []
    run, options = JITFunction.run, Launch.__dict__["options"].fget

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((kernel, rows[-1] if rows else None))
        return kernel

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
        mock.patch.object(launch, "chip_of", lambda x: arch),
    ):
        yield kernels, rows


def build_case(
    family: str, case: str, arches: Sequence[int]
) -> tuple[dict[str, Built], set[int], list[dict[str, Any]]]:
    """Run one case of a family for chips that share their PTX.

    Returns:
        Kernels by name, Triton's hash and chip, indices of the rows of `LAUNCHES` that were chosen, and the
        options of chosen rows that `LAUNCHES` lacks.
    """
    module = _load(family)
    with compile_only(ptx_arch(arches[0])) as (kernels, chosen):
        dict(module.aot_cases())[case]()
    listed = {id(row): i for i, row in enumerate(module.LAUNCHES)}
    return (
        {
            f"{kernel.name} {kernel.hash} {arch}": _inspect(kernel, row, family, case, arch)
            for kernel, row in kernels
            for arch in arches
        },
        {listed[id(row)] for row in chosen if id(row) in listed},
        [row.options for row in chosen if id(row) not in listed],
    )


def ptx_arch(arch: int) -> int:
    """The chip whose PTX Triton would write for this one, too."""
    return _SAME_PTX.get(arch, arch)


def _inspect(kernel: CompiledKernel, row: Launch | None, family: str, case: str, arch: int) -> Built:
    ptx = kernel.asm["ptx"]
    cubin = kernel.asm["cubin"] if arch == ptx_arch(arch) else _assemble(ptx, arch)
    resources = _RESOURCES.search(_cuobjdump("-res-usage", cubin))
    assert resources, f"cuobjdump printed no resource usage for {kernel.name}"
    registers, stack, local = map(int, resources.groups())
    names = kernel.src.fn.arg_names
    arguments = dict(kernel.src.signature) | {names[i]: value for (i,), value in kernel.src.constants.items()}
    work = floor.triton_work(kernel.name, arguments)
    # Disassembling takes half a second, so it is done only for what nothing else tells.
    counted = work is not None and arch == H200 and row is not None and row.limit is not None
    code = _cuobjdump("-sass", cubin) if stack + local or counted else ""
    return Built(
        family=family,
        kernel=kernel.name,
        case=case,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=registers,
        stack=stack + local,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=kernel.metadata.shared,
        dots=find_dots(kernel.asm["ttir"]),
        matrix=tuple(sorted(set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)\b", ptx)))),
        pace=sass.pace(sass.read(code.splitlines()), work) if counted and work else None,
        limit=row.limit if row else None,
        stack_limit=row.stack if row else 0,
    )


def _assemble(ptx: str, arch: int) -> bytes:
    """A cubin for a chip from another one's PTX, as Triton would assemble it."""
    backend: Any = make_backend(GPUTarget("cuda", arch, 32))
    ptx, changed = re.subn(r"(?m)^(\.target sm_)\d+", rf"\g<1>{arch}", ptx)
    assert changed == 1, "the PTX names its target in a way that we do not know"
    cubin: bytes = backend.make_cubin(ptx, {}, backend.parse_options({"enable_fp_fusion": True}), arch)
    return cubin


def find_dots(ttir: str) -> tuple[tuple[str, int], ...]:
    """Find the products of a kernel in Triton's IR, as `Built.dots` holds them."""
    found = _DOT.findall(ttir)
    assert len(found) == ttir.count("tt.dot "), "the IR writes a product in a way that we do not know"
    return tuple(sorted({(kind, int(rows)) for precision, kind, rows in found if kind != "f32" or precision}))


def _cuobjdump(option: str, cubin: bytes) -> str:
    """What Triton's cuobjdump tells of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
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


def uncovered(families: Iterable[str], chosen: Collection[tuple[str, int]]) -> list[str]:
    """A line for each row of a family's tables that no case chose on any chip."""
    return [
        f"{family}: no case chooses row {i} of LAUNCHES: {row.options}"
        for family in families
        for i, row in enumerate(getattr(_load(family), "LAUNCHES", ()))
        if (family, i) not in chosen
    ]


def build(
    families: list[str], arches: list[int], num_jobs: int
) -> tuple[list[Built], dict[tuple[str, str, str], sass.Pace], list[str]]:
    """Build every case for every chip, in parallel processes.

    Returns:
        The kernels, each once; the paces on an H200 by family, case and kernel; a line for each fault found.
    """
    cases, faults = list_cases(families)
    kernels: dict[str, Built] = {}
    paces: dict[tuple[str, str, str], sass.Pace] = {}
    chosen: set[tuple[str, int]] = set()
    groups = {
        source: [arch for arch in arches if ptx_arch(arch) == source] for source in map(ptx_arch, arches)
    }
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(build_case, *case, group): (*case, group)
            for case in cases
            for group in groups.values()
        }
        for i, job in enumerate(as_completed(jobs), 1):
            family, case, group = jobs[job]
            print(f"{i}/{len(jobs)} {family}, {case}, {_chips(group)}", file=sys.stderr, flush=True)
    for job, (family, case, group) in jobs.items():
        place = f"{family}, case {case!r}, {_chips(group)}"
        if error := job.exception():
            faults.append(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        built, rows, unlisted = job.result()
        if not built:
            faults.append(f"{place}: launched no kernel")
        paces |= {(family, case, kernel.kernel): kernel.pace for kernel in built.values() if kernel.pace}
        kernels = built | kernels  # a kernel of several cases keeps the first one's label
        chosen |= {(family, row) for row in rows}
        faults += [f"{place}: launched with a row that LAUNCHES lacks: {options}" for options in unlisted]
    ordered = sorted(kernels.values(), key=lambda b: (b.family, b.kernel, b.case, b.arch))
    for kernel in ordered:
        faults += judge(kernel)
    if set(arches) == set(CHIPS):  # some rows are for some chips
        faults += uncovered(families, chosen)
    return ordered, paces, faults


def _chips(arches: Iterable[int]) -> str:
    return " ".join(f"sm_{arch}" for arch in arches)


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
    parser.add_argument("--arch", type=int, action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--kernels", action="store_true", help="also print a line for each kernel")
    options = parse(parser, arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    known = family_names()
    for family in options.families:
        if family not in known:
            parser.error(f"no family {family!r}; families are {', '.join(known)}")

    arches = sorted(set(options.arch or CHIPS))
    kernels, paces, faults = build(options.families or known, arches, options.jobs)
    records = [asdict(built) | {"programs_per_sm": built.programs_per_sm} for built in kernels]
    record = {"triton": triton.__version__, "kernels": records, "faults": faults}
    tables = [table(kernels)] if options.kernels else []
    tables.append(chip_table(kernels, arches))
    found = [(t.place[2], t, paces[t.place]) for t in floor.TARGETS if t.place in paces]
    if found:
        tables.append(align_columns(floor.table(found), floor.ALIGNS))
    return conclude("\n\n".join(tables), f"{len(kernels)} kernels", record, options.json)


if __name__ == "__main__":
    sys.exit(main())
