"""How long a kernel takes on an H200 at least, from its machine code: a model, which measures nothing.

    time  = the longest of  instructions / issue slots,  exponentials / MUFU,  multiply-adds / tensor cores,
            bytes / bandwidth
    floor = the longer of   bytes / bandwidth,  multiply-adds / tensor cores at their full rate

A kernel spends its time in loops with an exponential for each element: a logit, or a pair of a query and a
key. `read_loops` finds them as branches to an earlier instruction, and counts the longest way through each.
`pace` chooses those that an element passes through. Whatever is outside them or waits is not counted, so a
kernel can be slower than this but not faster.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

# 132 SMs at 1.98 GHz. An SM issues to 4 x 32 lanes a cycle, and its MUFU gives 16 results: CUDA C++
# Programming Guide, "Arithmetic Instructions", compute capability 9.0.
_CYCLES = 132 * 1.98e9
ISSUE_SLOTS = _CYCLES * 4 * 32  # instructions of a thread, a second
MUFU = _CYCLES * 16  # exponentials a second
# Measured on an H200: an 8192 x 8192 x 8192 product in bfloat16; a copy, whose reads and writes both count.
TENSOR_CORES = 788e12 / 2  # multiply-adds a second
BANDWIDTH = 4.3e12  # bytes a second
# What else is reached of TENSOR_CORES. mma.sync gets 62.9 % of wgmma: arXiv:2402.13499. TF32 is half as fast.
_TENSOR_SHARE = {"HGMMA": 1.0, "HMMA": 0.629, "HGMMA TF32": 0.5, "HMMA TF32": 0.3145}

NO_LOOP = "no loop found that computes its exponentials, so nothing limits its instructions"

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+ +)?([A-Z][\w.]*)([^;]*);")
_ACCESS = re.compile(r"(LDG|LDGSTS|STG)\.E\b(?:.*\.[US]?(8|16|64|128|256)\b)?")
_MATRIX = re.compile(r"(HG?MMA)\.(?:64x(\d+)x(\d+)|168(\d+))\S*?( ?TF32)?$")


@dataclass(frozen=True)
class Instruction:
    """A line of machine code. `target`: the address that a branch may go to; `always`: nothing decides it."""

    address: int
    name: str
    target: int | None
    always: bool


@dataclass(frozen=True)
class Work:
    """What a kernel computes of one element.

    Attributes:
        exponentials: in all of its passes.
        item_bytes: of a logit, by which a loop's elements are counted.
        multiply_adds: of a pair, by which they are counted if there are any.
        stores: whether the last pass stores an element.
    """

    exponentials: int
    item_bytes: int = 0
    multiply_adds: int = 0
    stores: bool = False


@dataclass(frozen=True)
class Pace:
    """What a thread spends on an element, on average; bytes are those of global memory, caches included."""

    instructions: float = 0.0
    exponentials: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    multiply_adds: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Pace) -> Pace:
        return Pace(
            self.instructions + other.instructions,
            self.exponentials + other.exponentials,
            self.loaded + other.loaded,
            self.stored + other.stored,
            dict(Counter(self.multiply_adds) + Counter(other.multiply_adds)),
        )

    def __truediv__(self, count: float) -> Pace:
        products = {name: number / count for name, number in self.multiply_adds.items()}
        return Pace(
            self.instructions / count,
            self.exponentials / count,
            self.loaded / count,
            self.stored / count,
            products,
        )


def read(listing: Iterable[str]) -> list[Instruction]:
    """The instructions of one kernel, from the lines of `cuobjdump -sass`."""
    return [
        Instruction(
            address=int(found[1], 16),
            name=found[3],
            target=_target(found[4]) if found[3].split(".")[0] == "BRA" else None,
            always=not found[2] and not re.search(r"\bU?P\d", found[4]) and "DIV" not in found[3],
        )
        for line in listing
        if (found := _INSTRUCTION.match(line))
    ]


def _target(operands: str) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)


def read_loops(code: list[Instruction]) -> list[Pace]:
    """The innermost loops with an exponential, in one iteration of a thread.

    A loop begins where a branch leads back to, and ends at the last such branch that can be reached from
    there going forward. (Code that the compiler moved behind the kernel's end branches back, too, but cannot
    be reached.) Where a loop's code branches, the way with the most instructions counts.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    found: dict[int, tuple[int, Pace]] = {}
    for end, instruction in enumerate(code):
        if instruction.target is not None and instruction.target < instruction.address:
            start = index[instruction.target]
            way = _longest_way(code, index, start, end)
            if way and (spent := _count(way)).exponentials:
                found[start] = (end, spent)
    return [
        spent
        for start, (end, spent) in found.items()
        if not any(start <= s and e <= end for s, (e, _) in found.items() if s != start)
    ]


