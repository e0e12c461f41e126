"""The ahead-of-time gate: what it finds wrong, what it counts, and one module built for real."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from geo_r1.kernels import aot
from geo_r1.kernels.launch import Launch

GOOD = aot.Built(
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
    matrix=("HGMMA",),
)
TABLE = (Launch("narrow", num_warps=4, BLOCK=64), Launch("wide", num_warps=8, BLOCK=128))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "spills: 8 bytes of stack, 0 local loads and stores"),
        ({"spills": 3}, "spills: 0 bytes of stack, 3 local loads and stores"),
        ({"shared": 232448}, None),
        ({"shared": 232449}, "232449 bytes of shared memory, over the 232448 there are"),
        ({"arch": 80, "matrix": ("HMMA",), "shared": 166912}, None),
        ({"arch": 80, "matrix": ("HMMA",), "shared": 166913}, "over the 166912 there are"),
        ({"matrix": ("HMMA",)}, "no HGMMA, found HMMA"),
        ({"matrix": ()}, "no HGMMA, found no matrix instruction"),
        ({"matrix": ("HGMMA", "HMMA")}, None),
        # Too small for HGMMA, or of a type that may lack the layout: any matrix instruction will do.
        ({"matrix": ("HMMA",), "num_warps": 2}, None),
        ({"matrix": ("HMMA",), "dots": (("bf16", 32),)}, None),
        ({"matrix": ("HMMA",), "dots": (("f32", 128),)}, None),
        ({"matrix": ("HMMA",), "dots": (("bf16", 16), ("f16", 64))}, "no HGMMA, found HMMA"),
        ({"matrix": (), "dots": (("bf16", 32),)}, "tl.dot without a matrix instruction"),
        ({"matrix": (), "arch": 80}, "tl.dot without a matrix instruction"),
        ({"matrix": (), "dots": ()}, None),
    ],
)
def test_faults_are_found_and_named(change, fault):
    found = aot.judge(dataclasses.replace(GOOD, **change))
    if fault is None:
        assert found == []
    else:
        (line,) = found
        chip = change.get("arch", 90)
        assert line.startswith(f"some, case 'bfloat16', sm_{chip}, _some_kernel: ")
        assert line.endswith(fault)


def test_every_fault_of_a_kernel_is_named():
    assert len(aot.judge(dataclasses.replace(GOOD, stack=8, shared=2**20, matrix=()))) == 3


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
    ],
)
def test_programs_on_an_sm(registers, num_warps, shared, arch, programs):
    built = dataclasses.replace(GOOD, registers=registers, num_warps=num_warps, shared=shared, arch=arch)
    assert built.programs_per_sm == programs


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
    assert aot.uncovered(["some"], 90, {("some", 0), ("some", 1)}) == []
    assert aot.uncovered(["some"], 90, {("some", 0), ("other", 1)}) == [
        "some: no case chooses row 1 of LAUNCHES on sm_90: {'BLOCK': 128, 'num_warps': 8, 'num_stages': 1}"
    ]


def test_rows_are_told_apart_by_identity_and_must_be_listed(monkeypatch):
    twin = Launch("wide", num_warps=8, BLOCK=128)
    module = SimpleNamespace(
        LAUNCHES=TABLE, aot_cases=lambda: iter([("a", lambda: [TABLE[1].options, twin.options])])
    )
    monkeypatch.setitem(sys.modules, "geo_r1.kernels.advantage.triton", module)
    assert aot.build_case("advantage", "a", 90) == ({}, {1}, [twin.options])
    assert TABLE[1].options == {"BLOCK": 128, "num_warps": 8, "num_stages": 1}


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
    head, line = aot.table([GOOD]).splitlines()
    words = ["kernel", "case", "arch", "warps", "stages", "registers", "shared KiB", "programs/SM", "matrix"]
    assert re.split(" {2,}", head) == words
    assert line.split() == ["_some_kernel", "bfloat16", "sm_90", "8", "3", "128", "100.0", "2", "HGMMA"]
    assert len(head) == len(line)


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


def test_a_module_is_built_for_both_chips_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "geo_r1.kernels.aot", "advantage", "--jobs", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "aot.json")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "aot.json").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["aot.json"]
    assert written["faults"] == []
    assert {kernel["arch"] for kernel in written["kernels"]} == {80, 90}
    for kernel in written["kernels"]:
        assert kernel["kernel"] == "_group_advantage_kernel"
        assert 16 <= kernel["registers"] <= 255 and kernel["programs_per_sm"] >= 1
    *lines, last = done.stdout.splitlines()
    assert (
        last == f"{len(written['kernels'])} kernels, 0 faults" and len(lines) == len(written["kernels"]) + 1
    )
