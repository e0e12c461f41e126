"""One run at a time in a folder; starting over deletes what a run writes, and nothing else."""

import json
import shutil
import subprocess
import sys

import option_runs
import pytest
import small_runs as runs

from geo_r1.errors import UserError
from geo_r1.train.__main__ import main
from geo_r1.train.parallel.agreement import check_ranks_agree
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.report.page import write_report
from geo_r1.train.state.run_folder import MARK, WRITTEN, claimed, clear, finished_model

OTHERWISE = "give another --run.dir, or --run.overwrite true"


def said(capfd) -> str:
    [line] = capfd.readouterr().err.splitlines()
    return line.removeprefix("geo_r1: ")


def test_a_run_writes_what_overwrite_deletes(tmp_path):
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", "eval", log__tensorboard=True)
    write_report(run_dir)
    found = {path.name for path in run_dir.iterdir()}
    assert found - {MARK} <= {*WRITTEN}
    assert {"models", "eval", "recipe.toml", "metrics.jsonl", "report.html", "rollouts"} <= found
    assert (run_dir / MARK).read_text() == ""
    (run_dir / "slurm-7.out").write_text("mine")
    clear(run_dir, Recipe(run={"dir": run_dir}))
    assert {path.name for path in run_dir.iterdir()} == {MARK, "slurm-7.out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(overwrite, tmp_path, capfd):
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "recipe.toml").write_text("# my notes\n")
    (home / "thesis.tex").write_text("")
    before = runs.files_under(home)
    assert main(runs.arguments(home, "sft", run__overwrite=overwrite)) == 2
    assert said(capfd) == (
        f"run.dir {home} holds models, which no run has written (there is no {MARK}); give another --run.dir"
    )
    assert runs.files_under(home) == before
    assert (home / "recipe.toml").read_text() == "# my notes\n"


def test_files_of_other_names_are_no_hindrance_and_stay(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "slurm-7.out").write_text("")
    runs.train(run_dir, "sft", sft__steps=1)
    runs.train(run_dir, "sft", sft__steps=2, run__overwrite=True)
    assert (run_dir / "slurm-7.out").exists()
    assert len(runs.metrics(run_dir, "sft")) == 2


def test_a_linked_folder_is_emptied_and_stays_linked(tmp_path):
    run_dir, large = tmp_path / "run", tmp_path / "large"
    large.mkdir()
    run_dir.mkdir()
    (run_dir / MARK).touch()
    (run_dir / "checkpoints").symlink_to(large)
    (large / "sft-000001").mkdir()
    (large / "sft-000001" / "shard").write_text("")
    (run_dir / "models").symlink_to(tmp_path / "gone")
    clear(run_dir, Recipe(run={"dir": run_dir}))
    assert [*large.iterdir()] == [] and (run_dir / "checkpoints").is_symlink()
    assert not (run_dir / "models").is_symlink()


def test_what_cannot_be_deleted_is_named_and_ends_the_run(tmp_path, capfd, monkeypatch):
    run_dir = runs.train(tmp_path / "run", "sft", sft__steps=1)

    def refuse(path, **_):
        raise PermissionError(1, "Operation not permitted", str(path / "kept"))

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert main(runs.arguments(run_dir, "sft", sft__steps=2, run__overwrite=True)) == 2
    kept = run_dir / ".models.partial" / "kept"
    assert said(capfd) == f"run.overwrite cannot delete {kept}: Operation not permitted"
    assert finished_model(run_dir, "sft") is None  # the old model is not taken for a new one
    runs.train(run_dir, "sft", sft__steps=2, run__overwrite=True)
    assert len(runs.metrics(run_dir, "sft")) == 2


@pytest.mark.parametrize("key", ["model__path", "sft__data"])
def test_overwrite_spares_what_the_recipe_reads(key, tmp_path, capfd):
    run_dir = runs.train(tmp_path / "run", "sft", sft__steps=1)
    data = runs.write_dataset(run_dir / "models", 4)
    path = {"model__path": run_dir / "models" / "sft", "sft__data": data}[key]
    before = runs.files_under(run_dir)
    capfd.readouterr()
    assert main(runs.arguments(run_dir, "sft", run__overwrite=True, **{key: path})) == 2
    assert said(capfd) == (
        f"run.overwrite would delete {key.replace('__', '.')} = {path}; move it, or give another --run.dir"
    )
    assert runs.files_under(run_dir) == before


