"""A kernel that was built for a chip: what it needs, what the chip has, and its faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from geo_r1.kernels import sass


@dataclass(frozen=True)
class Chip:
    """Limits of a compute capability.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    Attributes:
        gpus: examples.
        shared: KiB of shared memory that one program can have; an SM has one more.
        warps, programs: the most on an SM.
        matrix: the PTX instruction that multiplies tiles of at least 64 rows fastest.
    """

    gpus: str
    shared: int
    warps: int
    programs: int
    matrix: str = "mma.sync"


CHIPS = {
    80: Chip("A100", 163, 64, 32),
    86: Chip("A10, RTX 30", 99, 48, 16),
    89: Chip("L4, L40, RTX 40", 99, 48, 24),
    90: Chip("H100, H200", 227, 64, 32, "wgmma"),
    100: Chip("B200", 227, 64, 32, "tcgen05.mma"),
    120: Chip("RTX 50", 99, 48, 24),
}
H200 = 90
_SHARED_RESERVED = 1024  # bytes that an SM reserves for each program


@dataclass(frozen=True)
class Built:
    """One kernel, built for one chip.

    Attributes:
        family: the family of ops, such as "attention".
        case: label of the first case that launched it.
        arch: compute capability, 90 for an H200.
        registers: per thread.
        stack: bytes of stack and local memory per thread.
        spills: instructions that load from or store to local memory, which come with a stack.
        shared: bytes of shared memory per program; Triton asks for all of it at launch.
        dots: (operand type, rows) of each `tl.dot`; no entry for exact float32, which has no matrix
            instruction.
        matrix: the kinds of matrix instruction in its PTX.
        pace: what it spends on an element, on sm_90, if its loops were found.
        limit, stack_limit: what its launch row allows of instructions for an element on sm_90 (None: any
            number) and of stack.
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
    pace: sass.Pace | None = None
    limit: float | None = None
    stack_limit: int = 0

    @property
    def programs_per_sm(self) -> int:
        """How many programs fit on an SM at once, by warps, registers and shared memory."""
        chip = CHIPS[self.arch]
        registers_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // registers_warp // 4 * 4 // self.num_warps  # even over an SM's four parts
        shared = -(-self.shared // 128) * 128 + _SHARED_RESERVED
        by_shared = (chip.shared + 1) * 1024 // shared
        return min(chip.programs, chip.warps // self.num_warps, by_registers, by_shared)


def judge(built: Built) -> list[str]:
    """List the faults of a kernel, one line each with its family, case and chip.

    A kernel must not spill, must fit the chip's shared memory, must use the chip's matrix instructions where
    it multiplies matrices, and on sm_90 must keep within the limit of its launch row. If a product of 16-bit
    operands has at least 64 rows and the program has at least four warps, it must be the fastest matrix
    instruction of the chip. A smaller product cannot be a wgmma, and other types may lack the layout for it.
    """
    faults, chip = [], CHIPS[built.arch]
    if built.stack > built.stack_limit or (built.spills and not built.stack_limit):
        faults.append(f"spills: {built.stack} bytes of stack, {built.spills} local loads and stores")
    if built.shared > chip.shared * 1024:
        faults.append(f"{built.shared} bytes of shared memory, over the {chip.shared * 1024} there are")
    wide = built.num_warps >= 4 and any(rows >= 64 and kind in ("f16", "bf16") for kind, rows in built.dots)
    if wide and chip.matrix not in built.matrix:
        faults.append(f"no {chip.matrix}, found {' '.join(built.matrix) or 'no matrix instruction'}")
    elif built.dots and not built.matrix:
        faults.append("tl.dot without a matrix instruction")
    if built.limit is not None and built.arch == H200:
        if built.pace is None:
            faults.append(sass.NO_LOOP)
        elif built.pace.instructions > built.limit:
            spent, limit = built.pace.instructions, built.limit
            faults.append(f"{spent:.2f} instructions an element, over the {limit} of its launch row")
    place = f"{built.family}, case {built.case!r}, sm_{built.arch}, {built.kernel}"
    return [f"{place}: {fault}" for fault in faults]


def table(kernels: Iterable[Built]) -> str:
    """The kernels as aligned text, one per line."""
    lines: list[tuple[str, ...]] = [
        (
            *("kernel", "case", "arch", "warps", "stages", "registers", "shared KiB", "programs/SM"),
            *("instructions", "matrix"),
        )
    ]
    for built in kernels:
        numbers = (built.num_warps, built.num_stages, built.registers, f"{built.shared / 1024:.1f}")
        spent = f"{built.pace.instructions:.2f}" if built.pace else "-"
        after = (built.programs_per_sm, spent, "+".join(built.matrix) or "-")
        lines.append(tuple(map(str, (built.kernel, built.case, f"sm_{built.arch}", *numbers, *after))))
    return align_columns(lines, "<<>>>>>>><")


def chip_table(kernels: Sequence[Built], arches: Iterable[int]) -> str:
    """One line for each chip: its kernels, those at fault, and the one that is closest to each limit."""
    lines: list[tuple[str, ...]] = [
        (
            "chip",
            "GPUs",
            "kernels",
            "at fault",
            "spill",
            "registers",
            "shared KiB",
            "of",
            "programs/SM",
            "matrix",
        )
    ]
    for arch in arches:
        chip, mine = CHIPS[arch], [built for built in kernels if built.arch == arch]

        def most(value: Callable[[Built], int], mine: list[Built] = mine) -> int:
            return max(map(value, mine), default=0)

        counts = (
            len(mine),
            sum(bool(judge(built)) for built in mine),
            sum(built.stack > 0 for built in mine),
        )
        shared = f"{most(lambda built: built.shared) / 1024:.1f}"
        fewest = min((built.programs_per_sm for built in mine), default=0)
        matrix = " ".join(sorted({name for built in mine for name in built.matrix})) or "-"
        limits = (most(lambda built: built.registers), shared, chip.shared, fewest, matrix)
        lines.append(tuple(map(str, (f"sm_{arch}", chip.gpus, *counts, *limits))))
    return align_columns(lines, "<<>>>>>>><")


def align_columns(lines: Sequence[Sequence[str]], aligns: str) -> str:
    """Lines of cells as text; `aligns` has "<" for each column of words and ">" for each of numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{align}{width}}" for text, align, width in zip(line, aligns, widths, strict=True))
        for line in lines
    )
