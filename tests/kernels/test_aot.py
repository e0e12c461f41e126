"""The ahead-of-time gate: what it finds wrong, what it counts, and one module built for real."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from geo_r1.kernels import aot, built, launch, sass
from geo_r1.kernels.launch import Launch

GOOD = built.Built(
    family="some",
    kernel="_some_kernel",
    case="bfloat16",
    arch=90,
    num_warps=8,
    num_stages=3,
    registers=128,
    stack=0,
    spills=0,
    shared=100 * 1024,
    dots=(("bf16", 128),),
    matrix=("wgmma",),
    pace=sass.Pace(instructions=20.0, exponentials=1.0),
    limit=20.0,
)
TABLE = (Launch("narrow", num_warps=4, BLOCK=64), Launch("wide", num_warps=8, BLOCK=128))


def compiling():
    """An environment in which Triton compiles and finds no GPU."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8, "spills": 3}, "spills: 8 bytes of stack, 3 local loads and stores"),
        ({"stack": 8, "stack_limit": 8}, None),
        ({"stack": 16, "stack_limit": 8}, "spills: 16 bytes of stack, 0 local loads and stores"),
        ({"shared": 232448}, None),
        ({"shared": 232449}, "232449 bytes of shared memory, over the 232448 there are"),
        ({"arch": 80, "matrix": ("mma.sync",), "shared": 166912}, None),
        ({"arch": 80, "matrix": ("mma.sync",), "shared": 166913}, "over the 166912 there are"),
        *(({"arch": arch, "matrix": ("mma.sync",), "shared": 101376}, None) for arch in (86, 89, 120)),
        ({"arch": 120, "matrix": ("mma.sync",), "shared": 101377}, "over the 101376 there are"),
        ({"matrix": ("mma.sync",)}, "no wgmma, found mma.sync"),
        ({"matrix": ()}, "no wgmma, found no matrix instruction"),
        ({"matrix": ("mma.sync", "wgmma")}, None),
        ({"arch": 100, "matrix": ("tcgen05.mma",)}, None),
        ({"arch": 100, "matrix": ("mma.sync",)}, "no tcgen05.mma, found mma.sync"),
        # Too small for wgmma, or of a type that may lack the layout: any matrix instruction will do.
        ({"matrix": ("mma.sync",), "num_warps": 2}, None),
        ({"matrix": ("mma.sync",), "dots": (("bf16", 32),)}, None),
        ({"matrix": ("mma.sync",), "dots": (("f32", 128),)}, None),
        ({"matrix": ("mma.sync",), "dots": (("bf16", 16), ("f16", 64))}, "no wgmma, found mma.sync"),
        ({"matrix": (), "dots": (("bf16", 32),)}, "tl.dot without a matrix instruction"),
        ({"matrix": (), "arch": 80, "dots": (("bf16", 32),)}, "tl.dot without a matrix instruction"),
        ({"matrix": (), "dots": ()}, None),
        ({"limit": 19.5}, "20.00 instructions an element, over the 19.5 of its launch row"),
        ({"limit": 19.5, "arch": 100, "matrix": ("tcgen05.mma",), "pace": None}, None),
        ({"pace": None}, sass.NO_LOOP),
        ({"pace": None, "limit": None}, None),
    ],
)
def test_faults_are_found_and_named(change, fault):
    found = built.judge(dataclasses.replace(GOOD, **change))
    if fault is None:
        assert found == []
    else:
        (line,) = found
        chip = change.get("arch", 90)
        assert line.startswith(f"some, case 'bfloat16', sm_{chip}, _some_kernel: ")
        assert line.endswith(fault)