def _longest_way(code: list[Instruction], index: Mapping[int, int], start: int, end: int) -> list[str]:
    """Names of the instructions on the longest way forward from `start` to `end`; none without a way."""
    before: dict[int, int] = {start: -1}  # the instruction before each that can be reached
    length = {start: 1}
    for i in range(start, end):
        if i not in before:
            continue
        at = code[i]
        after = [] if at.always and at.name.split(".")[0] in ("BRA", "EXIT", "RET") else [i + 1]
        if at.target is not None:
            after.append(index[at.target])
        for j in after:
            if i < j <= end and length[i] + 1 > length.get(j, 0):
                before[j], length[j] = i, length[i] + 1
    way: list[str] = []
    i = end if end in before else -1
    while i >= 0:
        way.append(code[i].name)
        i = before[i]
    return way


def _count(names: list[str]) -> Pace:
    """What a thread spends on a way through a loop. A matrix instruction is shared out among its threads."""
    moved, products = Counter[str](), dict[str, float]()
    for name in names:
        if access := _ACCESS.match(name):
            moved[access[1]] += int(access[2] or 32) // 8
        elif matrix := _MATRIX.match(name):
            kind, columns, wide_depth, depth, tf32 = matrix.groups()
            each = int(columns) * int(wide_depth) * 64 / 128 if columns else 16 * 8 * int(depth) / 32
            kind += " TF32" if tf32 else ""
            products[kind] = products.get(kind, 0.0) + each
    exponentials = sum(name.startswith("MUFU.EX2") for name in names)
    return Pace(len(names), exponentials, moved["LDG"] + moved["LDGSTS"], moved["STG"], products)


def pace(code: list[Instruction], work: Work) -> Pace | None:
    """What a thread spends on an element of some work; None if no loops compute its exponentials.

    A kernel may have several loops for one pass, such as with a mask and without. Most elements go through
    the cheapest. Two passes are two loops, of which the second stores; or one loop, if it reads the next row
    while it stores this one.
    """
    loops = []
    for loop in read_loops(code):
        products = sum(loop.multiply_adds.values())
        count = products / work.multiply_adds if work.multiply_adds else loop.loaded / work.item_bytes
        if count:
            loops.append(loop / count)
    reading = [loop for loop in loops if not loop.stored]
    storing = [loop for loop in loops if loop.stored]
    ways = (
        [*storing, *(read + store for read, store in product(reading, storing))] if work.stores else reading
    )
    enough = (way for way in ways if way.exponentials > 0.99 * work.exponentials)
    return min(enough, key=lambda way: way.instructions, default=None)


# ---- what the kernels compute

_ITEM_BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
_TF32_PRODUCTS = 3  # for one in float32, see attention's PRECISION
_EXPONENTIALS = {"_statistics_kernel": 1, "_loss_kernel": 2, "_gradient_kernel": 1}
_PRODUCTS = {"_forward_kernel": 2, "_d_query_kernel": 3, "_d_key_kernel": 4}  # of D multiply-adds a pair


def triton_work(kernel: str, arguments: Mapping[str, Any]) -> Work | None:
    """The work of a Triton kernel, given its arguments' types or values; None if it has no large loop."""
    if kernel in _PRODUCTS:
        exact = arguments["q_ptr"] == "*fp32"
        head_size = arguments["D0"] + arguments["D1"]
        return Work(1, multiply_adds=_PRODUCTS[kernel] * head_size * (_TF32_PRODUCTS if exact else 1))
    if kernel in _EXPONENTIALS:
        stores = kernel != "_statistics_kernel" and arguments.get("GRADIENT", True)
        passes = _EXPONENTIALS[kernel] if stores else 1
        return Work(passes, item_bytes=_ITEM_BYTES[arguments["logits_ptr"]], stores=stores)
    return None


