"""A finished run goes on when its steps or epochs grow, and ends as if it had always been that long."""

import shutil

import option_runs
import pytest
import small_runs as runs

import geo_r1.train.run
from geo_r1.train.__main__ import main

LEVEL = {"sft__optim__schedule": "constant", "grpo__optim__schedule": "constant"}


def refused(capfd, argv) -> str:
    capfd.readouterr()
    assert main(argv) == 2
    return capfd.readouterr().err.splitlines()[-1].removeprefix("geo_r1: ")


@pytest.mark.parametrize("lora", [0, 4], ids=["whole", "lora"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_longer_run_is_the_one_that_was_longer_from_the_start(stage, lora, tmp_path, capfd):
    changes = {**LEVEL, "lora__rank": lora}
    whole = runs.train(tmp_path / "whole", stage, "eval", **changes)
    run_dir = runs.train(tmp_path / "run", stage, "eval", **changes, **{f"{stage}__steps": 3})
    short = runs.weights(run_dir, stage)
    capfd.readouterr()
    runs.train(run_dir, stage, "eval", **changes)
    option_runs.assert_same_run(run_dir, whole, stage)
    aside = run_dir / "models" / f"{stage}-000003"
    said = capfd.readouterr()
    assert f"geo_r1: {stage} goes on; the model that it had left is now {aside}" in said.err
    assert f"{stage}: going on from {run_dir}/checkpoints/{stage}-000003" in said.out
    assert (aside / "model.safetensors").read_bytes() == short
    assert runs.checkpoints(run_dir) == {f"{stage}-000005"}
    for file in ("summary.json", f"eval/{stage}/predictions.jsonl"):
        assert (run_dir / file).read_text() == (whole / file).read_text()


def test_a_schedule_is_that_of_the_new_length(tmp_path, capfd):
    changes = {"sft__optim__schedule": "linear"}
    whole = runs.train(tmp_path / "whole", "sft", **changes)
    run_dir = runs.train(tmp_path / "run", "sft", sft__steps=3, **changes)
    runs.train(run_dir, "sft", **changes)
    rates = [row["learning_rate"] for row in runs.metrics(run_dir, "sft")]
    assert rates[3:] == [row["learning_rate"] for row in runs.metrics(whole, "sft")][3:]
    assert "sft: the learning rate is now that of the longer schedule (linear)" in capfd.readouterr().err


def test_a_stopped_run_may_become_longer_too(tmp_path):
    whole = runs.train(tmp_path / "whole", "sft", **LEVEL, sft__steps=6)
    run_dir = option_runs.stopped(tmp_path / "run", "sft", 3, **LEVEL)
    runs.train(run_dir, "sft", **LEVEL, sft__steps=6)
    option_runs.assert_same_run(run_dir, whole, "sft")
    assert {path.name for path in (run_dir / "models").iterdir()} == {"sft"}


def test_epochs_may_grow(tmp_path):
    data = runs.write_dataset(tmp_path, 4)
    changes = {**LEVEL, "sft__data": data, "sft__batch_size": 2}
    whole = runs.train(tmp_path / "whole", "sft", **changes, sft__epochs=2)
    run_dir = runs.train(tmp_path / "run", "sft", **changes, sft__epochs=1)
    runs.train(run_dir, "sft", **changes, sft__epochs=2)
    option_runs.assert_same_run(run_dir, whole, "sft")


@pytest.mark.parametrize("moment", ["dump_recipe", "run_sft"])
def test_killed_while_it_is_extended(moment, tmp_path, monkeypatch):
    """Between the model's new name and the new recipe, and before the first new step."""
    whole = runs.train(tmp_path / "whole", "sft", **LEVEL)
    run_dir = runs.train(tmp_path / "run", "sft", **LEVEL, sft__steps=3)
    short = runs.weights(run_dir, "sft")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(geo_r1.train.run, moment, killed)
        assert main(runs.arguments(run_dir, "sft", **LEVEL)) == 130
    if moment == "dump_recipe":  # the shorter run is still there to be had
        runs.train(run_dir, "sft", **LEVEL, sft__steps=3)
        assert runs.weights(run_dir, "sft") == short
    runs.train(run_dir, "sft", **LEVEL)
    option_runs.assert_same_run(run_dir, whole, "sft")


def test_the_best_of_all_steps_is_kept(tmp_path, monkeypatch):
    accuracies = iter((0.1, 0.5, 0.3, 0.2, 0.4))

    def validate(*_):
        accuracy = next(accuracies)
        return {"accuracy": accuracy}, accuracy

    monkeypatch.setattr(geo_r1.train.run, "validate", validate)
    changes = {**LEVEL, "eval__every": 1, "eval__keep_best": True}
    run_dir = runs.train(tmp_path / "run", "sft", **changes, sft__steps=3)
    best = runs.weights(run_dir, "sft")
    runs.train(run_dir, "sft", **changes)
    assert runs.weights(run_dir, "sft") == best
    assert next(accuracies, None) is None
    assert runs.checkpoints(run_dir) == {"sft-000002", "sft-000005", "sft-best.json"}


def test_a_dry_run_knows_which_recipe_the_folder_has(tmp_path, capfd):
    run_dir = runs.train(tmp_path / "run", "sft", **LEVEL, sft__steps=2)
    assert main([*runs.arguments(run_dir, "sft", **LEVEL, sft__steps=3), "--dry-run"]) == 0
    assert capfd.readouterr().out.rstrip().endswith("\nREADY")
    assert main([*runs.arguments(run_dir, "sft", **LEVEL, sft__steps=2, run__seed=1), "--dry-run"]) == 2
    assert f"NOT READY:\n    {run_dir} was made with run.seed = 0, now 1; " in capfd.readouterr().out


def test_what_cannot_be_extended(tmp_path, capfd):
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", sft__steps=1, grpo__steps=2)
    before = runs.files_under(run_dir)
    assert runs.checkpoints(run_dir) == {"grpo-000002"}  # the next stage began: no way back
    start = f"geo_r1: {run_dir} ".removeprefix("geo_r1: ")
    for stages in (("sft", "grpo"), ("sft",)):
        assert refused(capfd, runs.arguments(run_dir, *stages, sft__steps=2, grpo__steps=2)).startswith(
            f"{start}holds grpo, which did not start from the sft that is asked for now; "
        )
    longer = runs.arguments(run_dir, "grpo", sft__steps=2, grpo__steps=2)  # but not to be run
    assert refused(capfd, longer).startswith(f"{start}was made with sft.steps = 1, now 2; ")
    shorter = runs.arguments(run_dir, "sft", "grpo", sft__steps=1, grpo__steps=1)
    assert refused(capfd, shorter).startswith(f"{start}was made with grpo.steps = 2, now 1; ")
    assert runs.files_under(run_dir) - before == set()
    shutil.rmtree(run_dir / "checkpoints")
    assert refused(capfd, runs.arguments(run_dir, "sft", "grpo", sft__steps=1, grpo__steps=3)) == (
        f"grpo in {run_dir} is finished, and its last checkpoint, from which it would go on, is gone; start "
        f"another run from its model: --model.path {run_dir}/models/grpo --run.dir <another>"
    )
    assert (run_dir / "models" / "grpo").exists()
