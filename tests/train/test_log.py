"""The log: what it prints, what a run goes on without, what services get, and a damaged metrics.jsonl."""

import errno
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import small_runs as runs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import geo_r1.train.report.log as log_module
import geo_r1.train.run
from geo_r1.data import Sample
from geo_r1.errors import LONGEST, UserError, one_line
from geo_r1.rollout import Completion
from geo_r1.train.recipe.run_sections import LogConfig
from geo_r1.train.report.about import About, read_about
from geo_r1.train.report.log import Log
from geo_r1.train.report.metrics import read_metrics
from geo_r1.train.report.transcripts import Transcript

RESULT = {"accuracy": 0.5, "well_formed": 1.0, "completion_length": 7.0}
FULL = OSError(errno.ENOSPC, "No space left on device")


def log_of(folder, **config):
    return Log(folder, LogConfig(**{"tensorboard": False} | config), True, {"run": {"seed": 3}})


def transcript():
    images = tuple(Image.new("RGB", (10 + i, 20), (50 * i, 90, 20)) for i in range(3))
    message = {"role": "user", "content": [*[{"type": "image"}] * 3, {"type": "text", "text": "Which?"}]}
    sample = Sample("place\x1b[2J", (message,), images, answer="B")
    completions = [Completion([1], [0.0], True)] * 2
    return Transcript(0, sample, completions, ["B", "\ud800# A"], [1.0, None], {"f": [1.0, 0.0]})


@pytest.mark.parametrize(
    "line",
    [
        b'{"stage": "sft", "st',
        b"7",
        b"null",
        b"[1]",
        b'"sft"',
        b"\x00\xff\x00",
        b'{"note": "restarted"}',
        b'{"stage": "sft"}',
        b'{"stage": "sft", "step": "3"}',
        b'{"stage": "sft", "step": true}',
        b'{"stage": ["sft"], "step": 3}',
        b'{"stage": "sft", "step": 1' + b"0" * 5000 + b"}",
        b'{"stage": "$x", "step": 3}',
        b"[" * 100_000,
        '{"stage": "sft", "step": 3}'.encode("utf-16-le"),
    ],
    ids=range(15),
)
def test_a_line_that_is_no_row_is_skipped_and_counted(line, tmp_path, capsys):
    rows = [{"stage": "sft", "step": step, "loss": 1.5, "kind": "x", "inf": float("inf")} for step in (1, 2)]
    first, second = (json.dumps(row).encode() for row in rows)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([first, line, b"", second, line]))
    metrics, skipped = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics == {"sft": {1: {"loss": 1.5}, 2: {"loss": 1.5}}} and skipped == 2
    log_of(tmp_path).rewind("sft", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + b"\n"
    assert "metrics.jsonl: 2 lines without the figures of a step are left out" in capsys.readouterr().out


def test_a_log_file_has_date_and_time_steps_and_the_time_left(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: float(next(clock)))
    log = log_of(tmp_path)
    log.start("sft", 500, 497)
    for step in (498, 499, 500):
        log.advance("sft", step, 500, "loss 1.0")
    log.stop()
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  sft \d+/500", line) for line in lines)
    assert lines[0].endswith("sft 497/500") and lines[-1].endswith("sft 500/500  loss 1.0  in 0:00:00")
    assert any(re.search(r"sft 499/500  loss 1.0  \d:\d\d:\d\d left$", line) for line in lines)


def test_a_line_is_printable_and_short(tmp_path, capsys):
    log_of(tmp_path).say("sample \x1b]0;owned\x07\x1b[31mred\nnext\u202e " + "x" * 5000 + " the end")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable() and len(line) < LONGEST + 30
    assert "sample ]0;owned [31mred next" in line and line.endswith("x the end")


def test_a_long_message_keeps_both_ends():
    message = one_line("a" * LONGEST + "b" * LONGEST)
    half = (LONGEST - 5) // 2
    assert message == "a" * half + " ... " + "b" * half
    assert one_line("a" * LONGEST) == "a" * LONGEST


@pytest.mark.parametrize(
    ("in_the_way", "said"),
    [
        ("tensorboard", "TensorBoard's .*tensorboard"),
        ("rollouts", "rollouts: .*"),
        ("run.json", "run.json: "),
    ],
)
def test_a_run_goes_on_without_what_it_can_do_without(in_the_way, said, tmp_path, capsys):
    steps = {"sft__steps": 1, "grpo__steps": 2}
    run_dir = runs.train(tmp_path / "run", "sft", **steps)
    (run_dir / in_the_way).unlink(missing_ok=True)
    (run_dir / in_the_way).mkdir() if in_the_way == "run.json" else (run_dir / in_the_way).touch()
    runs.train(run_dir, "sft", "grpo", **steps, log__tensorboard=True, log__rollouts_every=1)
    out = capsys.readouterr().out
    assert (
        len(re.findall(rf"{said}.* cannot be written, the run goes on without: [A-Z].*{run_dir}", out)) == 1
    )
    assert len(runs.metrics(run_dir, "grpo")) == 2


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied", "plots/a.png"),
                                   UserError("summary.json: unreadable")])  # fmt: skip
