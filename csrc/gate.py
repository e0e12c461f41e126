"""Builds the CUDA kernels of csrc/ and judges each, for each chip, on a machine that need not have a GPU.

    python -m csrc.gate [--json PATH]

The extension is brought up to date first, by nvcc.py. Two things of every kernel are then read: what ptxas
reported when it was compiled (`-Xptxas -v`), and its machine code. See `judge` and `judge_source` for what
must hold; any fault is exit code 1. Where nothing can be built, one line says so, and nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from csrc import nvcc
from geo_r1.kernels.aot import align_columns, write_text

# Products of a warpgroup, bulk copies of tensors, and a warpgroup's change of its share of registers.
_HOPPER = ("HGMMA", "UTMALDG", "USETMAXREG")
_MATRIX = ("HMMA", "IMMA", "DMMA")
_LOCAL = ("STL", "LDL")
# An exponential after a wait that leaves products under way, before the next: it runs beside them.
_BESIDE = "MUFU.EX2 beside HGMMA"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?")
_SIZES = re.compile(r"(\d+) bytes (cumulative stack size|smem)")
_ADVICE = re.compile(r"ptxas [^:]*: (\(C75\d\d\).*|.*Potential Performance Loss.*)")
_PRODUCTS_LEFT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
_REGISTERS = re.compile(r"\bregisters_(lower|raise)<(\d+)>")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z]\w*)")


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel. Sizes are bytes of a thread; `shared` is of a block, and static only."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    barriers: int


@dataclass(frozen=True)
class Kernel:
    """What one kernel became, for one chip.

    Attributes:
        source: the file's name.
        name: as C++ writes it, without namespaces and parameters.
        arch: compute capability as nvcc writes it, "90a".
        report: None where ptxas reported nothing.
        instructions: how many there are of those that `judge` or the table names; None where the object does
            not hold the kernel.
    """

    source: str
    name: str
    arch: str
    report: Report | None
    instructions: dict[str, int] | None


def read_report(text: str) -> tuple[dict[tuple[str, str], Report], list[str]]:
    """From what `nvcc -Xptxas -v` printed: kernels by (symbol, arch), and each warning of slow code once."""
    kernels = {}
    for entry, after in zip(_ENTRY.finditer(text), _ENTRY.split(text)[3::3], strict=True):
        properties, used = _PROPERTIES.search(after), _USED.search(after)
        if not (properties and used):
            continue  # judged as a kernel without a report
        used_line = after[used.start() :].partition("\n")[0]
        sizes = {what: int(size) for size, what in _SIZES.findall(used_line)}
        stack, stores, loads = map(int, properties.groups())
        kernels[entry[1], entry[2]] = Report(
            registers=int(used[1]),
            stack=max(stack, sizes.get("cumulative stack size", 0)),  # with that of functions it calls
            spill_stores=stores,
            spill_loads=loads,
            shared=sizes.get("smem", 0),
            barriers=int(used[2] or 0),
        )
    advice = (re.sub(r" in around line \d+", "", found.strip()) for found in _ADVICE.findall(text))
    return kernels, list(dict.fromkeys(advice))


def read_code(lines: Iterable[str]) -> dict[tuple[str, str], dict[str, int]]:
    """How many of the instructions named above each (symbol, arch) has, from `cuobjdump -sass`."""
    kernels: dict[tuple[str, str], Counter[str]] = {}
    arch, counts, products_left = "", Counter[str](), 0
    for line in lines:
        if found := _INSTRUCTION.match(line):
            if found[1] in (*_HOPPER, *_MATRIX, *_LOCAL):
                counts[found[1]] += 1
            if waits := _PRODUCTS_LEFT.search(line):
                products_left = int(waits[1], 16)
            elif products_left and "MUFU.EX2" in line:
                counts[_BESIDE] += 1
        elif "code for sm_" in line:
            arch = line.rpartition("_")[2].strip()
        elif "Function :" in line:
            counts = kernels.setdefault((line.rpartition(":")[2].strip(), arch), Counter())
            products_left = 0
    return {key: dict(counts) for key, counts in kernels.items()}


def judge(kernel: Kernel) -> list[str]:
    """Say what is wrong with a kernel.

    It must be in ptxas's report and in the object, and use no local memory: no stack, no spill, no
    instruction for it. A kernel of a file for sm_90 must multiply by warpgroups (HGMMA), copy tensors in bulk
    (UTMALDG), and have exponentials beside its products: ptxas may move them behind the wait for all.

    Returns:
        One line for each fault, that names the file, kernel and chip.
    """
    faults = []
    if kernel.report is None:
        faults.append("ptxas reported nothing on it")
    elif kernel.report.stack or kernel.report.spill_stores or kernel.report.spill_loads:
        stack, stores, loads = kernel.report.stack, kernel.report.spill_stores, kernel.report.spill_loads
        faults.append(f"{stack} bytes of stack, {stores} of spill stores and {loads} of spill loads")
    if kernel.instructions is None:
        faults.append("not in the object")
    else:
        if local := sum(kernel.instructions.get(name, 0) for name in _LOCAL):
            faults.append(f"{local} local loads and stores")
        if "_sm90" in kernel.source:
            missing = [name for name in ("HGMMA", "UTMALDG", _BESIDE) if not kernel.instructions.get(name)]
            faults += [f"no {name}, which every kernel of this file must have" for name in missing]
    place = f"{kernel.source}, {kernel.name}, sm_{kernel.arch}"
    return [f"{place}: {fault}" for fault in faults]


def judge_source(source: str, text: str, archs: tuple[str, ...], kernels: list[Kernel]) -> list[str]:
    """Say what is wrong with a file: its text, and its kernels taken together."""
    faults = []
    for arch in archs:
        if kernels and arch not in {kernel.arch for kernel in kernels}:
            faults.append(f"no kernel for sm_{arch}")
    if "_sm90" in source and not kernels:
        faults.append("no kernel")
    # Its size is the launcher's choice, which no report shows. The compiler holds a constant one against the
    # limit; one that depends on the inputs must be held against the device's answer.
    bounded = re.search(r"static_assert\([^;]*\bkSharedLimit\b", text)
    if "extern __shared__" in text and not bounded and "cudaDevAttrMaxSharedMemoryPerBlockOptin" not in text:
        faults.append(
            "extern __shared__, and its size is held against no limit: neither by a static_assert on "
            "kSharedLimit nor by cudaDevAttrMaxSharedMemoryPerBlockOptin"
        )
    shares = {what: int(count) for what, count in _REGISTERS.findall(text)}
    changing = [kernel for kernel in kernels if (kernel.instructions or {}).get("USETMAXREG")]
    if shares and not changing:
        faults.append("registers_raise is called, and no kernel has USETMAXREG")
    for kernel in changing:
        # One warpgroup lowers its share and two raise theirs, within what the three start with.
        needed = -(-(shares.get("lower", 0) + 2 * shares.get("raise", 0)) // 3)
        if kernel.report and kernel.report.registers < needed:
            faults.append(
                f"{kernel.name} starts with {kernel.report.registers} registers: with fewer than {needed} "
                "its warpgroups wait for each other's without end"
            )
    return [f"{source}: {fault}" for fault in faults]


def inspect(unit: nvcc.Unit, root: Path) -> tuple[list[Kernel], list[str]]:
    """The kernels of one source, and what is wrong with them and it."""
    reports, advice = read_report(unit.output(root, ".log").read_text(encoding="utf-8"))
    code = read_code(_disassemble(unit.output(root, ".o")))
    keys = sorted(reports.keys() | code.keys())
    named = dict(zip(keys, demangle([symbol for symbol, _ in keys]), strict=True))
    source = unit.source.name
    kernels = [Kernel(source, named[key], key[1], reports.get(key), code.get(key)) for key in keys]
    kernels.sort(key=lambda kernel: (kernel.name, int(kernel.arch.rstrip("a"))))
    faults = [fault for kernel in kernels for fault in judge(kernel)]
    faults += judge_source(source, (root / unit.source).read_text(encoding="utf-8"), unit.archs, kernels)
    return kernels, faults + [f"{source}: {line}" for line in demangle(advice)]


def demangle(texts: list[str]) -> list[str]:
    """Symbols, or lines that hold some, as C++ writes them without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(texts), capture_output=True, text=True, check=True
    )
    return [re.sub(r"\bgeo_r1::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]


def _disassemble(path: Path) -> list[str]:
    """Machine code for every chip, by the tool that comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def table(kernels: Iterable[Kernel]) -> str:
    """The kernels as aligned text, one a line; those without a report are among the faults."""
    lines: list[tuple[str, ...]] = [
        ("file", "kernel", "arch", "registers", "shared B", "barriers", "matrix, copies, registers")
    ]
    for kernel in kernels:
        if kernel.report and kernel.instructions is not None:
            numbers = (kernel.report.registers, kernel.report.shared, kernel.report.barriers)
            has = "+".join(name for name in (*_HOPPER, *_MATRIX) if name in kernel.instructions) or "-"
            lines.append((kernel.source, kernel.name, f"sm_{kernel.arch}", *map(str, numbers), has))
    return align_columns(lines, "<<>>>><")


def main(arguments: list[str] | None = None, root: Path = nvcc.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrc.gate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the kernels and the faults here too")
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: no folder {options.json.parent}")

    try:
        toolchain = nvcc.find_toolchain()
        nvcc.install(nvcc.build(toolchain, root), root / "geo_r1" / nvcc.EXTENSION)
    except nvcc.UnavailableError as reason:
        print(f"csrc: not built and not judged: {reason}")
        return 0
    except nvcc.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    units = sorted(nvcc.list_units(root, toolchain), key=lambda unit: unit.source)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda unit: inspect(unit, root), [unit for unit in units if unit.archs]))
    kernels = [kernel for some, _ in found for kernel in some]
    faults = [fault for _, some in found for fault in some]
    print(table(kernels))
    if options.json:
        record: dict[str, Any] = {"nvcc": ".".join(map(str, toolchain.release)), "archs": toolchain.archs}
        record |= {"kernels": [asdict(kernel) for kernel in kernels], "faults": faults}
        write_text(options.json, json.dumps(record, indent=1) + "\n")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(kernels)} kernels of csrc, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