def test_every_fault_of_a_kernel_is_named():
    assert len(built.judge(dataclasses.replace(GOOD, stack=8, shared=2**20, matrix=()))) == 3


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "arch", "programs"),
    [
        (128, 4, 0, 90, 4),  # 16 warps of 4096 registers
        (129, 4, 0, 90, 3),  # 136 a thread: 15 warps, of which 12 spread evenly over an SM's four parts
        (255, 8, 0, 90, 1),
        (255, 16, 0, 90, 0),  # cannot be launched at all
        (32, 1, 0, 90, 32),  # programs an SM
        (32, 8, 0, 90, 8),  # 2048 threads
        (32, 4, 75 * 1024, 90, 3),  # 76 KiB each with what an SM keeps, of 228
        (32, 4, 75 * 1024, 80, 2),  # of 164
        (32, 4, 75 * 1024 + 1, 90, 2),
        (32, 4, 227 * 1024, 90, 1),
        (32, 8, 0, 86, 6),  # 1536 threads
        (32, 1, 0, 86, 16),
        (32, 1, 0, 89, 24),
        (32, 4, 99 * 1024, 120, 1),
    ],
)
def test_programs_on_an_sm(registers, num_warps, shared, arch, programs):
    kernel = dataclasses.replace(GOOD, registers=registers, num_warps=num_warps, shared=shared, arch=arch)
    assert kernel.programs_per_sm == programs


def test_products_are_found_in_the_ir():
    ttir = """
      %a = tt.dot %q, %k, %z : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32> loc(#loc1)
      %b = tt.dot %q, %k, %z {x = 1 : i32} : tensor<2x16x64xf16> * tensor<2x64x8xf16> -> tensor<2x16x8xf32>
      %c = tt.dot %q, %k, %z, inputPrecision = tf32x3 : tensor<64x8xf32> * tensor<8x8xf32> -> tensor<64x8xf32>
      %d = tt.dot %q, %k, %z : tensor<16x64xf32> * tensor<64x8xf32> -> tensor<16x8xf32>
    """
    assert aot.find_dots(ttir) == (("bf16", 128), ("f16", 16), ("f32", 64))
    assert aot.find_dots("%s = arith.addf %a, %b : tensor<64xf32>") == ()
    with pytest.raises(AssertionError, match="in a way that we do not know"):
        aot.find_dots("%a = tt.dot %q, %k, %z : !tt.other")


def test_a_row_that_no_case_chooses_is_named(monkeypatch):
    monkeypatch.setattr(aot, "_load", lambda module: SimpleNamespace(LAUNCHES=TABLE))
    assert aot.uncovered(["some"], {("some", 0), ("some", 1)}) == []
    (line,) = aot.uncovered(["some"], {("some", 0), ("other", 1)})
    assert line.startswith("some: no case chooses row 1 of LAUNCHES: {'BLOCK': 128, 'num_warps': 8, ")


def test_rows_are_told_apart_by_identity_and_must_be_listed(monkeypatch):
    twin = Launch("wide", num_warps=8, BLOCK=128)
    module = SimpleNamespace(
        LAUNCHES=TABLE, aot_cases=lambda: iter([("a", lambda: [TABLE[1].options, twin.options])])
    )
    monkeypatch.setitem(sys.modules, "geo_r1.kernels.advantage.triton", module)
    assert aot.build_case("advantage", "a", [90]) == ({}, {1}, [twin.options])
    assert TABLE[1].options == {"BLOCK": 128, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


def test_the_chips_are_those_that_users_are_told():
    assert tuple(built.CHIPS) == launch.CHIPS


def test_rows_may_depend_on_the_chip():
    from geo_r1.kernels.attention.triton_forward import choose_row

    table = {(kind, most): kind for kind, most in [("long", 64), ("long", 128), ("long sm_12x", 128)]}
    q_THD = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 80, dtype=torch.bfloat16)
    assert launch.chip_of(q_THD[0]) == 0
    assert [choose_row(table, q, kind="long") for q in q_THD] == ["long", "long"]
    for arch, chosen in ((90, ["long", "long"]), (120, ["long", "long sm_12x"])):
        with aot.compile_only(arch):
            assert [choose_row(table, q, kind="long") for q in q_THD] == chosen


SHARED_PTX = """
import re
from geo_r1.kernels import aot
for family, case in [
    ("advantage", "none, members"),
    ("loss", "statistics, V 512 float32"),
    ("attention", "packed_attention short D=16 causal torch.bfloat16"),
]:
    texts = set()
    for arch in (80, 86, 89):
        with aot.compile_only(arch) as (kernels, _):
            dict(aot._load(family).aot_cases())[case]()
        ptx = "".join(kernel.asm["ptx"] for kernel, _ in kernels)
        ptx, changed = re.subn(rf"[.]target sm_{arch}", "", ptx)
        texts.add(ptx)
    print(family, changed, len(texts))
"""


