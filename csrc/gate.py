"""Builds the CUDA kernels of csrc/ for each chip and judges each kernel; needs no GPU.

    python -m csrc.gate [--json PATH]

nvcc.py first brings the extension up to date. The gate then reads two things for every kernel: the report
that ptxas wrote when it compiled the kernel (`-Xptxas -v`), and the machine code. `judge` and `judge_source`
state the rules; the exit code is 1 if any is broken. If nothing can be built, the gate prints the reason in
one line and judges nothing.

For an H200 it also estimates how long the kernels of the benchmarks take, see `geo_r1/kernels/floor.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from csrc import nvcc
from geo_r1.kernels import aot, floor, sass
from geo_r1.kernels.built import align_columns

# Instructions: a warpgroup's products, bulk copies of tensors, changes of a warpgroup's share of registers.
_HOPPER = ("HGMMA", "UTMALDG", "USETMAXREG")
_MATRIX = ("HMMA", "IMMA", "DMMA")
_LOCAL = ("STL", "LDL")
# An exponential between a wait that leaves products under way and the next wait runs beside them.
_BESIDE = "MUFU.EX2 beside HGMMA"

# Kernel -> the Triton kernel and size of the benchmark that it runs in, and the most instructions that it may
# spend on an element on sm_90: a twentieth above what it spends with CUDA 13.0. `gradient_kernel` has no loop
# over vectors, so its pace is unknown.
_TEXT, _VISION, _ROWS = "causal 4 x 4096", "vision whole images", "4096 x 152064"
_BENCHMARKS = {
    "rows_kernel<__nv_bfloat16, true, false>": ("_statistics_kernel", _ROWS, 12.4),
    "rows_kernel<__nv_bfloat16, true, true>": ("_loss_kernel", _ROWS, 20.8),
    "forward_kernel<__nv_bfloat16, 128, 2>": ("_forward_kernel", _TEXT, 11.0),
    "query_gradient_kernel<__nv_bfloat16, 128, 2>": ("_d_query_kernel", _TEXT, 13.9),
    "key_gradient_kernel<__nv_bfloat16, 128, 2>": ("_d_key_kernel", _TEXT, 15.5),
    "forward_kernel<__nv_bfloat16, 80, 2>": ("_forward_kernel", _VISION, 11.0),
    "query_gradient_kernel<__nv_bfloat16, 80, 2>": ("_d_query_kernel", _VISION, 14.1),
    "key_gradient_kernel<__nv_bfloat16, 80, 2>": ("_d_key_kernel", _VISION, 15.8),
}
_PRODUCTS = {"forward_kernel": 2, "query_gradient_kernel": 3, "key_gradient_kernel": 4}

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
    """ptxas's report on a kernel, in bytes per thread; `shared` is static bytes per block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    barriers: int


@dataclass(frozen=True)
class Kernel:
    """One kernel, built for one chip.

    Attributes:
        source: the file's name.
        name: as in C++, without namespaces and parameters.
        arch: compute capability as nvcc writes it, "90a".
        report: None if ptxas reported nothing.
        instructions: counts of those that `judge` or the table names; None if the object lacks the kernel.
        pace: what it spends on an element, if it runs in a benchmark and its loops were found.
    """

    source: str
    name: str
    arch: str
    report: Report | None
    instructions: dict[str, int] | None
    pace: sass.Pace | None = None


def read_report(text: str) -> tuple[dict[tuple[str, str], Report], list[str]]:
    """Read the output of `nvcc -Xptxas -v`: kernels by (symbol, arch), and each warning of slow code once."""
    kernels = {}
    for entry, after in zip(_ENTRY.finditer(text), _ENTRY.split(text)[3::3], strict=True):
        properties, used = _PROPERTIES.search(after), _USED.search(after)
        if not (properties and used):
            continue  # `judge` names a kernel without a report
        used_line = after[used.start() :].partition("\n")[0]
        sizes = {what: int(size) for size, what in _SIZES.findall(used_line)}
        stack, stores, loads = map(int, properties.groups())
        kernels[entry[1], entry[2]] = Report(
            registers=int(used[1]),
            stack=max(stack, sizes.get("cumulative stack size", 0)),  # including functions that it calls
            spill_stores=stores,
            spill_loads=loads,
            shared=sizes.get("smem", 0),
            barriers=int(used[2] or 0),
        )
    advice = (re.sub(r" in around line \d+", "", found.strip()) for found in _ADVICE.findall(text))
    return kernels, list(dict.fromkeys(advice))


