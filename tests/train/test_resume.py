"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys

import killed_runs
import pytest
import small_runs as runs

import geo_r1.train.checkpoint
from geo_r1.train.__main__ import main
from geo_r1.train.checkpoint import newest_checkpoint
from geo_r1.train.config import LogConfig
from geo_r1.train.log import Log

FINISHED = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
FINISHED |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
# Moment: what is left in checkpoints/, what is left in models/. The run saves at steps 1 to 5 and keeps two.
# Renames: each save's, and each old checkpoint's before it is deleted. Deletions: each save clears its own
# leftovers first, so the fourth is the first prune's.
KILLS = {
    "torch.save half done:2": ({".sft-000002.partial", "sft-000001"}, set()),
    "before rename:2": ({".sft-000002.partial", "sft-000001"}, set()),
    "after rename:2": ({"sft-000001", "sft-000002"}, set()),
    "before rename:4": ({"sft-000001", "sft-000002", "sft-000003"}, set()),
    "after rename:4": ({".sft-000001.partial", "sft-000002", "sft-000003"}, set()),
    "rmtree half done:4": ({".sft-000001.partial", "sft-000002", "sft-000003"}, set()),
    "before rename:9": ({"sft-000004", "sft-000005"}, {".sft.partial"}),
    "after rename:9": ({"sft-000004", "sft-000005"}, {"sft"}),
    "after rename:10": ({".sft-000004.partial", "sft-000005"}, {"sft"}),
}


def same_result(found, expected, stage):
    assert runs.weights(found, stage) == runs.weights(expected, stage)
    assert runs.metrics(found, stage) == runs.metrics(expected, stage)
    assert [row["step"] for row in runs.metrics(found, stage)] == [1, 2, 3, 4, 5]
    assert runs.files_under(found / "checkpoints") == set()
    assert {path.name for path in (found / "models" / stage).iterdir()} == FINISHED
    assert {path.name for path in (found / "models").iterdir()} == {stage}


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_by_bit(stage, number, tmp_path, monkeypatch, capfd):
    whole = runs.train(tmp_path / "whole", stage)
    run_dir = tmp_path / "stopped"
    write = Log.write

    def write_and_stop(self, stage, step, metrics):
        write(self, stage, step, metrics)
        if step == 3:  # of five
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", write_and_stop)
        before = signal.getsignal(number)
        capfd.readouterr()
        assert main(runs.arguments(run_dir, stage)) == 0
        assert signal.getsignal(number) is before
    stopped = f"geo_r1: {stage} stopped after step 3 of 5; the same command goes on\n"
    assert capfd.readouterr().err == stopped
    assert newest_checkpoint(run_dir, stage).name == f"{stage}-000003"
    assert not (run_dir / "models").exists()
    runs.train(run_dir, stage)
    same_result(run_dir, whole, stage)


def test_a_stop_at_the_last_step_leaves_only_the_export(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole", "sft")
    with monkeypatch.context() as patch:
        write = Log.write
        patch.setattr(
            Log,
            "write",
            lambda self, stage, step, metrics: (
                write(self, stage, step, metrics),
                step == 5 and os.kill(os.getpid(), signal.SIGTERM),
            ),
        )
        assert main(runs.arguments(tmp_path / "run", "sft")) == 0
    assert newest_checkpoint(tmp_path / "run", "sft").name == "sft-000005"
    runs.train(tmp_path / "run", "sft")
    same_result(tmp_path / "run", whole, "sft")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_leaves_whole_checkpoints_and_goes_on(tmp_path):
    """Killed with SIGKILL at every moment between two states of the folder."""
    whole = runs.train(tmp_path / "whole", "sft", sft__save_every=1)
    folders = {moment: tmp_path / f"run{i}" for i, moment in enumerate(KILLS)}
    plan = [(moment, runs.arguments(folder, "sft", sft__save_every=1)) for moment, folder in folders.items()]
    grpo = tmp_path / "grpo"
    plan.append(("torch.save half done:2", runs.arguments(grpo, "grpo", grpo__save_every=2)))
    driver = [sys.executable, killed_runs.__file__, json.dumps(plan)]
    done = subprocess.run(
        driver,
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.HERE)},
    )
    ended = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert ended == [str(int(signal.SIGKILL))] * len(plan), done.stderr
    for moment, folder in folders.items():
        checkpoints, models = KILLS[moment]
        assert {path.name for path in (folder / "checkpoints").iterdir()} == checkpoints, moment
        exported = (folder / "models").iterdir() if (folder / "models").exists() else ()
        assert {path.name for path in exported} == models, moment
        for path in (folder / "checkpoints").glob("sft-*"):
            assert {file.name for file in path.iterdir()} == FINISHED | {"trainer.pt"}, (moment, path.name)
        runs.train(folder, "sft", sft__save_every=1)
        same_result(folder, whole, "sft")
    assert newest_checkpoint(grpo, "grpo").name == "grpo-000002"
    runs.train(grpo, "grpo", grpo__save_every=2)
    same_result(grpo, runs.train(tmp_path / "grpo_whole", "grpo", grpo__save_every=2), "grpo")


def test_a_half_written_line_of_metrics_is_forgotten(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole", "sft", sft__save_every=2)
    run_dir = tmp_path / "run"
    write = Log.write

    def write_half(self, stage, step, metrics):
        if step == 4:
            with self.path.open("a") as file:
                file.write('{"stage": "sft", "step": 4, "lo')
            raise KeyboardInterrupt
        write(self, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", write_half)
        assert main(runs.arguments(run_dir, "sft", sft__save_every=2)) == 130
    assert newest_checkpoint(run_dir, "sft").name == "sft-000002"
    runs.train(run_dir, "sft", sft__save_every=2)
    same_result(run_dir, whole, "sft")
    assert not (run_dir / "metrics.partial").exists()


def test_rewinding_one_stage_leaves_the_others(tmp_path):
    log = Log(tmp_path, LogConfig(tensorboard=False), True, {})
    for stage, step in (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)):
        log.write(stage, step, {"loss": 1.0})
    log.rewind("grpo", 1)
    kept = [(row["stage"], row["step"]) for row in map(json.loads, log.path.read_text().splitlines())]
    assert kept == [("sft", 1), ("sft", 2), ("grpo", 1)]


def test_a_saved_folder_never_replaces_another(tmp_path, tiny_model):
    (tmp_path / "sft-000001").mkdir()
    (tmp_path / "sft-000001" / "precious").write_text("")
    with pytest.raises(AssertionError, match="there already"):
        geo_r1.train.checkpoint.save_folder(tmp_path / "sft-000001", Nothing(), [])
    assert (tmp_path / "sft-000001" / "precious").exists()


class Nothing:
    def save_pretrained(self, folder):
        pass
