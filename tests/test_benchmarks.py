"""The benchmarks' own arithmetic and honesty: what is compared, counted and timed."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import measure, results
from benchmarks.bench_attention import IMAGES, AttentionSize, attention_case, forward_alone, windows
from benchmarks.bench_grpo_loss import loss_rows, row_statistics
from benchmarks.device import default_device
from benchmarks.lines import read_lines
from benchmarks.losses import LossSize
from benchmarks.measure import MAX_ROUNDS, MIN_ROUNDS, PHASES, Case, Provider
from benchmarks.records import ROOT
from benchmarks.shapes import TINY
from benchmarks.steps import PhaseClock, StepSize, build_vlm
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
    measure.measure_provider(case, name, row, repeat, device, {"matmul_tflops": 100.0, "copy_gbps": 1000.0})
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


def test_a_gpus_timer_waits_for_its_events(monkeypatch):
    """A GPU that is not there: its stream is a list, each of whose entries takes a millisecond."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            self.synchronize = lambda: stream.append("wait")

        def record(self):
            self.at = len(stream)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start = measure.Moment()
    stream += ["work"] * 3
    assert measure.Moment() - start == pytest.approx(0.003)
    assert stream[3:] == ["wait"]


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


def test_packed_and_padded_steps_agree_and_work_is_counted_once():
    train_step = pytest.importorskip("benchmarks.bench_train_step")
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


def test_the_scaling_goes_along_three_axes():
    train_step = pytest.importorskip("benchmarks.bench_train_step")
    sizes = train_step.scaling_sizes()
    assert len({str(size) for size in sizes}) == len(sizes)
    assert {len(size.completions) for size in sizes} == {1, 2, 4, 8, 16}
    assert {len(size.images) for size in sizes} == {0, 1, 2, 4, 6}
    assert {len(size.images) for size in sizes[:5]} == {6}
    assert len({sum(size.completions) / len(size.completions) for size in sizes[:9]}) == 1
    assert train_step.lengths(400) == (250, 300, 350, 400, 400, 450, 500, 550)


def test_every_benchmark_is_collected_and_one_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    # pytest-benchmark takes a child of pytest-xdist's workers for one of them, and does not measure
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def run_pytest(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    listed = run_pytest("benchmarks", "--collect-only")
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert f"benchmarks/{path.name}::" in listed
    lines, stored = tmp_path / "lines", tmp_path / "stored.json"
    test = "benchmarks/bench_group_advantage.py::test_group_advantage"
    names = {"geo_r1 reference", "copy of the rewards", "eager torch"}
    options = ["-p", "benchmarks.recorder", "--record", str(lines), f"--benchmark-json={stored}"]
    said = run_pytest(*(f"{test}[G=8 M=8-{name}]" for name in sorted(names)), *options)
    assert "group_advantage, G=8 M=8: geo_r1 reference" in said  # share, memory and error
    found = {row["provider"]: row for line in read_lines(lines) if (row := line.get("measurement"))}
    kept = {b["params"]["provider"]: b for b in json.loads(stored.read_text())["benchmarks"]}
    assert found.keys() == kept.keys() == names
    assert found["geo_r1 reference"]["error"] < 1e-5 and "error" not in found["copy of the rewards"]
    for provider, entry in kept.items():
        assert entry["stats"]["median"] * 1e3 == pytest.approx(found[provider]["ms"], rel=1e-4)
        assert entry["group"] == "group_advantage G=8 M=8" and entry["extra_info"] == found[provider]
