"""The benchmarks' own arithmetic and honesty, and the record and the tables that they end in."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import extension, gpu, measure, results, sanitizer
from benchmarks.bench_attention import IMAGES, AttentionSize, attention_case, forward_alone, windows
from benchmarks.bench_grpo_loss import loss_rows, row_statistics
from benchmarks.device import default_device
from benchmarks.lines import read_lines
from benchmarks.losses import LossSize
from benchmarks.measure import MAX_ROUNDS, MIN_ROUNDS, PHASES, Case, Provider
from benchmarks.plots import curves
from benchmarks.shapes import TINY
from benchmarks.stages import STAGES, Stage, pytest_stage
from benchmarks.steps import PhaseClock, StepSize, build_vlm
from benchmarks.targets import TARGETS, Finding, verdict
from csrc import nvcc
from geo_r1.kernels import available_impls

CPU = torch.device("cpu")


def repeat(function, setup, rounds):
    """Stands in for pytest-benchmark."""
    times = []
    for _ in range(rounds):
        setup()
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return times


def run_case(case, name, device=CPU):
    row = case.row(name)
    function = measure.check(case, name, row, device)
    if function is not None:
        measure.time_provider(case, name, row, function, repeat, device)
        measure.add_rates(case, row, matmul_tflops=100.0, copy_gbps=1000.0)
    return row


def run(provider, truth=None, **changes):
    return run_case(
        Case("sum", "3", torch.float32, 1e-3, {"p": provider}, truth, **{"rounds": 3} | changes), "p"
    )


def gives(*results):
    return lambda: lambda: tuple(torch.tensor(result) for result in results)


def ticks(monkeypatch):
    """Each look at the clock is 2 ms after the one before."""
    clock = itertools.count(0.0, 0.002)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))


def test_rates_and_shares(monkeypatch):
    ticks(monkeypatch)
    by_flops = run(Provider(gives(1.0)), flops=5e10, bytes=1e9)
    assert by_flops["ms"] == pytest.approx(2.0)
    assert by_flops["tflops"] == pytest.approx(25.0)
    assert by_flops["gbps"] == pytest.approx(500.0)
    assert by_flops["share"] == pytest.approx(0.25)  # of the matrix products' ceiling
    by_bytes = run(Provider(gives(1.0)), bytes=1e9)
    assert "tflops" not in by_bytes
    assert by_bytes["share"] == pytest.approx(0.5)  # of the copy's


def test_rounds_fit_the_time():
    assert measure.rounds_for(100.0, 1.0) == 10
    assert measure.rounds_for(10_000.0, 1.0) == MIN_ROUNDS
    assert measure.rounds_for(0.0, 1.0) == MAX_ROUNDS


@pytest.mark.parametrize("rounds", [None, 3])
def test_inputs_that_are_written_over_are_put_back_untimed(monkeypatch, rounds):
    ticks(monkeypatch)
    x = torch.zeros(1)

    def put_back():
        time.perf_counter()
        x.fill_(3.0)

    def square_in_place():
        x.square_()
        return ()

    provider = Provider(lambda: square_in_place, unpack=lambda _: (x,), prepare=put_back)
    found = run(provider, lambda: [torch.tensor([9.0]).double()], rounds=rounds)
    assert found["error"] == 0 and found["ms"] == pytest.approx(2.0)
    assert x == 9


def test_a_gpu_is_timed_by_events_behind_a_cold_cache_and_a_held_stream(monkeypatch):
    """A GPU that is not there: its stream is a list, and each entry takes a millisecond."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(stream)

        def synchronize(self):
            stream.append("wait")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start = measure.Moment()
    stream += ["work"] * 3
    assert measure.Moment() - start == pytest.approx(0.003)
    assert stream == ["work"] * 3 + ["wait"]


def test_errors_are_relative_by_norm():
    truth = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert measure.relative_errors([torch.tensor([3.0, 4.5])], truth) == [pytest.approx(0.1)]
    assert math.isnan(measure.relative_errors([torch.tensor([3.0, math.nan])], truth)[0])
    with pytest.raises(ValueError, match=r"a result is \[1\], the truth \[2\]"):
        measure.relative_errors([torch.tensor([3.0])], truth)


@pytest.mark.parametrize("result", [[3.0, 5.0], [math.nan, 4.0], [3.0, 4.0]])
def test_a_wrong_provider_is_not_timed(result):
    calls = []

    def function():
        calls.append(1)
        return (torch.tensor(result),)

    found = run(Provider(lambda: function), lambda: [torch.tensor([3.0, 4.0], dtype=torch.float64)])
    json.dumps(measure.for_json(found), allow_nan=False)
    if result == [3.0, 4.0]:
        assert (found["status"], found["error"], found["rounds"], len(calls)) == ("measured", 0, 3, 4)
    else:
        assert found["status"] == "wrong" and "is over 1e-03" in found["reason"]
        assert "ms" not in found and len(calls) == 1


