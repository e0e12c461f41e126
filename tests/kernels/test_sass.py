"""Loops and what they spend, in machine code written by hand and in a real kernel."""

import os
import subprocess
import sys

import pytest

from geo_r1.kernels import sass

ROW = sass.Work(exponentials=1, item_bytes=2)


def code(text):
    """Instructions, one a line at addresses 0x10 apart; `>name` is a label, and a branch's operand."""
    lines = [words for line in text.splitlines() if (words := line.split("#")[0].split())]
    labels, address = {}, 0
    for words in lines:
        if words[0].startswith(">"):
            labels[words[0][1:]] = address
        else:
            address += 16
    listing = []
    for words in lines:
        if not words[0].startswith(">"):
            words = [f"{labels[word]:#x}" if word in labels else word for word in words]
            listing.append(
                f"        /*{8 * len(listing):04x}*/      {' '.join(words)} ;   /* 0x00000a0000017a02 */"
            )
            listing.append("                                          /* 0x003fde0000000f00 */")
    return sass.read(listing)


# One element an iteration is 2 bytes. Seven instructions; a zero-trip guard before, an endless loop behind.
LOOP = """
    S2R R0, SR_TID.X
    @P1 EXIT
    >head
    LDG.E.U16 R4, desc[UR4][R2.64]
    FADD R4, R4, R5
    MUFU.EX2 R4, R4
    FFMA R6, R4, R7, R6
    IADD3 R2, P0, R2, 0x2, RZ
    ISETP.GE.AND P0, PT, R2, R8, PT
    @!P0 BRA head
    EXIT
    >trap
    BRA trap
"""


def test_instructions_are_read():
    first, guard, *_, trap = code(LOOP)
    assert first == sass.Instruction(0, "S2R", None, True)
    assert guard == sass.Instruction(16, "EXIT", None, False)
    assert trap == sass.Instruction(160, "BRA", 160, True)
    operand, spread = code("BRA P1, 0x30\nBRA.DIV UR4, 0x40")
    assert operand == sass.Instruction(0, "BRA", 0x30, False)
    assert spread == sass.Instruction(16, "BRA.DIV", 0x40, False)


def test_a_loop_is_counted_for_each_element():
    assert sass.read_loops(code(LOOP)) == [sass.Pace(7, 1, loaded=2)]
    assert sass.pace(code(LOOP), ROW) == sass.Pace(7, 1, loaded=2)
    # A vector of 16 bytes is eight elements.
    assert sass.pace(code(LOOP.replace("LDG.E.U16", "LDG.E.128")), ROW) is None, "one exponential for eight"
    wide = LOOP.replace("LDG.E.U16", "LDGSTS.E.BYPASS.128").replace(
        "MUFU.EX2 R4, R4", "MUFU.EX2 R4, R4\n" * 8
    )
    assert sass.pace(code(wide), ROW) == sass.Pace(14 / 8, 1, loaded=2)
    assert sass.pace(code("EXIT"), ROW) is None


@pytest.mark.parametrize(
    ("access", "loaded", "stored"),
    [
        ("LDG.E R4", 4, 0),
        ("LDG.E.EF.64 R4", 8, 0),
        ("LDG.E.128.CONSTANT R4", 16, 0),
        ("LDGSTS.E.LTC128B.64 [R4]", 8, 0),
        ("LDS.128 R4", 0, 0),
        ("STG.E.U8 R4", 0, 1),
        ("STG.E.EF.128 R4", 0, 16),
        ("LDGDEPBAR", 0, 0),
    ],
)
def test_bytes_of_an_access(access, loaded, stored):
    (loop,) = sass.read_loops(code(f">head\n{access}\nMUFU.EX2 R4, R4\n@P0 BRA head"))
    assert (loop.loaded, loop.stored) == (loaded, stored)


