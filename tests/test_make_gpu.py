"""What make gpu does and records, with stages that are a line of Python each."""

import dataclasses
import json
import shutil
import subprocess
import time

import pytest

from benchmarks import gpu
from benchmarks.lines import read_lines
from benchmarks.measure import MIN_ROUNDS
from benchmarks.stages import STAGES, Stage, pytest_stage


def stage(name, code, seconds=20.0, needs=()):
    return Stage(name, ("-c", code, "$record"), seconds, needs)


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
    options = ["--stages", "one,other", "--limit", "60"]
    code, record = record_of(tmp_path, stage("one", again), other, options=options)
    assert code == 0 and record["device"] == FACTS
    assert record["measurements"] == [{"op": "sum", "ms": 2.0}, {"op": "product"}]
    code, record = record_of(tmp_path, stage("one", PASSED), other)  # a whole run begins a new record
    assert len(record["measurements"]) == 2 and record["measurements"][0]["ms"] == 1.0


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
    code, record = record_of(tmp_path / "out", pytest_stage("tests", 240.0, str(suite), processes=processes))
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
        tmp_path / "out", pytest_stage("tests", 240.0, "-p", "benchmarks.conftest", str(suite))
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages", "tests,zest"], "there is no zest; the stages are device, build, tests, "),
        (["--out", __file__], "make gpu cannot write its record: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, options, said):
    assert gpu.main(["--out", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


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