def test_a_floor_is_timed_but_not_compared():
    def truth():
        raise AssertionError("nothing to compare")

    assert "ms" in run(Provider(gives([7.0]), kind="floor"), truth)


def test_memory_is_what_is_above_the_results():
    def function():
        scratch = torch.ones(2**20)  # 4 MiB
        return (scratch[:1].clone().expand(1), scratch.sum())

    peak = run(Provider(lambda: function))["peak_mib"]
    assert 3.9 < peak < 4.1
    x = torch.zeros(4)
    assert measure.bytes_of([x, x[:2]]) == 16


def test_a_provider_tells_more_once_it_was_timed():
    calls = []
    timed = Provider(lambda: lambda: (calls.append(1), ())[1], facts=lambda: {"calls": len(calls)})
    assert run(timed, facts={"tokens": 7.0})["facts"] == {"tokens": 7.0, "calls": 4}


def test_pairs_are_counted_once_a_shared_prompt():
    size = AttentionSize("", (3,), ((2, 1),), 1, 1, 8)
    assert size.pairs == 6 + (3 * 2 + 3) + (3 + 1)
    assert size.repeated_pairs == 15 + 10
    assert [(list(prompt), list(own)) for prompt, own in size.sequences] == [
        ([0, 1, 2], [3, 4]),
        ([0, 1, 2], [5]),
    ]


def test_windows_are_those_of_the_vision_tower():
    vision_utils = pytest.importorskip("transformers.vision_utils")
    grid = torch.tensor([(1, 2 * height, 2 * width) for height, width in IMAGES])
    _, boundaries = vision_utils.get_vision_window_index(grid, 2, 112, 14)
    assert list(windows(IMAGES)) == [n for n in boundaries.diff().tolist() if n]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets Triton's kernels
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_rows_are_compared_where_kernels_run(impl):
    if impl not in available_impls()["grpo_loss"]:
        pytest.skip(f"{impl} does not run here")
    size, logits_mib = LossSize(8, 16, 1003), 8 * 1003 * 4 / 2**20
    device = default_device()
    case = dataclasses.replace(loss_rows(size, torch.float32, [impl], device), rounds=2)
    found = {name: run_case(case, name, device) for name in case.providers}
    assert case.bytes == 2 * 8 * 1003 * 4 and case.flops == 0
    assert found.keys() == {f"geo_r1 {impl}, out of place", f"geo_r1 {impl}, in place", "copy of the logits"}
    for name, row in found.items():
        assert row["status"] == "measured"
        assert 0 <= row["peak_mib"] < logits_mib  # neither logits nor gradients are made anew
        errors = row.get("errors", [])
        assert len(errors) == (2 if name.startswith("geo_r1") else 0) and all(e < 1e-5 for e in errors)
    case = dataclasses.replace(row_statistics(size, torch.float32, [impl], device), rounds=2)
    found = {name: run_case(case, name, device) for name in case.providers}
    assert case.bytes == 8 * 1003 * 4
    assert found.keys() == {f"geo_r1 {impl}", "eager torch"}
    for row in found.values():
        assert row["status"] == "measured" and len(row["errors"]) == 2 and row["error"] < 1e-5


def test_attention_forward_alone_is_compared_and_counted_once():
    size, device = AttentionSize("small", (5, 3), ((3, 3), ()), 2, 1, 16), default_device()
    case = attention_case("attention", size, forward_alone, 1.0, device)
    assert case.flops == 4 * 2 * 16 * size.pairs
    found = run_case(dataclasses.replace(case, rounds=2), "geo_r1 reference", device)
    assert found["status"] == "measured" and len(found["errors"]) == 1 and found["error"] < 1e-2