def test_chips_that_share_their_ptx(tmp_path):
    """What the gate assembles for sm_86 and sm_89 is what Triton would write for them, but for the target."""
    fresh = compiling() | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }  # a cache may know the files of another checkout
    done = subprocess.run(
        [sys.executable, "-c", SHARED_PTX], capture_output=True, text=True, env=fresh, check=True
    )
    assert done.stdout.splitlines() == ["advantage 1 1", "loss 1 1", "attention 3 1"]


def test_modules_that_list_their_cases_badly_are_named(monkeypatch):
    modules = {
        "fine": SimpleNamespace(LAUNCHES=(), aot_cases=lambda: iter([("a", print), ("b", print)])),
        "twice": SimpleNamespace(LAUNCHES=(), aot_cases=lambda: iter([("a", print), ("a", print)])),
        "none": SimpleNamespace(LAUNCHES=(), aot_cases=lambda: iter(())),
        "bare": SimpleNamespace(),
    }
    monkeypatch.setattr(aot, "_load", modules.__getitem__)
    cases, faults = aot.list_cases(modules)
    assert cases == [("fine", "a"), ("fine", "b"), ("twice", "a")]
    assert faults == [
        "twice: case 'a' stands twice",
        "none: no case; aot_cases() must launch every kernel",
        "bare: no case; aot_cases() must launch every kernel",
        "bare: no LAUNCHES, the rows of its launch tables",
    ]


def test_the_table_is_aligned():
    head, line = built.table([GOOD]).splitlines()
    words = ["kernel", "case", "arch", "warps", "stages", "registers", "shared KiB", "programs/SM"]
    assert re.split(" {2,}", head) == [*words, "instructions", "matrix"]
    values = ["_some_kernel", "bfloat16", "sm_90", "8", "3", "128", "100.0", "2", "20.00", "wgmma"]
    assert line.split() == values
    assert len(head) == len(line)


def test_a_line_for_each_chip():
    spills = dataclasses.replace(
        GOOD, arch=120, stack=8, registers=255, shared=90 * 1024, matrix=("mma.sync",)
    )
    found = [
        re.split(" {2,}", line.strip()) for line in built.chip_table([GOOD, spills], [90, 120]).splitlines()
    ]
    names = ["chip", "GPUs", "kernels", "at fault", "spill", "registers", "shared KiB", "of", "programs/SM"]
    assert found == [
        [*names, "matrix"],
        ["sm_90", "H100, H200", "1", "0", "0", "128", "100.0", "227", "2", "wgmma"],
        ["sm_120", "RTX 50", "1", "1", "1", "255", "90.0", "99", "1", "mma.sync"],
    ]


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        ([], "1", "TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it"),
        (["rows"], "0", "no family 'rows'; families are advantage, attention, loss"),
        (["--jobs", "0"], "0", "--jobs: expected at least 1, got 0"),
        (["--json", "nowhere/aot.json"], "0", "--json: no folder nowhere"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, interpret, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as stopped:
        aot.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_module_is_built_for_several_chips_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "geo_r1.kernels.aot", "advantage", "--jobs", "1"]
    command += ["--arch", "90", "--arch", "86", "--arch", "120"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "aot.json")],
        capture_output=True,
        text=True,
        env=compiling(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "aot.json").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["aot.json"]
    assert written["faults"] == []
    assert {kernel["arch"] for kernel in written["kernels"]} == {86, 90, 120}
    for kernel in written["kernels"]:
        assert kernel["kernel"] == "_group_advantage_kernel"
        assert 16 <= kernel["registers"] <= 255 and kernel["programs_per_sm"] >= 1
    heading, *lines, last = done.stdout.splitlines()
    assert heading.startswith("chip ") and [line.split()[0] for line in lines] == ["sm_86", "sm_90", "sm_120"]
    assert last == f"{len(written['kernels'])} kernels, 0 faults"