def split_code(lines: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The lines of each (symbol, arch) in the output of `cuobjdump -sass`."""
    kernels: dict[tuple[str, str], list[str]] = {}
    arch, code = "", list[str]()
    for line in lines:
        if "code for sm_" in line:
            arch, code = line.rpartition("_")[2].strip(), []
        elif "Function :" in line:
            code = kernels.setdefault((line.rpartition(":")[2].strip(), arch), [])
        else:
            code.append(line)
    return kernels


def count_code(lines: Iterable[str]) -> dict[str, int]:
    """Count the instructions named above in the lines of one kernel."""
    counts, products_left = Counter[str](), 0
    for line in lines:
        if found := _INSTRUCTION.match(line):
            if found[1] in (*_HOPPER, *_MATRIX, *_LOCAL):
                counts[found[1]] += 1
            if waits := _PRODUCTS_LEFT.search(line):
                products_left = int(waits[1], 16)
            elif products_left and "MUFU.EX2" in line:
                counts[_BESIDE] += 1
    return dict(counts)


def measure(name: str, lines: Iterable[str]) -> sass.Pace | None:
    """The pace of a kernel that runs in a benchmark, from its lines."""
    if name not in _BENCHMARKS:
        return None
    kernel, arguments = name.rstrip(">").split("<")
    _, size, last = arguments.split(", ")  # all are in bfloat16
    if kernel in _PRODUCTS:
        work = sass.Work(1, multiply_adds=_PRODUCTS[kernel] * int(size))
    else:
        gradient = last == "true"
        work = sass.Work(1 + gradient, item_bytes=2, stores=gradient)
    return sass.pace(sass.read(lines), work)


def judge(kernel: Kernel) -> list[str]:
    """List the faults of a kernel, one line each with its file, name and chip.

    It must be in ptxas's report and in the object, and use no local memory: no stack, no spill, no
    instruction for it. A kernel of a file for sm_90 must multiply by warpgroups (HGMMA), copy tensors in
    bulk (UTMALDG), and run exponentials beside its products: ptxas may move them behind all products. On
    sm_90 a kernel that runs in a benchmark has a limit of instructions for an element.
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
    if kernel.name in _BENCHMARKS and kernel.arch == "90a" and kernel.instructions is not None:
        limit = _BENCHMARKS[kernel.name][2]
        if kernel.pace is None:
            faults.append(sass.NO_LOOP)
        elif kernel.pace.instructions > limit:
            faults.append(
                f"{kernel.pace.instructions:.2f} instructions an element, over the limit of {limit}"
            )
    place = f"{kernel.source}, {kernel.name}, sm_{kernel.arch}"
    return [f"{place}: {fault}" for fault in faults]


def judge_source(source: str, text: str, archs: tuple[str, ...], kernels: list[Kernel]) -> list[str]:
    """List the faults of a file: those of its text, and those of its kernels together."""
    faults = []
    for arch in archs:
        if kernels and arch not in {kernel.arch for kernel in kernels}:
            faults.append(f"no kernel for sm_{arch}")
    if "_sm90" in source and not kernels:
        faults.append("no kernel")
    # The launcher chooses the size of extern shared memory, and no report shows it. A static_assert checks a
    # constant size; a size that depends on the inputs must be compared with the device's own limit.
    bounded = re.search(r"static_assert\([^;]*\bkSharedLimit\b", text)
    if "extern __shared__" in text and not bounded and "cudaDevAttrMaxSharedMemoryPerBlockOptin" not in text:
        faults.append(
            "extern __shared__, and its size is not checked against a limit: needs a static_assert on "
            "kSharedLimit or cudaDevAttrMaxSharedMemoryPerBlockOptin"
        )
    shares = {what: int(count) for what, count in _REGISTERS.findall(text)}
    changing = [kernel for kernel in kernels if (kernel.instructions or {}).get("USETMAXREG")]
    if shares and not changing:
        faults.append("registers_raise is called, and no kernel has USETMAXREG")
    for kernel in changing:
        # One warpgroup lowers its share and two raise theirs, within the registers that the three start with.
        needed = -(-(shares.get("lower", 0) + 2 * shares.get("raise", 0)) // 3)
        if kernel.report and kernel.report.registers < needed:
            faults.append(
                f"{kernel.name} starts with {kernel.report.registers} registers: with fewer than {needed} "
                "its warpgroups wait forever for each other's"
            )
    return [f"{source}: {fault}" for fault in faults]


def inspect(unit: nvcc.Unit, root: Path) -> tuple[list[Kernel], list[str]]:
    """The kernels of one source, and the faults of both."""
    reports, advice = read_report(unit.output(root, ".log").read_text(encoding="utf-8"))
    code = split_code(_disassemble(unit.output(root, ".o")))
    keys = sorted(reports.keys() | code.keys())
    named = dict(zip(keys, demangle([symbol for symbol, _ in keys]), strict=True))
    source = unit.source.name
    kernels = []
    for key in keys:
        name, arch, lines = named[key], key[1], code.get(key)
        counts = None if lines is None else count_code(lines)
        spent = measure(name, lines) if lines and arch == "90a" else None
        kernels.append(Kernel(source, name, arch, reports.get(key), counts, spent))
    kernels.sort(key=lambda kernel: (kernel.name, int(kernel.arch.rstrip("a"))))
    faults = [fault for kernel in kernels for fault in judge(kernel)]
    faults += judge_source(source, (root / unit.source).read_text(encoding="utf-8"), unit.archs, kernels)
    return kernels, faults + [f"{source}: {line}" for line in demangle(advice)]


def demangle(texts: list[str]) -> list[str]:
    """Replace mangled symbols in lines with their C++ names, without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(texts), capture_output=True, text=True, check=True
    )
    return [re.sub(r"\bgeo_r1::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]


def _disassemble(path: Path) -> list[str]:
    """Machine code for every chip, from Triton's cuobjdump."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def table(kernels: Iterable[Kernel]) -> str:
    """The kernels as aligned text, one per line; those without a report are among the faults."""
    lines: list[tuple[str, ...]] = [
        ("file", "kernel", "arch", "registers", "shared B", "barriers", "matrix, copies, registers")
    ]
    for kernel in kernels:
        if kernel.report and kernel.instructions is not None:
            numbers = (kernel.report.registers, kernel.report.shared, kernel.report.barriers)
            has = "+".join(name for name in (*_HOPPER, *_MATRIX) if name in kernel.instructions) or "-"
            lines.append((kernel.source, kernel.name, f"sm_{kernel.arch}", *map(str, numbers), has))
    return align_columns(lines, "<<>>>><")


def benchmark_table(kernels: Iterable[Kernel]) -> str:
    """A line for each kernel that runs in a benchmark, on an H200."""
    targets = {(target.place[2], target.size): target for target in floor.TARGETS}
    found = [
        (kernel.name, targets[_BENCHMARKS[kernel.name][:2]], kernel.pace) for kernel in kernels if kernel.pace
    ]
    return align_columns(floor.table(found), floor.ALIGNS)


def main(arguments: list[str] | None = None, root: Path = nvcc.ROOT) -> int:
    options = aot.parse(aot.make_parser("python -m csrc.gate", __doc__), arguments)
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
    record = {
        "nvcc": ".".join(map(str, toolchain.release)),
        "archs": toolchain.archs,
        "kernels": [asdict(kernel) for kernel in kernels],
        "faults": [fault for _, some in found for fault in some],
    }
    text = f"{table(kernels)}\n\n{benchmark_table(kernels)}"
    return aot.conclude(text, f"{len(kernels)} kernels of csrc", record, options.json)


if __name__ == "__main__":
    sys.exit(main())