@pytest.mark.parametrize(
    ("matrix", "kind", "multiply_adds"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HGMMA", 64 * 128 * 16 / 128),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", "HGMMA TF32", 64 * 64 * 8 / 128),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA", 16 * 8 * 16 / 32),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "HMMA TF32", 16 * 8 * 8 / 32),
    ],
)
def test_a_matrix_instruction_is_shared_by_its_threads(matrix, kind, multiply_adds):
    pair = code(f">head\n{matrix}\nMUFU.EX2 R4, R4\n@P0 BRA head")
    assert sass.read_loops(pair) == [sass.Pace(3, 1, multiply_adds={kind: multiply_adds})]
    work = sass.Work(1, multiply_adds=int(multiply_adds) // 2)
    assert sass.pace(pair, work) is None, "two pairs, one exponential"
    assert sass.pace(pair, sass.Work(1, multiply_adds=int(multiply_adds))).instructions == 3


def test_where_ways_part_the_longer_counts():
    parted = """
        >head
        LDG.E.U16 R4, desc[UR4][R2.64]
        @P2 BRA short
        FADD R4, R4, R5      # four instructions
        FADD R4, R4, R5
        FADD R4, R4, R5
        BRA met
        >short
        MUFU.RCP R4, R4
        >met
        MUFU.EX2 R4, R4
        @P0 BRA head
        EXIT
    """
    assert sass.read_loops(code(parted)) == [sass.Pace(8, 1, loaded=2)]


def test_code_behind_the_end_is_no_loop():
    """A wait whose second and later tries the compiler moved away, and a branch back from there."""
    waiting = """
        >head
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
        @!P0 BRA again
        >ready
        LDG.E.U16 R4, desc[UR4][R2.64]
        MUFU.EX2 R4, R4
        @P1 BRA head
        EXIT
        >again
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
        @!P0 BRA again
        BRA ready
    """
    assert sass.read_loops(code(waiting)) == [sass.Pace(5, 1, loaded=2)]


def test_only_innermost_loops_with_exponentials_count():
    nested = f"""
        >rows
        >zeros
        STG.E.U16 [R2.64], RZ
        @P3 BRA zeros
        {LOOP.split("EXIT")[1]}
        MUFU.EX2 R4, R4
        @P4 BRA rows
        EXIT
    """
    assert sass.read_loops(code(nested)) == [sass.Pace(7, 1, loaded=2)]


def loop(label, extra, *, stores=False, exponentials=1):
    store = "STG.E.U16 [R2.64], R4\n" if stores else ""
    body = (
        "LDG.E.U16 R4, desc[UR4][R2.64]\n"
        + "MUFU.EX2 R4, R4\n" * exponentials
        + store
        + "FADD R4, R4, R5\n" * extra
    )
    return f">{label}\n{body}@P0 BRA {label}\n"


def test_the_loops_of_an_element_are_chosen():
    twice = sass.Work(exponentials=2, item_bytes=2, stores=True)
    read, masked, write = loop("a", 7), loop("b", 9), loop("c", 16, stores=True)
    assert sass.pace(code(read + masked), ROW).instructions == 10, "the cheaper of two for one pass"
    once = sass.Work(exponentials=1, item_bytes=2, stores=True)
    assert sass.pace(code(masked + write), once) == sass.Pace(20, 1, loaded=2, stored=2)
    assert sass.pace(code(read + masked + write), twice) == sass.Pace(30, 2, loaded=4, stored=2)
    assert sass.pace(code(read + masked), twice) is None, "nothing stores the second pass"
    both = loop("d", 15, stores=True, exponentials=2)
    assert sass.pace(code(read + masked + write + both), twice) == sass.Pace(20, 2, loaded=2, stored=2)


REAL = """
from geo_r1.kernels import aot
built, _, _ = aot.build_case("loss", "statistics, V 152064 bfloat16", [90])
print(*(kernel.pace for kernel in built.values()))
"""


def test_a_real_kernel():
    """The statistics read their logits once. How many instructions that may take is in the launch row."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, env=environment, check=True
    )
    spent = eval(done.stdout, {"Pace": sass.Pace})
    assert (spent.loaded, spent.stored, spent.multiply_adds) == (2.0, 0.0, {})
    assert 1.0 <= spent.exponentials < 1.5
    assert 4.0 < spent.instructions < 40.0
