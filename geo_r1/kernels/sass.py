"""The loops of a kernel in its machine code, and what they spend on an element.

A kernel spends its time in loops with an exponential for each element: a logit, or a pair of a query and a
key. `read_loops` finds them as branches to an earlier instruction, and counts the longest way through each.
`pace` chooses those that an element passes through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

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
