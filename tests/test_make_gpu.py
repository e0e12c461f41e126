"""What make gpu does and records, with stages that are a line of Python each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, records, results
from benchmarks.lines import read_lines, settled, write_line
from benchmarks.measure import MIN_ROUNDS
from benchmarks.stages import SETS, STAGES, Stage, pytest_stage


def stage(name, code, seconds=20.0, needs=(), **options):
    return Stage(name, ("-c", code, "$record"), seconds, needs, **options)


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
DEVICE = stage("device", line_writer(device=FACTS, ceilings=CEILINGS), seconds=5.0, always=True)
PASSED = line_writer(test="t", outcome="passed", measurement={"op": "sum", "ms": 1.0})
FAILED = line_writer(test="t", outcome="failed", reason="1 != 2")
NAME = "nvidia-h200-abc1234.json"


def record_of(tmp_path, *stages, options=(), device=DEVICE):
    named = {stage.name: stage for stage in (device, *stages)}
    code = gpu.main(["--commit", "abc1234", "--out", str(tmp_path), *options], named, {})
    (path,) = tmp_path.glob("*.json")
    assert path.name == NAME
    return code, json.loads(path.read_text())


def test_every_stage_ends_up_in_the_record(tmp_path):
    code, record = record_of(tmp_path, stage("one", PASSED), stage("two", "", needs=("no_such_package",)))
    assert code == 0
    assert record["ceilings"]["copy_gbps"] == 4300.0 and record["device"]["name"] == "NVIDIA H200"
    assert record["measurements"] == [{"op": "sum", "ms": 1.0}] and not record["rehearsal"]
    assert record["parts"]["one"]["tests"] == {"passed": 1}
    assert record["parts"]["two"]["reason"] == "not installed: no_such_package"


def test_calls_add_up_to_one_record(tmp_path, capsys):
    more = line_writer(test="u", outcome="passed", measurement={"op": "product"})
    one, other = stage("one", PASSED), stage("other", more)
    code, record = record_of(tmp_path, one, other, options=["--stages", "one"])
    assert code == 0 and record["parts"]["other"] == {"status": "not run"}
    assert record["device"] == FACTS and record["parts"]["device"]["status"] == "ok"
    code, record = record_of(tmp_path, one, other)
    assert code == 0 and "one: done before" in capsys.readouterr().out
    assert record["measurements"] == [{"op": "sum", "ms": 1.0}, {"op": "product"}]
    _, record = record_of(tmp_path, one, other, options=["--again"])
    assert len(record["measurements"]) == 2 and "one: done before" not in capsys.readouterr().out


def test_a_stage_is_missing_again_once_its_sources_change(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    source, runs = tmp_path / "source.py", tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x'); "
    source.write_text("a")
    one, other = (
        stage(name, count + PASSED, sources=files) for name, files in (("one", ("source.py",)), ("two", ()))
    )
    for text, seen in (("a", "xx"), ("a", "xx"), ("b", "xxx")):
        source.write_text(text)
        record_of(tmp_path / "out", one, other)
        assert runs.read_text() == seen


def test_a_stage_that_does_not_fit_is_named_and_left_for_the_next_call(tmp_path, capsys):
    long, short = stage("long", PASSED, seconds=500.0), stage("short", PASSED)
    code, record = record_of(tmp_path, long, short, options=["--deadline", "60"])
    assert code == gpu.LEFT_OUT and record["parts"]["short"]["status"] == "ok"
    part = record["parts"]["long"]
    assert part["status"] == "not run" and part["reason"].startswith("needs about 500 s, and 5")
    assert f"long: not run, {part['reason']}" in capsys.readouterr().out
    code, record = record_of(tmp_path, long, short, options=["--deadline", "600"])
    assert code == 0 and record["parts"]["long"]["status"] == "ok"


KILLED = """
import os, pathlib, signal
mark = pathlib.Path(__file__).with_name("mark")
def test_before(): mark.open("a").write("b")
def test_kills_the_call():
    if mark.read_text() == "b":
        mark.write_text("bk")
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
def test_after(): mark.open("a").write("a")
"""


def test_a_killed_call_loses_nothing(tmp_path):
    """SIGKILL, in the middle of a test: its stage ends with it, and the next call goes on at that test."""
    suite, out = tmp_path / "test_suite.py", tmp_path / "out"
    suite.write_text(KILLED)
    call = (
        "from tests.test_make_gpu import *; from pathlib import Path; "
        f"record_of(Path({str(out)!r}), stage('one', PASSED), pytest_stage('tests', 100.0, {str(suite)!r}))"
    )
    path = os.pathsep.join([str(records.ROOT), str(records.ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=records.ROOT, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    record = json.loads((out / NAME).read_text())
    assert record["parts"]["one"]["tests"] == {"passed": 1}
    (lines,) = (out / "lines" / "nvidia-h200").glob("tests-*.0.jsonl")
    assert [line["test"].split("::")[1] for line in read_lines(lines) if "test" in line] == ["test_before"]
    code, record = record_of(out, stage("one", PASSED), pytest_stage("tests", 100.0, str(suite)))
    assert code == 0 and record["parts"]["tests"]["tests"] == {"passed": 3}
    assert (tmp_path / "mark").read_text() == "bka"  # the first test ran once


def test_a_test_that_no_try_ends_is_given_up():
    lines = [{"begun": "t"}, {"begun": "t"}, {"begun": "u"}]
    assert settled(lines) == {"t"}
    found = records.read_results(lines, {"measurements": [], "launches": []})
    assert found["failures"] == {"t": "did not end"}


def test_two_calls_do_not_share_a_folder(tmp_path):
    other = f"from benchmarks import gpu; raise SystemExit(gpu.main(['--out', {str(tmp_path)!r}]))"
    (tmp_path / "lines").mkdir()
    with gpu.only_call(tmp_path / "lines"):
        done = subprocess.run([sys.executable, "-c", other], cwd=records.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "another make gpu is at work" in done.stderr


def test_a_rehearsal_says_so_and_is_no_result(tmp_path, capsys):
    facts = line_writer(device=FACTS | {"type": "cpu", "name": "cpu"}, ceilings=CEILINGS)
    stages = {
        "device": stage("device", facts, always=True),
        "one": stage("one", PASSED, rehearsal=("small",)),
    }
    options = ["--commit", "abc1234", "--out", str(tmp_path), "--device", "cpu"]
    assert gpu.main(options, stages, {}) == 0
    record = json.loads((tmp_path / "cpu-rehearsal-abc1234.json").read_text())
    assert record["rehearsal"] and "none of its figures is a GPU's" in capsys.readouterr().out
    assert results.newest_records(tmp_path) == []
    assert gpu.main([*options, "--full"], stages, {}) == 0  # a CPU's own sizes, whose lines are others
    assert [record["rehearsal"] for record in results.newest_records(tmp_path)] == [False]


def test_the_fastest_launch_with_right_results_is_named():
    def trial(launch, own=False, **result):
        return {"row": "loss ROWS[1]", "launch": launch, "own": own, **result}

    trials = [trial("B=2", True, ms=2.0), trial("B=4", ms=1.5), trial("B=8", reason="error 1.0e+00")]
    (row,) = records.best_launches(trials)
    assert (row["ms"], row["best"], row["best_ms"]) == (2.0, "B=4", 1.5)
    assert row["tried"] == {"B=2": 2.0, "B=4": 1.5, "B=8": "error 1.0e+00"}
    assert records.best_launches(trials[1:]) == []  # without the row's own time nothing is faster


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


def test_a_stage_that_outlasts_its_time_keeps_what_it_wrote(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    stuck = stage("stuck", f"{deaf}; {PASSED}; time.sleep(60)", seconds=1.5)
    begin = time.monotonic()
    code, record = record_of(
        tmp_path, stuck, stage("after", PASSED, seconds=4.0), options=["--deadline", "9"]
    )
    assert code == gpu.LEFT_OUT and time.monotonic() - begin < 10
    assert record["parts"]["stuck"]["status"] == "out of time" and record["parts"]["after"]["status"] == "ok"
    assert record["parts"]["stuck"]["tests"] == {"passed": 1} and len(record["measurements"]) == 1


SUITE = """
import os, pytest
def test_before(): pass
def test_dies(): os.abort()
def test_behind(): pass
def test_fails(): assert 1 == 2
"""


def test_a_test_that_kills_its_process_takes_no_other_with_it(tmp_path):
    (tmp_path / "suite").mkdir()
    suite = tmp_path / "suite" / "test_suite.py"
    suite.write_text(SUITE)
    code, record = record_of(tmp_path / "out", pytest_stage("tests", 240.0, str(suite), processes=2))
    found = record["parts"]["tests"]
    assert code == 1 and found["status"] == "failed"
    assert found["tests"] == {"passed": 2, "failed": 2}
    assert {name.split("::")[1]: reason for name, reason in found["failures"].items()} == {
        "test_dies": "its process died of SIGABRT",
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
        (
            ["--stages", "tests,zest"],
            "there is no zest; sets and stages are one, two, three, device, build, ",
        ),
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
    monkeypatch.setattr(records, "ROOT", tmp_path / "copy")
    assert records.git_state() == ("unknown", None)


def test_the_record_is_whole_after_each_stage(tmp_path):
    """What the second stage sees is what a kill at that moment would leave."""
    path = tmp_path / "nvidia-h200-abc1234.json"
    seen = (
        f"import json; r = json.load(open({str(path)!r})); assert r['parts']['this']['status'] == 'not run'"
    )
    code, record = record_of(tmp_path, stage("this", seen))
    assert code == 0, record["parts"]


def test_no_gpu_is_one_line_and_exit_code_2(tmp_path, capsys):
    none = {"device": stage("device", "import sys; sys.exit(2)", always=True)}
    assert gpu.main(["--out", str(tmp_path)], none, {}) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("geo_r1: make gpu needs a GPU")
    assert not list(tmp_path.glob("*.json"))


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "lines"
    file.write_text('{"a": 1}\n{"b": ')
    assert read_lines(file) == [{"a": 1}]
    write_line(file, c=3)
    assert read_lines(file) == [{"a": 1}, {"c": 3}]
    assert read_lines(tmp_path / "none") == []


def test_each_set_fits_a_call_and_no_stage_is_in_none():
    for names in SETS.values():
        assert sum(STAGES[name].seconds for name in names) <= gpu.DEADLINE_SECONDS - gpu.MARGIN_SECONDS
    assert {name for names in SETS.values() for name in names} == STAGES.keys()