def test_phases_share_the_time_of_the_last_steps(monkeypatch):
    clock = iter([0.0, 99.0, 10.0, 11.0, 13.0, 16.0, 20.0, 20.0, 22.0, 23.0, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = PhaseClock(CPU)
    phases.start()
    phases.end("vision")  # of a step before the last two
    for names in (("vision", "text", "loss", "backward"), ("text", "loss", "backward")):
        phases.start()
        for name in names:
            phases.end(name)
    assert phases.shares(2) == pytest.approx(
        {"vision": 1 / 20, "text": 4 / 20, "loss": 4 / 20, "backward": 11 / 20}
    )


@pytest.fixture
def train_step():
    pytest.importorskip("transformers")
    from benchmarks import bench_train_step

    return bench_train_step


def test_packed_and_padded_steps_agree_and_work_is_counted_once(train_step):
    images, completions = ((2, 4), (6, 3)), (3, 5, 2)
    shape = TINY
    for size in (
        StepSize("with images", shape, images, 4, completions),
        StepSize("without", shape, (), 9, completions),
    ):
        names = ("geo_r1 packed", "geo_r1 packed, no checkpoints", "transformers, padded")
        case = train_step.step_case("training step", size, names, 2, CPU, torch.float32)
        found = {name: run_case(case, name) for name in names}
        prompt, own = size.prompt_len, sum(completions)
        assert case.facts["tokens"] == 3 * prompt + own and case.facts["completions"] == 3
        assert case.facts["parameters"] == sum(
            p.numel() for p in build_vlm(shape, CPU, torch.float32).model.parameters()
        )
        layer = 128 * 32 * (2 * 4 + 2 * 2) + 3 * 128 * 384
        pairs = AttentionSize("", (prompt,), (completions,), 4, 2, 32).pairs
        flops = 4 * (2 * layer * (prompt + own) + 4 * 128 * pairs) + 2 * own * 128 * 512
        if size.images:
            patches, block = 4 * (8 + 18), 4 * 64**2 + 3 * 64 * 128
            flops += 2 * patches * (2 * block + 1176 * 64) + 2 * patches // 4 * (256**2 + 256 * 128)
            flops += 4 * 64 * ((4 * 8) ** 2 + (4 * 18) ** 2 + sum(n * n for n in windows(list(images))))
        assert case.flops == pytest.approx(3 * flops, rel=1e-12)
        for row in found.values():
            assert row["status"] == "measured"
            assert len(row["errors"]) == (4 if size.images else 3) and row["error"] < 1e-5
            shares = [row["facts"][phase] for phase in PHASES]
            assert sum(shares) == pytest.approx(1.0) and min(shares[1:]) > 0
            assert (shares[0] > 0) == bool(size.images)
        header, _, *lines = results.rate_table(list(found.values()))
        assert [line.count("|") for line in lines] == [header.count("|")] * 3
        assert lines[0].startswith(f"| {size.name} | {names[0]} |")


def test_the_scaling_goes_along_three_axes(train_step):
    sizes = train_step.scaling_sizes()
    assert len({str(size) for size in sizes}) == len(sizes)
    assert {len(size.completions) for size in sizes} == {1, 2, 4, 8, 16}
    assert {len(size.images) for size in sizes} == {0, 1, 2, 4, 6}
    assert {len(size.images) for size in sizes[:5]} == {6}
    assert len({sum(size.completions) / len(size.completions) for size in sizes[:9]}) == 1
    assert train_step.lengths(400) == (250, 300, 350, 400, 400, 450, 500, 550)


# What make gpu does, with stages that are a line of Python each.
def stage(name, code, seconds=20.0, needs=()):
    return Stage(name, ("-c", code, "{record}"), seconds, needs)


def line_writer(**line):
    return f"import sys; open(sys.argv[1], 'a').write({json.dumps(line)!r} + '\\n')"


FACTS = {
    "type": "cuda",
    "name": "NVIDIA H200",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "driver": "580",
    "extension": "90a",
}
CEILINGS = {"matmul_tflops": 800.0, "copy_gbps": 4300.0}
DEVICE = stage("device", line_writer(device=FACTS, ceilings=CEILINGS))
PASSED = line_writer(test="t", outcome="passed", measurement={"op": "sum", "ms": 1.0})
FAILED = line_writer(test="t", outcome="failed", reason="1 != 2")


def record_of(tmp_path, *stages, options=(), device=DEVICE):
    named = {stage.name: stage for stage in (device, *stages)}
    code = gpu.main(["--commit", "abc1234", "--out", str(tmp_path), *options], named)
    (path,) = tmp_path.iterdir()
    assert path.name == "nvidia-h200-abc1234.json"
    return code, json.loads(path.read_text())


def test_every_stage_ends_up_in_the_record(tmp_path):
    code, record = record_of(tmp_path, stage("one", PASSED), stage("two", "", needs=("no_such_package",)))
    assert code == 0
    assert record["ceilings"]["copy_gbps"] == 4300.0 and record["device"]["name"] == "NVIDIA H200"
    assert record["measurements"] == [{"op": "sum", "ms": 1.0}]
    assert record["parts"]["one"]["tests"] == {"passed": 1}
    assert record["parts"]["two"]["reason"] == "not installed: no_such_package"


def test_a_stage_can_run_alone_and_adds_to_the_record(tmp_path):
    again = line_writer(test="t", outcome="passed", measurement={"op": "sum", "ms": 2.0})
    other = stage("other", line_writer(test="u", outcome="passed", measurement={"op": "product"}))
    code, record = record_of(tmp_path, stage("one", PASSED), other, options=["--stages", "one"])
    assert code == 0 and record["parts"]["other"] == {"status": "not run"}
    assert record["device"] == FACTS and record["parts"]["device"]["status"] == "ok"
    broken = stage("device", "sys.exit(1)")  # it is not run again
    options = ["--stages", "one,other", "--limit", "30"]
    code, record = record_of(tmp_path, stage("one", again), other, options=options, device=broken)
    assert code == 0 and record["device"] == FACTS
    assert record["measurements"] == [{"op": "sum", "ms": 2.0}, {"op": "product"}]


def test_a_stage_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--stages", "tests,zest"]) == 2
    assert "there is no zest; the stages are device, build, tests, " in capsys.readouterr().err


def test_the_limit_is_shared_out(tmp_path):
    slow = stage("slow", "import time; time.sleep(60)", seconds=60.0)
    begin = time.monotonic()
    code, record = record_of(tmp_path, slow, options=["--limit", "4"])
    assert code == 1 and time.monotonic() - begin < 10
    assert record["parts"]["slow"]["status"] == "out of time"


def test_a_stage_says_itself_what_it_lacks(tmp_path):
    code, record = record_of(
        tmp_path, stage("lacking", line_writer(skipped="no nvcc")), stage("after", PASSED)
    )
    assert code == 0 and record["parts"]["after"]["status"] == "ok"
    found = record["parts"]["lacking"]
    assert (found["status"], found["reason"]) == ("skipped", "no nvcc") and "output" not in found
    assert "skipped" not in record["device"]


def built(archs):
    return {"device": {"extension": archs, "versions": {"nvcc": "13.0"}}}


def test_the_record_says_what_the_extension_is_built_for(tmp_path):
    lines = line_writer(**built("")) + "; " + line_writer(**built("90a"))
    code, record = record_of(tmp_path, stage("extension", lines))
    assert code == 0 and record["device"]["extension"] == "90a"
    assert record["device"]["versions"] == {"torch": "2.11.0", "triton": "3.6.0", "nvcc": "13.0"}


TOOLCHAIN = nvcc.Toolchain("nvcc", (13, 0), "release 13.0", ("90a",))


@pytest.fixture
def build_extension(tmp_path, monkeypatch):
    """Run the part on an H200 that is not there, over an extension that is left from before."""
    (tmp_path / "geo_r1").mkdir()
    place = tmp_path / "geo_r1" / nvcc.EXTENSION
    place.write_text("old")
    monkeypatch.setattr(nvcc, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("GEO_R1_CUDA_ARCHS", raising=False)

    def run(find_toolchain, build=None, device="cuda"):
        monkeypatch.setattr(nvcc, "find_toolchain", find_toolchain)
        monkeypatch.setattr(nvcc, "build", build)
        record = tmp_path / "record"
        return extension.main([str(record), "--device", device]), read_lines(record), place

    return run


def test_the_extension_is_built_for_the_gpu_at_hand(build_extension, tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    asked = []

    def find_toolchain(environ):
        asked.append(environ["GEO_R1_CUDA_ARCHS"])
        return TOOLCHAIN

    monkeypatch.setattr("geo_r1.kernels.extension.built", lambda: ("90a", "/x/_C.so"))
    monkeypatch.setattr("geo_r1.kernels.extension.why_not", lambda device: None)
    code, lines, place = build_extension(find_toolchain, lambda toolchain: tmp_path / "new")
    assert code == 0 and asked == ["90a"] and place.read_text() == "new"
    assert lines[-1] == built("90a")
    monkeypatch.setenv("GEO_R1_CUDA_ARCHS", "80;90a")
    monkeypatch.setattr("geo_r1.kernels.extension.why_not", lambda device: "does not load")
    code, _, _ = build_extension(find_toolchain, lambda toolchain: tmp_path / "new")
    assert code == 1 and asked == ["90a", "80;90a"]


def test_an_extension_that_cannot_be_built_leaves_no_older_one(build_extension, capsys):
    def fails(toolchain):
        raise nvcc.BuildError("nvcc fails")

    code, lines, place = build_extension(lambda environ: TOOLCHAIN, fails)
    assert code == 1 and lines == [built("")] and not place.exists()
    assert capsys.readouterr().err == "nvcc fails\n"


def test_without_nvcc_or_a_gpu_nothing_is_built(build_extension):
    def unavailable(environ):
        raise nvcc.UnavailableError("there is no nvcc")

    code, lines, place = build_extension(unavailable)
    assert code == 0 and lines == [{"skipped": "there is no nvcc"}] and place.read_text() == "old"
    code, lines, _ = build_extension(unavailable, device="cpu")
    assert code == 0 and lines[-1] == {"skipped": "no GPU to build for"}


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
    record = {"measurements": []}
    found = gpu.read_results(read_lines(tmp_path / "record"), record)
    assert found["tests"] == {outcome: 1, "passed": 1} and not record["measurements"]
    assert found.get("failures", {}) == ({"memcheck": reason} if code else {})
    assert found.get("skipped", {}) == ({} if code else {reason: 1})


def test_the_sanitizer_is_looked_for_where_cuda_is(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    for name in sanitizer.HOMES:
        monkeypatch.setenv(name, str(tmp_path))
        monkeypatch.setenv("PATH", "")
        assert sanitizer.find_program() == str(program)
        monkeypatch.delenv(name)
    record = tmp_path / "record"
    assert sanitizer.main([str(record), "--device", "cpu"]) == 0
    assert read_lines(record) == [{"skipped": "no GPU to run on"}]
    monkeypatch.setattr(sanitizer, "find_program", lambda: None)
    assert sanitizer.main([str(record)]) == 0
    assert read_lines(record)[1] == {"skipped": "no compute-sanitizer on PATH nor where CUDA is"}


@pytest.mark.parametrize("impl", ["cuda"])
def test_the_sanitizer_watches_every_kernel(impl, capsys):
    device = default_device()
    sanitizer.work(device.type)
    available = available_impls()
    watched = [op for op in ("group_advantage", "grpo_loss", "packed_attention") if impl in available[op]]
    assert capsys.readouterr().out.splitlines() == [f"{op} ran" for op in watched]


def test_a_stage_that_fails_is_recorded_with_its_output_and_the_rest_goes_on(tmp_path):
    failing = stage("tests", f"{FAILED}; print('the end'); sys.exit(1)")
    code, record = record_of(tmp_path, failing, stage("after", PASSED))
    found = record["parts"]["tests"]
    assert code == 1 and found["status"] == "failed"
    assert found["failures"] == {"t": "1 != 2"} and found["output"] == ["the end"]
    assert record["parts"]["after"]["status"] == "ok"


def test_a_stage_that_outlasts_its_time_keeps_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    stuck = stage("stuck", f"{deaf}; {PASSED}; time.sleep(60)", seconds=1.5)
    begin = time.monotonic()
    code, record = record_of(tmp_path, stuck, device=dataclasses.replace(DEVICE, seconds=0))
    assert code == 1 and time.monotonic() - begin < 10
    assert record["parts"]["stuck"]["status"] == "out of time"
    assert record["parts"]["stuck"]["tests"] == {"passed": 1} and len(record["measurements"]) == 1


SUITE = """
import os, pytest
def test_before(): pass
def test_dies(): os.abort()
def test_behind(): pass
def test_fails(): assert 1 == 2
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_test_that_kills_its_process_takes_no_other_with_it(tmp_path, processes):
    (tmp_path / "suite").mkdir()
    suite = tmp_path / "suite" / "test_suite.py"
    suite.write_text(SUITE)
    code, record = record_of(tmp_path / "out", pytest_stage("tests", 60.0, str(suite), processes=processes))
    found = record["parts"]["tests"]
    assert code == 1 and found["status"] == "failed"
    assert found["tests"] == {"passed": 2, "failed": 2}
    assert {name.split("::")[1]: reason for name, reason in found["failures"].items()} == {
        "test_dies": "did not end",
        "test_fails": "assert 1 == 2",
    }


BENCHMARK = """
import weakref
import pytest, torch
from benchmarks import conftest, measure
from benchmarks.measure import Case, Provider

LOST, HELD, MADE = [], [], []
measure.device_lost = conftest.device_lost = lambda: bool(LOST)

def raises():
    scratch = torch.ones(4)
    HELD.append(weakref.ref(scratch))
    raise torch.OutOfMemoryError("CUDA out of memory\\nand a long trace")

def lose():
    LOST.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def after():
    assert HELD[0]() is None  # its memory came back
    return lambda: (torch.ones(1),)

right = lambda: lambda: (torch.ones(1),)
wrong = lambda: lambda: (torch.zeros(1),)
PROVIDERS = {
    "good": Provider(right, "ours"),
    "missing": Provider(right, missing="liger_kernel is not installed"),
    "failing": Provider(lambda: raises),
    "after": Provider(after),
    "wrong peer": Provider(wrong),
    "wrong": Provider(wrong, "ours"),
    "losing": Provider(lambda: lose),
    "other": Provider(right),
}

def case(size, device):
    MADE.append(size)
    return Case("sum", str(size), torch.float32, 1e-3, PROVIDERS, lambda: [torch.ones(1).double()])

@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [1])
def test_sum(measure, size, provider):
    measure(case, size)
    assert MADE == [size]  # inputs and truth are made once for all providers
"""


def test_what_becomes_of_a_provider(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "suite").mkdir()
    suite = tmp_path / "suite" / "bench_suite.py"
    suite.write_text(BENCHMARK)
    code, record = record_of(
        tmp_path / "out", pytest_stage("tests", 60.0, "-p", "benchmarks.conftest", str(suite))
    )
    found = record["parts"]["tests"]
    assert code == 1 and found["tests"] == {"passed": 3, "skipped": 3, "failed": 2}, found
    assert set(found["skipped"]) == {
        "missing missing: liger_kernel is not installed",
        "failing failed: OutOfMemoryError: CUDA out of memory",
        "wrong peer wrong: error 1.0e+00 is over 1e-03",
    }
    losing, wrong = (found["failures"][name] for name in sorted(found["failures"]))
    assert losing.startswith("losing left the GPU unusable: RuntimeError: CUDA error: an illegal")
    assert wrong == "wrong wrong: error 1.0e+00 is over 1e-03"
    rows = {row["provider"]: row for row in record["measurements"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(("good", "after", "other"), "measured"),
        **dict.fromkeys(("failing", "losing"), "failed"),
        **dict.fromkeys(("wrong peer", "wrong"), "wrong"),
        "missing": "missing",
    }
    assert rows["losing"]["reason"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert rows["good"]["error"] == 0 and rows["good"]["rounds"] >= MIN_ROUNDS and "ms" not in rows["wrong"]


def test_a_record_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert gpu.main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write its record" in capsys.readouterr().err


def test_a_copy_within_another_repository_has_no_commit(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "copy")
    assert gpu.git_state() == ("unknown", None)


def test_the_record_is_whole_after_each_stage(tmp_path):
    """What the second stage sees is what a kill at that moment would leave."""
    path = tmp_path / "nvidia-h200-abc1234.json"
    seen = (
        f"import json; r = json.load(open({str(path)!r})); assert r['parts']['this']['status'] == 'not run'"
    )
    code, record = record_of(tmp_path, stage("this", seen))
    assert code == 0, record["parts"]


def test_no_gpu_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)], {"device": stage("device", "import sys; sys.exit(2)")}) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("geo_r1: make gpu needs a GPU")
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "lines"
    file.write_text('{"a": 1}\n{"b": ')
    assert read_lines(file) == [{"a": 1}]
    assert read_lines(tmp_path / "none") == []


def test_times_of_all_stages_fit_ten_minutes():
    assert (
        sum(stage.seconds for stage in STAGES.values()) <= 575
    )  # and the rest is for what lies between them


# docs/results.md.
def row(op, size, provider, kind, ms=None, **more):
    return (
        {"op": op, "size": size, "provider": provider, "kind": kind, "status": "measured"}
        | ({"ms": ms, "share": 0.5, "peak_mib": 1024.0, "error": 1e-3} if ms else {})
        | more
    )


LINEAR = ("linear_grpo_loss", "R=8192 C=3584 V=152064")
FORWARD = ("packed_attention forward", "causal 4 x 4096")
LOSS_ROWS = ("grpo_loss rows", "R=4096 V=152064")
STEP = ("training step", "Qwen2.5-VL-7B, 6 images, 8 completions")
ROWS = [
    row(*LINEAR, "geo_r1 triton", "ours", 11.5),
    row(*LINEAR, "geo_r1 reference", "ours", 20.0),
    row(*LINEAR, "geo_r1 cuda", "ours", 11.0),  # not the default, but the fastest
    row(*LINEAR, "bare products", "floor", 10.0),
    row(*LINEAR, "Liger fused-linear GRPO", "peer", status="missing", reason="liger_kernel is not installed"),
    row(*LOSS_ROWS, "geo_r1 triton, out of place", "ours", 1.2, share=0.8),
    row(*LOSS_ROWS, "geo_r1 triton, in place", "ours", 1.1, share=0.86),
    row(*LOSS_ROWS, "geo_r1 cuda, out of place", "ours", 1.0, share=0.9),
    row(*LOSS_ROWS, "geo_r1 cuda, in place", "ours", status="wrong", reason="error 1"),
    row(*FORWARD, "geo_r1 triton", "ours", 2.0),
    row(*FORWARD, "geo_r1 cuda", "ours", 1.0),
    row(*FORWARD, "flash-attn 3", "peer", 0.96),
    row("packed_attention", "causal 4 x 4096", "geo_r1 triton", "ours", 2.0),
    row("packed_attention", "causal 4 x 4096", "torch SDPA, cuDNN", "peer", 1.0),
    row(
        *("packed_attention", "shared prompt 4300 + 8 x 400", "geo_r1 triton", "ours", 1.0),
        facts={"operations_saved": 4.0},
    ),
    row("packed_attention", "shared prompt 4300 + 8 x 400", "torch flash varlen", "peer", 3.6),
    row("packed_attention", "shared prompt 4300 + 8 x 400", "flex_attention, compiled", "peer", 0.5),
    row("packed_attention", "vision windows", "geo_r1 triton", "ours", status="wrong", reason="error 1"),
    row("packed_attention", "vision whole images", "geo_r1 cuda", "ours", status="missing", reason="no nvcc"),
    row(
        *STEP,
        "geo_r1 packed",
        "ours",
        100.0,
        facts={"layers": 28, "tokens": 5000, "teraflop": 407.0},
        peak_mib=2048.0,
    ),
    row(*STEP, "transformers, padded", "peer", 500.0, peak_mib=4096.0),
]
SHARES = {"vision": 0.25, "text": 0.25, "loss": 0.125, "backward": 0.375}


def scaling_row(provider, kind, ms, completions, images, length):
    facts = {"completions": completions, "images": images, "length": length, "tokens": 1, **SHARES}
    return row(
        "training step, scaling", f"{completions}, {images}, {length}", provider, kind, ms, facts=facts
    )


SCALING_ROWS = [
    scaling_row(provider, kind, factor * (completions + images + length), completions, images, length)
    for provider, kind, factor in (("geo_r1 packed", "ours", 1.0), ("transformers, padded", "peer", 5.0))
    for completions, images, length in ((4, 6, 40.0), (1, 6, 40.0), (8, 6, 40.0), (8, 0, 40.0), (8, 6, 10.0))
]
CPU_STEP = ("training step", "100M, prompt 438, 8 completions of 40")
CPU_STEP_ROWS = [
    row(
        *CPU_STEP,
        provider,
        kind,
        ms,
        share=0.3,
        peak_mib=mib,
        facts={"tokens": 4000, "completions": 8, "teraflop": 0.345, **SHARES},
    )
    for provider, kind, ms, mib in (
        ("geo_r1 packed, no checkpoints", "ours", 4000.0, 1024.0),
        ("transformers, padded, no checkpoints", "peer", 12000.0, 5120.0),
    )
]
RECORD = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
    "dirty": False,
    "device": FACTS,
    "ceilings": CEILINGS,
    "parts": {
        "tests of the kernels": {"status": "ok", "tests": {"passed": 9, "skipped": 1}},
        "compute-sanitizer": {"status": "ok", "tests": {"passed": 2}},
        "world run": {"status": "skipped", "reason": "not installed: rich"},
    },
    "measurements": ROWS,
}


def make_results(tmp_path, *records, page=f"# top\n{results.BEGIN}\nold\n{results.END}\nend\n"):
    (tmp_path / "records").mkdir()
    for index, record in enumerate(records):
        (tmp_path / "records" / f"{index}.json").write_text(json.dumps(record))
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(page)
    code = results.main(["--records", str(tmp_path / "records"), "--page", str(path)])
    return code, path.read_text()


def test_without_records_nothing_is_measured(tmp_path):
    code, text = make_results(tmp_path)
    assert (
        code == 0
        and text.startswith(f"# top\n{results.BEGIN}\n| work |")
        and text.endswith(f"{results.END}\nend\n")
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(TARGETS) and all(line.endswith("| not measured | – |") for line in rows)
    assert "old" not in text


def test_targets_are_judged_from_the_newest_record_of_a_device(tmp_path):
    older = RECORD | {"date": "2025-01-01T00:00:00+00:00", "commit": "0ld", "measurements": []}
    code, text = make_results(tmp_path, RECORD, older)
    assert code == 0 and "0ld" not in text
    assert "**NVIDIA H200, commit abc1234.** 2026-01-02; driver 580; torch 2.11.0; triton 3.6.0; " in text
    assert "; CUDA kernels for 90a; " in text
    assert "geo_r1 cuda, in place (wrong: error 1)" in text  # what is not the fastest is not passed over
    assert "; tests of the kernels: 9 passed, 1 skipped; compute-sanitizer: 2 passed." in text
    assert "world run (skipped: not installed: rich)" in text
    line = {target.work: next(x for x in text.splitlines() if target.work in x) for target in TARGETS}
    ends = [x.split(" | ", 2)[2] for x in line.values()]
    assert ends == [
        "cuda: 1.10 × the bare products; 1.00 GiB; Liger: liger_kernel is not installed | not fully measured "
        "|",
        "not measured | – |",
        "triton, in place: 86.0%; cuda, out of place: 90.0% | yes |",
        "causal 4 x 4096, triton: 0.50 × as fast as torch SDPA, cuDNN | no |",
        "causal 4 x 4096, cuda: 0.96 × as fast as flash-attn 3 | yes |",
        "triton: 3.60 × as fast as torch flash varlen: 0.90 of the 4.00 × saved | yes |",
        "vision windows, triton: wrong (error 1); vision whole images, cuda: missing (no nvcc) | no |",
        "packed: 50,000 tokens/s, 5.00 × as fast as transformers, padded; MFU 50% (407 TFLOP); "
        "2.0 GiB against 4.0 above the weights | yes |",
        "not measured | – |",
        "not measured | – |",
    ]
    assert "| linear_grpo_loss | R=8192 C=3584 V=152064 | cuda | 11 | 50% | 1,024 | 1e-03 | none |  |" in text
    assert "![Times of every provider on NVIDIA H200, commit abc1234](results-nvidia-h200.png)" in text
    assert (tmp_path / "docs" / "results-nvidia-h200.png").stat().st_size > 10_000


def test_a_cpu_record_tells_rates_and_draws_how_a_step_scales(tmp_path):
    device = {"type": "cpu", "name": "cpu", "versions": {"torch": "2.13.0"}}
    rows = [*CPU_STEP_ROWS, *SCALING_ROWS]
    code, text = make_results(tmp_path, RECORD | {"device": device, "measurements": rows})
    assert code == 0
    assert (
        "| packed, no checkpoints: 1,000 tokens/s, 3.00 × as fast as transformers, padded, no checkpoints; "
        "MFU 30% (0.345 TFLOP); 1.0 GiB against 5.0 above the weights | yes |"
    ) in text
    assert (
        "| step | by | tokens/s | completions/s | MFU | peak MiB | vision | text | loss | backward |" in text
    )
    case = f"| {CPU_STEP[1]} | transformers, padded, no checkpoints "
    assert f"{case}| 333 | 0.667 | 30% | 5,120 | 25% | 25% | 12% | 38% |" in text
    assert "training step, scaling" not in text  # they are in a plot of their own
    assert "![Cost of a training step on cpu, commit abc1234](scaling-cpu.png)" in text
    assert (tmp_path / "docs" / "scaling-cpu.png").stat().st_size > 10_000


def test_a_curve_holds_all_but_one_number():
    found = curves([*ROWS, *SCALING_ROWS, row("training step, scaling", "x", "p", "peer")])
    assert {axis: by["geo_r1 packed"] for axis, by in found.items()} == {
        "completions": [(1, 47.0), (4, 50.0), (8, 54.0)],
        "images": [(0, 48.0), (6, 54.0)],
        "length": [(10.0, 24.0), (40.0, 54.0)],
    }
    assert found["images"]["transformers, padded"] == [(0, 240.0), (6, 270.0)]
    assert curves(ROWS) == {}


def test_a_verdict_needs_every_condition():
    yes, no, unknown = Finding("", True), Finding("", False), Finding("", None)
    assert verdict([yes, yes]) == "yes"
    assert verdict([yes, unknown, no]) == "no"
    assert verdict([yes, unknown]) == "not fully measured"
    assert verdict([unknown]) == "not measured"


@pytest.mark.parametrize("page", ["no markers", f"{results.END} {results.BEGIN}"])
def test_a_page_without_its_markers_is_left_alone(tmp_path, capsys, page):
    assert make_results(tmp_path, RECORD, page=page) == (2, page)
    assert "the page needs one <!-- results:begin -->" in capsys.readouterr().err


def test_a_file_that_is_no_record_is_named(tmp_path, capsys):
    assert make_results(tmp_path, {"date": "2026"})[0] == 2
    assert "0.json is not a record: KeyError('device')" in capsys.readouterr().err


# pytest benchmarks, as a user runs it.
def test_every_benchmark_is_collected_and_one_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks"]
    listed = subprocess.run([*command, "--collect-only"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    for path in (gpu.ROOT / "benchmarks").glob("bench_*.py"):
        assert f"benchmarks/{path.name}::" in listed.stdout
    lines, stored = tmp_path / "lines", tmp_path / "stored.json"
    options = ["-p", "benchmarks.recorder", "--record", str(lines), f"--benchmark-json={stored}"]
    test = "benchmarks/bench_group_advantage.py::test_group_advantage"
    tests = [f"{test}[G=8 M=8-{name}]" for name in ("geo_r1 reference", "copy of the rewards", "eager torch")]
    # pytest-benchmark takes a child of pytest-xdist's workers for one of them, and does not measure
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ran = subprocess.run(
        [*command[:-1], *tests, *options],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
        env=alone,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = read_lines(lines)
    found = {line["measurement"]["provider"]: line for line in written if "measurement" in line}
    assert found.keys() == {"geo_r1 reference", "copy of the rewards", "eager torch"}
    assert found["geo_r1 reference"]["measurement"]["error"] < 1e-5
    assert "error" not in found["copy of the rewards"]["measurement"]
    kept = {b["params"]["provider"]: b for b in json.loads(stored.read_text())["benchmarks"]}
    for provider, entry in kept.items():  # pytest-benchmark tells what was measured, not what replaying took
        assert entry["stats"]["median"] * 1e3 == pytest.approx(found[provider]["measurement"]["ms"], rel=1e-4)
        assert entry["group"] == "group_advantage G=8 M=8"
    assert kept.keys() == found.keys()