HOLD = """
import sys
from pathlib import Path
from geo_r1.train.state.run_folder import claimed
with claimed(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`, as a run does."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_is_refused(overwrite, tmp_path, holder, capfd):
    owner = json.loads((tmp_path / "run" / MARK).read_text())
    assert owner["pid"] == holder.pid
    assert main(runs.arguments(tmp_path / "run", "sft", run__overwrite=overwrite)) == 2
    assert said(capfd) == (
        f"run.dir {tmp_path / 'run'} is in use by process {holder.pid} on {owner['host']}, started "
        f"{owner['started']}; wait for it or give another --run.dir"
    )
    assert json.loads((tmp_path / "run" / MARK).read_text()) == owner


def test_a_folder_of_a_killed_run_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    lines = []
    with claimed(tmp_path / "run", lines.append):
        (tmp_path / "run" / "metrics.jsonl").touch()
    [line] = lines
    assert f"taking over from process {holder.pid} on " in line
    with claimed(tmp_path / "run", lines.append):  # which ended well
        pass
    assert len(lines) == 1


def test_a_folder_in_which_no_run_began_goes(tmp_path):
    with claimed(tmp_path / "run", print):
        pass
    assert not (tmp_path / "run").exists()


def test_half_a_model_is_no_finished_stage(tmp_path, capfd):
    run_dir = option_runs.stopped(tmp_path / "run", "sft", 3)
    folder = run_dir / "models" / "sft"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    capfd.readouterr()
    assert main(runs.arguments(run_dir, "sft")) == 2
    assert said(capfd) == (
        f"{folder} is no whole model: model.safetensors is missing or damaged; delete the folder to train sft"
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(UserError, match=r"no whole model: model-2\.safetensors is missing"):
        finished_model(run_dir, "sft")
    (folder / "model-2.safetensors").touch()
    assert finished_model(run_dir, "sft") == folder


def test_a_run_without_its_recipe_cannot_go_on(tmp_path, capfd):
    run_dir = runs.train(tmp_path / "run", "sft", sft__steps=1)
    (run_dir / "recipe.toml").unlink()
    capfd.readouterr()
    assert main(runs.arguments(run_dir, "sft", sft__steps=1)) == 2
    assert said(capfd) == f"{run_dir} holds models, but not its recipe.toml; {OTHERWISE}"


# A table of what a rank is about to run, its changes, and what is said.
OTHER_RANKS = {
    "rate": ("recipe", {"sft": {"optim": {"lr": 1}}}, "recipe.sft.optim.lr = 1e-05, on rank 1 1"),
    "stages": ("recipe", {"run": {"stages": ["grpo"]}}, "recipe.run.stages = ['sft'], on rank 1 ['grpo']"),
    "data": ("contents", {"DATA": "0123"}, "contents.DATA = "),
    "torch": ("version", {"torch": "1.0"}, "version.torch = "),
}


def merged(table, change):
    if not isinstance(change, dict):
        return change
    return table | {key: merged(table.get(key), value) for key, value in change.items()}


@pytest.mark.parametrize("other", OTHER_RANKS)
def test_ranks_that_differ_do_not_begin(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.write_dataset(tmp_path, 3).rename("DATA")
    recipe = Recipe(run={"stages": ["sft"]}, sft={"data": "DATA", "steps": 1, "optim": {"lr": 1e-5}})
    table, change, expected = OTHER_RANKS[other]

    class Two:
        size = 2

        def gather(self, mine):
            return [mine, merged(mine, {table: change} if change else {})]

    with pytest.raises(UserError) as e:
        check_ranks_agree(recipe, Two())
    assert str(e.value).startswith(f"the ranks differ: {expected}")
    change = {}
    check_ranks_agree(recipe, Two())


def test_another_row_of_the_data_is_another_digest(tmp_path):
    found = []

    class Two:
        size = 2

        def gather(self, mine):
            found.append(mine["contents"])
            return [mine, mine]

    data = runs.write_dataset(tmp_path, 3)
    for text in (data.read_text(), data.read_text().replace("row1", "row7"), ""):
        data.write_text(text)
        check_ranks_agree(Recipe(sft={"data": str(data), "steps": 1}), Two())
    assert len({json.dumps(contents) for contents in found}) == 3
