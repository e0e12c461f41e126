"""Ablations: variants that start from each other, one comparison, goes on where it was stopped."""

import json
import subprocess
import sys

import pytest
import small_runs as runs

from geo_r1.train import ablate
from geo_r1.train.__main__ import main as train_main
from geo_r1.train.ablate import draw, main, markdown, plan
from geo_r1.train.recipe.load import dump_recipe

SPEC = """
recipe = "base.toml"
dir = "RUNS"
set = { "sft.steps" = 2, "run.stages" = ["sft", "grpo", "eval"] }

[[variant]]
name = "All of it"
group = "whole"

[[variant]]
name = "no spread"
group = "parts | <b>"
start = "All of it/sft"
set = { "grpo.advantage.scale" = "batch" }

[[variant]]
name = "asked elsewhere"
group = "parts | <b>"
start = "no spread/grpo"
set = { "world.num_candidates" = 3 }

[[variant]]
name = "tuned alone"
group = "whole"
stages = ["sft", "eval"]
set = { "world.response" = "answer" }
"""


@pytest.fixture
def spec(tmp_path):
    options = runs.SMALL | {"grpo.steps": 2, "eval.num_samples": 4}
    values = [f"{name} = {json.dumps(value, default=str)}" for name, value in options.items()]
    (tmp_path / "base.toml").write_text("\n".join(values))
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.replace("RUNS", str(tmp_path / "runs")))
    return path


def edited(spec, before, after):
    spec.write_text(spec.read_text().replace(before, after))
    return spec


def test_variants_start_from_each_other(spec, tmp_path):
    planned = {run.variant.name: run.recipe for run in plan(spec, more=["--run.seed", "3"])}
    assert [recipe.run.stages for recipe in planned.values()] == [
        ("sft", "grpo", "eval"),
        ("grpo", "eval"),
        ("eval",),
        ("sft", "eval"),
    ]
    assert planned["no spread"].model.path == str(tmp_path / "runs" / "all-of-it" / "models" / "sft")
    assert planned["asked elsewhere"].model.path == str(tmp_path / "runs" / "no-spread" / "models" / "grpo")
    assert planned["asked elsewhere"].world.num_candidates == 3
    assert planned["tuned alone"].world.response == "answer"
    assert {recipe.run.seed for recipe in planned.values()} == {3}
    assert {run.recipe.run.dir.parent for run in plan(spec, tmp_path / "other")} == {tmp_path / "other"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"All of it/sft"',
            '"Nothing/sft"',
            "variant 'no spread' starts from 'Nothing/sft'; before it there are All",
        ),
        ('"All of it/sft"', '"All of it/eval"', "starts from 'All of it/eval'"),
        ('"no spread/grpo"', '"tuned alone/sft"', "variant 'asked elsewhere' starts from 'tuned alone/sft'"),
        (
            "world.response",
            "world.reponse",
            "variant 'tuned alone': unknown option --world.reponse; did you mean",
        ),
        ('"tuned alone"', '"All of it!"', "the variant 'All of it' needs a name of its own"),
        ('["sft", "eval"]', '["sft"]', "variant 'tuned alone' does not end with eval"),
        ('group = "whole"', 'groop = "whole"', "variant.0.group: Field required"),
        ("recipe =", "recipe", "is not valid TOML"),
        ("[[variant]]", "[[other]]", "variant: Field required"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(spec, tmp_path, capsys, before, after, message):
    assert main([str(edited(spec, before, after))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_runs_once_each_and_goes_on_after_a_run_that_failed(spec, tmp_path, monkeypatch, capsys):
    asked, fail = [], {"asked-elsewhere"}

    def run(command):
        folder = next(a.removeprefix("--run.dir=") for a in command if a.startswith("--run.dir="))
        asked.append(folder.rsplit("/", 1)[1])
        return 1 if asked[-1] in fail else train_main(command[3:])

    monkeypatch.setattr(ablate, "_run", run)
    assert main([str(spec)]) == 2
    assert "the run of 'asked elsewhere' ended before its evaluation (exit code 1)" in capsys.readouterr().err
    assert [row["variant"] for row in json.loads((tmp_path / "runs" / "ablations.json").read_text())] == [
        "All of it",
        "no spread",
    ]
    fail.clear()
    assert main([str(spec)]) == 0
    assert asked == ["all-of-it", "no-spread", "asked-elsewhere", "asked-elsewhere", "tuned-alone"]
    rows = {row["variant"]: row for row in json.loads((tmp_path / "runs" / "ablations.json").read_text())}
    assert [row["model"] for row in rows.values()] == ["grpo", "grpo", "base", "sft"]
    assert rows["asked elsewhere"]["chance"] == pytest.approx(1 / 3)
    assert [row["before"] is None for row in rows.values()] == [False, False, True, True]
    assert (tmp_path / "runs" / "ablations.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main([str(edited(spec, '"sft.steps" = 2', '"sft.steps" = 3'))]) == 2  # old figures are not shown
    assert "all-of-it was made with sft.steps = 2, now 3; give another --dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "summary", ["{}", "[1]", "7", '{"grpo": 3}', '{"grpo": {"accuracy": 1}}', "[" * 9999]
)
def test_a_summary_that_is_none_is_one_line(summary, spec, tmp_path, capsys):
    first = plan(spec)[0].recipe
    first.run.dir.mkdir(parents=True)
    (first.run.dir / "recipe.toml").write_text(dump_recipe(first))
    (first.run.dir / "summary.json").write_text(summary)
    assert main([str(spec)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"geo_r1: {first.run.dir} is no whole run: ") and line.endswith("; delete it")


def test_a_trainer_that_is_asked_to_stop_is_waited_for(tmp_path):
    slow = "import signal as s, sys; s.signal(15, lambda *_: sys.exit(7)); print('on', flush=True); s.pause()"
    outer = (
        f"import sys; sys.argv = ['x']; from geo_r1.train.ablate import _run; "
        f"print('ended', _run([sys.executable, '-c', {slow!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "ended 7\n"


def test_the_table_has_a_row_a_variant_under_its_group():
    row = {
        "variant": "a",
        "group": "g",
        "before": 0.25,
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "chance": 0.2,
        "completion_length": 12.34,
        "well_formed": 1.0,
    }
    rows = [row, row | {"variant": "b", "group": "h", "before": None}, row | {"variant": "c"}]
    assert markdown(rows).splitlines()[2:] == [
        "| **g** | | | | | | |",
        "| a | 20.0% | 25.0% | 50.0% | 40.0% to 60.0% | 12.3 | 100.0% |",
        "| c | 20.0% | 25.0% | 50.0% | 40.0% to 60.0% | 12.3 | 100.0% |",
        "| **h** | | | | | | |",
        "| b | 20.0% |  | 50.0% | 40.0% to 60.0% | 12.3 | 100.0% |",
    ]
    labels = [label.get_text() for label in draw(rows).axes[0].get_yticklabels()]
    assert labels == ["g", "a", "c", "h", "b"]


def test_the_repositorys_own_comparison_is_whole():
    planned = plan(runs.HERE.parents[1] / "recipes" / "ablations_world.toml")
    assert len(planned) == 18
    assert sorted({run.recipe.world.num_candidates for run in planned}) == list(range(3, 11))
    left_out = [name for run in planned for name, weight in run.recipe.rewards.weights.items() if not weight]
    assert left_out == ["accuracy", "format", "length", "repetition", "accuracy", "length"]