# ---- the targets' sizes


@dataclass(frozen=True)
class Target:
    """A size of the benchmarks.

    Attributes:
        place: family, case and name of the Triton kernel that is built for it.
        elements, bytes: of the whole input; each byte counts once, also if it is read again from L2.
        multiply_adds: that the kernel's products need.
    """

    place: tuple[str, str, str]
    size: str
    elements: float
    bytes: float
    multiply_adds: float = 0.0


def _rows(num_cols: int) -> list[Target]:
    num_rows, item_bytes = 4096, 2
    elements = num_rows * num_cols
    size, label = f"{num_rows} x {num_cols}", f"V {num_cols} bfloat16"
    return [
        Target(("loss", f"{case}, {label}", kernel), size, elements, item_bytes * moved * elements)
        for kernel, case, moved in (
            ("_statistics_kernel", "statistics", 1),
            ("_loss_kernel", "loss, clip", 2),
            ("_gradient_kernel", "gradient", 2),
        )
    ]


def _attention(size: str, lengths: Sequence[int], heads: int, kv_heads: int, head_size: int) -> list[Target]:
    causal = kv_heads < heads
    pairs = heads * sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    case = f"packed_attention long D={head_size} {'causal' if causal else 'full'} torch.bfloat16"
    vectors = 2 * sum(lengths) * head_size  # bytes of one head's vectors
    moved = {
        "_forward_kernel": 2 * heads + 2 * kv_heads,  # q, out; k, v
        "_d_query_kernel": 4 * heads + 2 * kv_heads,  # q, out, dout, dq; k, v
        "_d_key_kernel": 4 * heads + 2 * kv_heads,  # q, dout, dk, dv; k, v
    }
    return [
        Target(
            ("attention", case, kernel), size, pairs, vectors * moved[kernel], pairs * products * head_size
        )
        for kernel, products in _PRODUCTS.items()
    ]


TARGETS = (
    *_rows(152064),
    *_rows(151674),
    *_attention("causal 4 x 4096", (4096,) * 4, 28, 4, 128),
    *_attention("vision whole images", (2664, *(2916,) * 5), 16, 16, 80),
)


def bounds(target: Target, spent: Pace) -> dict[str, float]:
    """Milliseconds by what could take them; the largest is the estimate."""
    tensor = sum(number / _TENSOR_SHARE[kind] for kind, number in spent.multiply_adds.items())
    seconds = {
        "issue slots": spent.instructions * target.elements / ISSUE_SLOTS,
        "exponentials": spent.exponentials * target.elements / MUFU,
        "tensor cores": tensor * target.elements / TENSOR_CORES,
        "bytes": target.bytes / BANDWIDTH,
    }
    return {what: 1e3 * time for what, time in seconds.items()}


ALIGNS = "<<>>>><>>>"  # of the columns of `table`


def table(found: Iterable[tuple[str, Target, Pace]]) -> list[tuple[str, ...]]:
    """A heading, and a line for each kernel, its target and its pace."""
    lines: list[tuple[str, ...]] = [
        (
            *("on an H200, at least", "size", "instructions", "exponentials", "bytes", "multiply-adds"),
            *("bound by", "ms", "floor ms", "share"),
        )
    ]
    for name, target, spent in found:
        times = bounds(target, spent)
        bound = max(times, key=lambda what: times[what])
        floor = 1e3 * max(target.bytes / BANDWIDTH, target.multiply_adds / TENSOR_CORES)
        numbers = (spent.instructions, spent.exponentials, spent.loaded + spent.stored)
        products = f"{sum(spent.multiply_adds.values()):.0f}" if spent.multiply_adds else "-"
        milliseconds = (f"{times[bound]:.3f}", f"{floor:.3f}", f"{floor / times[bound]:.0%}")
        counts = (f"{number:.2f}" for number in numbers)
        lines.append((name, target.size, *counts, products, bound, *milliseconds))
    return lines