def test_a_run_ends_well_without_its_report(error, tmp_path, capsys, monkeypatch):
    def fails(run_dir):
        raise error

    monkeypatch.setattr(geo_r1.train.run, "write_report", fails)
    runs.train(tmp_path / "run", "sft", sft__steps=1)
    out = capsys.readouterr().out
    cause = str(error) if isinstance(error, UserError) else error.strerror
    assert f"report.html cannot be written, the run goes on without: {cause}" in out.replace("\n", " ")
    assert "report: " in out and "traceback" not in out.lower()


def test_a_full_disk_ends_tensorboard_not_the_run(tmp_path, capsys, monkeypatch):
    log = log_of(tmp_path, tensorboard=True)

    def full(*_):
        raise FULL

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in (1, 2):
        log.write("sft", step, {"loss": 1.0})
    log.close()
    done = capsys.readouterr()
    assert done.out.count("TensorBoard failed and gets nothing more") == 1 and done.err == ""
    assert "No space left on device" in done.out and len(log.path.read_text().splitlines()) == 2


def test_metrics_that_cannot_be_written_end_the_run_in_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        log_of(tmp_path).write("sft", 1, {"loss": 1.0})


def test_tensorboard_has_recipe_samples_and_results(tmp_path):
    (tmp_path / "recipe.toml").write_text("[run]\nseed = 3\n")
    log = log_of(tmp_path, tensorboard=True)
    log.write("grpo", 1, {"loss": 0.25})
    log.rollouts("grpo", 1, [transcript()])
    log.result("grpo", RESULT)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def text(tag):
        return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()

    assert text("recipe") == "    [run]\n    seed = 3"
    assert "    reward 1\n    B\n" in text("grpo/sample 1") and "true answer: B" in text("grpo/sample 1")
    (image,) = events.Images("grpo/sample 1")
    assert (image.step, image.height, image.width) == (1, 112, 56 + 62 + 67 + 8)
    assert [events.Scalars(f"eval/grpo/{name}")[0].value for name in RESULT] == [*RESULT.values()]


def fake_wandb(monkeypatch, logged, log=None):
    run = SimpleNamespace(
        summary={},
        define_metric=lambda name, step_metric: logged.append((name, step_metric)),
        save=lambda path, **_: logged.append(path),
        log=log or logged.append,
        finish=lambda: logged.append("finished"),
    )
    module = ModuleType("wandb")
    module.init = lambda **options: logged.append(options) or run
    module.Image = lambda image: image.size
    module.Table = lambda columns, data: data
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


def test_wandb_has_a_step_for_each_stage_samples_and_results(tmp_path, monkeypatch):
    logged = []
    run = fake_wandb(monkeypatch, logged)
    log = log_of(tmp_path, wandb=True, project="p")
    log.write("sft", 7, {"loss": 0.5})
    log.rollouts("grpo", 1, [transcript()])
    log.result("grpo", RESULT)
    log.close()
    options, *rest = logged
    assert (options["project"], options["config"], options["resume"]) == ("p", {"run": {"seed": 3}}, "allow")
    assert ("grpo/*", "grpo/step") in rest and str(tmp_path / "recipe.toml") in rest
    assert {"sft/step": 7, "sft/loss": 0.5} in rest and rest[-1] == "finished"
    [[(name, size, text)]] = [row["grpo/samples"] for row in rest if "grpo/samples" in row]
    assert size == (193, 112) and text.endswith("no reward\n?# A") and name == "place\x1b[2J"
    assert run.summary == {f"eval/grpo/{name}": value for name, value in RESULT.items()}


def test_wandb_that_fails_is_dropped(tmp_path, monkeypatch, capsys):
    def gone(figures):
        raise RuntimeError("the service has ended")

    fake_wandb(monkeypatch, [], log=gone)
    log = log_of(tmp_path, wandb=True)
    for step in (1, 2):
        log.write("sft", step, {"loss": 0.5})
    assert capsys.readouterr().out.count("Weights & Biases failed") == 1
    sys.modules["wandb"].init = lambda **_: gone(None)
    log_of(tmp_path, wandb=True).write("sft", 3, {"loss": 0.5})
    assert "Weights & Biases cannot be written, the run goes on without" in capsys.readouterr().out
    assert len(log.path.read_text().splitlines()) == 3


def test_wandb_without_its_package_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb needs the wandb package"):
        log_of(tmp_path, wandb=True)


def test_run_json_counts_sessions_and_adds_up_their_seconds(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 103.0])
    monkeypatch.setattr("geo_r1.train.report.about.time.monotonic", lambda: next(clock))
    path = tmp_path / "run.json"
    for _ in range(2):
        About(path, {"code": "geo_r1 1", "ranks": 2}).save()
    found = read_about(path)
    assert (found["seconds"], found["sessions"], found["ranks"]) == (8.0, 2, 2)


@pytest.mark.parametrize("text", ["", "[", "[1]", "7", '{"seconds": "long"}', '{"code": 3}', "\x00"])
def test_a_damaged_run_json_is_as_good_as_none(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_about(tmp_path / "run.json") == {}
