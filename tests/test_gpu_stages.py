"""Stages of make gpu, on a GPU and with tools that are not there: build, compute-sanitizer, sweep, checks."""

import pytest
import torch

from benchmarks import check_ops, extension, records, sanitizer, sweep
from benchmarks.device import default_device
from benchmarks.lines import read_lines
from csrc import nvcc
from geo_r1.kernels import available_impls
from geo_r1.kernels.launch import Launch


def built(archs):
    return {"device": {"extension": archs, "versions": {"nvcc": "13.0"}}}


TOOLCHAIN = nvcc.Toolchain("nvcc", (13, 0), "release 13.0", ("90a",))


@pytest.mark.parametrize(
    ("device", "archs", "failure", "code", "line", "left"),
    [
        ("cuda", None, None, 0, built("90a"), "new"),
        ("cuda", "80;90a", "does not load", 1, built("90a"), "new"),
        ("cuda", None, nvcc.BuildError("nvcc fails"), 1, built(""), None),  # and leaves no older one
        ("cuda", None, nvcc.UnavailableError("there is no nvcc"), 0, {"skipped": "there is no nvcc"}, "old"),
        ("cpu", None, None, 0, {"skipped": "no GPU to build for"}, "old"),
    ],
)
def test_the_extension_is_built_for_the_gpu_at_hand(
    tmp_path, monkeypatch, capsys, device, archs, failure, code, line, left
):
    """On an H200 that is not there, over an extension that is left from before."""
    (tmp_path / "geo_r1").mkdir()
    place, asked = tmp_path / "geo_r1" / nvcc.EXTENSION, []
    place.write_text("old")
    (tmp_path / "new").write_text("new")

    def find_toolchain(environ):
        asked.append(environ["GEO_R1_CUDA_ARCHS"])
        if isinstance(failure, nvcc.UnavailableError):
            raise failure
        return TOOLCHAIN

    def build(toolchain):
        if isinstance(failure, nvcc.BuildError):
            raise failure
        return tmp_path / "new"

    for name, value in {"ROOT": tmp_path, "find_toolchain": find_toolchain, "build": build}.items():
        monkeypatch.setattr(nvcc, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("geo_r1.kernels.extension.built", lambda: ("90a", "/x/_C.so"))
    monkeypatch.setattr("geo_r1.kernels.extension.why_not", lambda device: failure)
    monkeypatch.delenv("GEO_R1_CUDA_ARCHS", raising=False)
    if archs:
        monkeypatch.setenv("GEO_R1_CUDA_ARCHS", archs)
    record = tmp_path / "record"
    assert extension.main([str(record), "--device", device]) == code
    assert read_lines(record)[-1] == line and asked == ([archs or "90a"] if device == "cuda" else [])
    assert (place.read_text() if place.exists() else None) == left
    assert capsys.readouterr().err == (f"{failure}\n" if code else "")


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$@"
test $2 = racecheck && exit 0
echo "========= {finding}"
exit 1
"""


@pytest.mark.parametrize(
    ("finding", "outcome", "reason", "code"),
    [
        ("Invalid __global__ read of size 4 bytes", "failed", "Invalid __global__ read of size 4 bytes", 1),
        ("Error: Device not supported", "skipped", "compute-sanitizer: Device not supported", 0),
    ],
)
def test_what_the_sanitizer_finds_is_recorded(tmp_path, capsys, finding, outcome, reason, code):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(finding=finding))
    program.chmod(0o755)
    assert sanitizer.watch(str(program), tmp_path / "record") == code
    said = capsys.readouterr().out
    assert "--tool memcheck --kernel-name kns=geo_r1" in said and "work('cuda')" in said
    record = {"measurements": [], "launches": []}
    found = records.read_results(read_lines(tmp_path / "record"), record)
    assert found["tests"] == {outcome: 1, "passed": 1} and not record["measurements"]
    assert found.get("failures", {}) == ({"memcheck": reason} if code else {})
    assert found.get("skipped", {}) == ({} if code else {reason: 1})


def test_the_sanitizer_is_looked_for_where_cuda_is(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    for name in sanitizer.HOMES:
        monkeypatch.setenv(name, str(tmp_path))
        assert sanitizer.find_program() == str(program)
        monkeypatch.delenv(name)
    monkeypatch.setattr(sanitizer, "find_program", lambda: None)
    record = tmp_path / "record"
    assert sanitizer.main([str(record), "--device", "cpu"]) == sanitizer.main([str(record)]) == 0
    reasons = ["no GPU to run on", "no compute-sanitizer on PATH nor where CUDA is"]
    assert read_lines(record) == [{"skipped": reason} for reason in reasons]


@pytest.mark.parametrize("impl", ["cuda"])
def test_the_sanitizer_watches_every_kernel(impl, capsys):
    device = default_device()
    sanitizer.work(device.type)
    available = available_impls()
    watched = [op for op in ("group_advantage", "grpo_loss", "packed_attention") if impl in available[op]]
    assert capsys.readouterr().out.splitlines() == [f"{op} ran" for op in watched]


def test_a_sweep_tries_the_neighbours_of_a_row(monkeypatch):
    row = Launch("why", num_warps=16, num_stages=2, BM=16, BN=64, SPLIT=1)
    monkeypatch.setattr(sweep, "ON_GPU", True)
    assert sweep.neighbours(row) == [
        *({}, {"BM": 32}, {"BN": 32}, {"BN": 128}),  # blocks of 8, or 32 warps, do not fit
        *({"SPLIT": 0}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3}),
    ]
    with row.replaced(BM=32, num_stages=3):
        blocks = {"BM": 32, "BN": 64, "SPLIT": 1}
        assert row.options == {**blocks, "num_warps": 16, "num_stages": 3, "enable_fp_fusion": True}
        assert row.blocks == {"BM": 32, "BN": 64, "SPLIT": 1}
    assert row.options["BM"] == row.blocks["BM"] == 16 and row.options["num_stages"] == 2


def test_a_trial_that_fails_or_is_wrong_has_no_time(monkeypatch):
    row = Launch("why", num_warps=4, BM=64)

    def work():
        if row.options["BM"] == 128:
            raise RuntimeError("out of resource: shared memory")
        return [torch.tensor([row.options["BM"] // row.options["num_warps"] * 1.0])]

    monkeypatch.setattr(sweep, "rows", lambda: {"ROWS[1]": row})
    monkeypatch.setattr(sweep, "work_of", lambda name: work)
    with sweep.noting() as launched:
        expected = [x.double() for x in work()]
    assert launched and all(launch is row for launch in launched)
    own, same, wrong, failing = (
        sweep.try_out(("work", "ROWS[1]", options), expected)
        for options in ({}, {"BM": 32, "num_warps": 2}, {"BM": 32}, {"BM": 128})
    )
    assert own["outcome"] == same["outcome"] == "passed" and own["trial"]["own"] and "ms" in same["trial"]
    assert same["trial"]["launch"] == "BM=32, num_warps=2, num_stages=1"
    assert wrong["reason"] == "error 5.0e-01" and "ms" not in wrong["trial"]
    assert failing["reason"] == "RuntimeError: out of resource: shared memory"
    assert {wrong["outcome"], failing["outcome"]} == {"skipped"}


def test_every_op_and_implementation_is_compared_with_float64():
    assert {op for op, _ in check_ops.CHECKS} == available_impls().keys()
    for op, impls in available_impls().items():
        assert set(check_ops.names(op)) >= {impl for impl in impls if impl != "reference"}
