"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

import json
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import forked_ranks
import option_runs
import pytest
import small_runs as runs
from compared_runs import RATE, same_metrics, same_weights

from geo_r1.errors import UserError
from geo_r1.train.__main__ import main
from geo_r1.train.recipe.run_sections import LogConfig
from geo_r1.train.report.log import Log
from geo_r1.train.state.checkpoint import newest_checkpoint

FINISHED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
}
FINISHED |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
# Moment: what is left in checkpoints/, what is left in models/. The run saves at steps 1 to 5 and keeps two.
# Renames: each save's, and each old checkpoint's before it is deleted.
KILLS = {
    "shards half written:2": ({".sft-000002.partial", "sft-000001"}, set()),
    "before metadata:2": ({".sft-000002.partial", "sft-000001"}, set()),
    "before rename:2": ({".sft-000002.partial", "sft-000001"}, set()),
    "after rename:2": ({"sft-000001", "sft-000002"}, set()),
    "before rename:4": ({"sft-000001", "sft-000002", "sft-000003"}, set()),
    "after rename:4": ({".sft-000001.partial", "sft-000002", "sft-000003"}, set()),
    "rmtree half done:1": ({".sft-000001.partial", "sft-000002", "sft-000003"}, set()),
    "before rename:9": ({"sft-000004", "sft-000005"}, {".sft.partial"}),
    "after rename:9": ({"sft-000004", "sft-000005"}, {"sft"}),
    "after rename:10": ({".sft-000004.partial", "sft-000005"}, {"sft"}),
}
WHOLE = {".metadata", "__0_0.distcp", "manifest.json", "trainer.json"}
# Stage, then strategies that the run goes through, two steps each and the last one to the end. The reference
# model moves once, in the second step, and so is in the checkpoints.
CHAINS = {
    "fewer ranks": ("sft", ["fsdp2", "one"]),
    "more ranks": ("grpo", ["one", "fsdp2"]),
    "from strategy to strategy": ("grpo", ["fsdp2", "zero 3", "one"]),
    "and back": ("sft", ["one", "zero 2", "ddp"]),
    "to a number of ranks that divides few weights": ("sft", ["one", "zero 3 of three"]),
}
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def same_result(found, expected, stage):
    assert runs.weights(found, stage) == runs.weights(expected, stage)
    assert runs.metrics(found, stage) == runs.metrics(expected, stage)
    assert [row["step"] for row in runs.metrics(found, stage)] == [1, 2, 3, 4, 5]
    assert runs.checkpoints(found) == {f"{stage}-000005"}  # the only one that stays
    assert {path.name for path in (found / "models" / stage).iterdir()} == FINISHED
    assert {path.name for path in (found / "models").iterdir()} == {stage}


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_run_goes_on_bit_by_bit(stage, number, tmp_path, capfd):
    whole = runs.train(tmp_path / "whole", stage)
    capfd.readouterr()
    before = signal.getsignal(number)
    run_dir = option_runs.stopped(tmp_path / "stopped", stage, 3, number)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.splitlines() == [
        "geo_r1: stopping after this step, with a checkpoint; Ctrl-C again stops now",
        f"geo_r1: {stage} stopped after step 3 of 5; the same command goes on",
    ]
    assert newest_checkpoint(run_dir, stage).name == f"{stage}-000003"
    runs.train(run_dir, stage)
    same_result(run_dir, whole, stage)


def test_a_stop_at_the_last_step_leaves_only_the_export(tmp_path):
    whole = runs.train(tmp_path / "whole", "sft")
    run_dir = option_runs.stopped(tmp_path / "run", "sft", 5)
    assert newest_checkpoint(run_dir, "sft").name == "sft-000005"
    runs.train(run_dir, "sft")
    same_result(run_dir, whole, "sft")


@FORKS
def test_a_killed_run_leaves_whole_checkpoints_and_goes_on(tmp_path):
    """Killed with SIGKILL at every moment between two states of the folder."""
    plan = [("sft", moment, *left) for moment, left in KILLS.items()]
    plan.append(
        ("grpo", "shards half written:3", {".grpo-000003.partial", "grpo-000001", "grpo-000002"}, set())
    )
    whole = {stage: tmp_path / f"whole_{stage}" for stage in ("sft", "grpo")}
    for stage, folder in whole.items():
        forked_ranks.train(folder, stage, strategy="one", **{f"{stage}__save_every": 1})
    for number, (stage, moment, checkpoints, models) in enumerate(plan):
        folder, changes = tmp_path / f"run{number}", {f"{stage}__save_every": 1}
        ranks, options = forked_ranks.STRATEGIES["one"]
        argv = runs.arguments(folder, stage, **options | changes)
        assert forked_ranks.run(argv, ranks, moment=moment).codes == [-signal.SIGKILL], moment
        assert runs.checkpoints(folder) == checkpoints, moment
        exported = (folder / "models").iterdir() if (folder / "models").exists() else ()
        assert {path.name for path in exported} == models, moment
        for path in (folder / "checkpoints").glob(f"{stage}-*"):
            assert {file.name for file in path.iterdir()} == WHOLE, (moment, path.name)
        forked_ranks.train(folder, stage, strategy="one", **changes)
        same_result(folder, whole[stage], stage)


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 128
    file.write_bytes(data)


def planted(file):
    """Unpickling it would write a file."""
    file.write_bytes(pickle.dumps(Planted(file.parents[2] / "ran")))


class Planted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


DAMAGES = {
    "a bit of the weights": lambda folder: flipped(folder / "__0_0.distcp"),
    "a bit of the metadata": lambda folder: flipped(folder / ".metadata"),
    "a cut shard": lambda folder: os.truncate(folder / "__0_0.distcp", 5000),
    "no shard": lambda folder: (folder / "__0_0.distcp").unlink(),
    "a planted pickle": lambda folder: planted(folder / ".metadata"),
    "another's folder": lambda folder: (
        folder.rename(folder.with_name("sft-999999"))
        and planted(folder.with_name("sft-999999") / ".metadata")
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(damage, tmp_path, capfd):
    changes = {"sft__save_every": 1}
    whole = runs.train(tmp_path / "whole", "sft", **changes)
    run_dir = option_runs.stopped(tmp_path / "run", "sft", 3, **changes)
    DAMAGES[damage](run_dir / "checkpoints" / "sft-000003")
    capfd.readouterr()
    runs.train(run_dir, "sft", **changes)
    said = capfd.readouterr().out
    assert " is damaged: " in said and "; it is now damaged-sft-" in said
    assert f"sft: going on from {run_dir}/checkpoints/sft-000002" in said
    assert not (run_dir / "ran").exists()
    assert runs.weights(run_dir, "sft") == runs.weights(whole, "sft")
    assert runs.metrics(run_dir, "sft") == runs.metrics(whole, "sft")


def test_without_a_whole_checkpoint_a_stage_starts_again(tmp_path, capfd):
    whole = runs.train(tmp_path / "whole", "sft")
    run_dir = option_runs.stopped(tmp_path / "run", "sft", 3)
    flipped(run_dir / "checkpoints" / "sft-000003" / "trainer.json")
    runs.train(run_dir, "sft")
    assert runs.weights(run_dir, "sft") == runs.weights(whole, "sft")
    assert runs.checkpoints(run_dir) == {"damaged-sft-000003", "sft-000005"}


def fails_at(number, error):
    """A stand-in for the n-th call of a function, which raises."""
    calls = []

    def fail(real):
        def counted(*args, **options):
            calls.append(args)
            if len(calls) == number:
                raise error
            return real(*args, **options)

        return counted

    return fail


ENDS = {
    "a row": ("sft", "geo_r1.data.loader.PromptLoader.load", 4, UserError("sample 7: broken image"), 2, 3),
    "a row in grpo": ("grpo", "geo_r1.data.loader.PromptLoader.load", 4, UserError("sample 7"), 2, 3),
    "a reward": ("grpo", "geo_r1.train.rl.scoring.score_groups", 5, UserError("reward x raised"), 2, 3),
    "a defect": ("sft", "geo_r1.train.stages.sft.share_out", 4, RuntimeError("tensor sizes"), None, 3),
    "metrics": ("sft", "geo_r1.train.report.log.Log.write", 4, OSError(28, "No space left on device"), 2, 4),
    "an evaluation": ("sft", "geo_r1.train.stages.evaluate.predict", 2, UserError("sample 3"), 2, 4),
    "the export": ("sft", "geo_r1.train.context.export_model", 1, OSError(28, "No space left"), 2, 5),
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_stage_it_goes_on_from_its_last_whole_step(end, tmp_path, monkeypatch, capfd):
    stage, name, number, error, code, step = ENDS[end]
    changes = {"eval__every": 2} if end == "an evaluation" else {}
    whole = runs.train(tmp_path / "whole", stage, **changes)
    run_dir, argv = tmp_path / "run", runs.arguments(tmp_path / "run", stage, **changes)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(name, fails_at(number, error)(pkgutil.resolve_name(name)))
        if code is None:
            with pytest.raises(type(error)) as e:
                main(argv)
            assert e.value.__notes__ == [f"{stage} goes on after step {step}"]
        else:
            assert main(argv) == code
            [line] = capfd.readouterr().err.splitlines()
            assert end == "the export" or line.endswith(f"; {stage} goes on after step {step}")
    assert newest_checkpoint(run_dir, stage).name == f"{stage}-{step:06d}"
    runs.train(run_dir, stage, **changes)
    assert runs.weights(run_dir, stage) == runs.weights(whole, stage)
    if end not in ("metrics", "an evaluation"):  # of which the figures are lost
        assert runs.metrics(run_dir, stage) == runs.metrics(whole, stage)


def stop(run_dir, stage, strategy, number, rank, after, **changes):
    """Let a run stop after two more steps, which leads to step `after`."""
    ended = forked_ranks.train(run_dir, stage, strategy=strategy, stop=(number, rank, 2), **changes)
    heard = ["geo_r1: stopping after this step, with a checkpoint; Ctrl-C again stops now"] * (rank == 0)
    stopped = f"geo_r1: {stage} stopped after step {after} of 5; the same command goes on"
    assert ended.said == [*heard, stopped]
    assert newest_checkpoint(run_dir, stage).name == f"{stage}-{after:06d}"
    assert not (run_dir / "models").exists()


@FORKS
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_other_ranks_and_another_strategy(chain, tmp_path):
    stage, strategies = CHAINS[chain]
    changes = RATE | {"grpo__reference__sync_steps": 2}
    forked_ranks.train(tmp_path / "whole", stage, strategy="one", **changes)
    folder = tmp_path / "run"
    for number, strategy in enumerate(strategies[:-1]):
        last = forked_ranks.STRATEGIES[strategy][0] - 1
        stop(folder, stage, strategy, signal.SIGTERM, last, 2 * (number + 1), **changes)
    forked_ranks.train(folder, stage, strategy=strategies[-1], **changes)
    same_metrics(folder, tmp_path / "whole", stage, 5)
    same_weights(folder, tmp_path / "whole", stage)
    assert runs.checkpoints(folder) == {f"{stage}-000005"}


@FORKS
@pytest.mark.parametrize(("stage", "strategy"), [("grpo", "fsdp2"), ("sft", "zero 3")])
def test_two_ranks_go_on_bit_by_bit(stage, strategy, tmp_path):
    """Whichever of them hears of it, and whichever of the signals it is."""
    folder, whole, changes = tmp_path / "run", tmp_path / "whole", {"grpo__reference__sync_steps": 2}
    forked_ranks.train(whole, stage, strategy=strategy, **changes)
    stop(folder, stage, strategy, signal.SIGUSR1, 1, 2, **changes)
    stop(folder, stage, strategy, signal.SIGTERM, 0, 4, **changes)
    forked_ranks.train(folder, stage, strategy=strategy, **changes)
    same_result(folder, whole, stage)


FORKED = """
import os, signal
from geo_r1.train.stages.loop import stop_requests
with stop_requests() as requested:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), requested())
"""


@FORKS
def test_a_stop_signal_ends_what_a_user_forks():
    """`multiprocessing.Pool` ends its processes so, and waits for them."""
    out = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert out.stdout == "-15 False\n", out.stderr


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
    assert not [*run_dir.glob("*.partial")]  # hidden ones, too


def test_rewinding_one_stage_leaves_the_others(tmp_path):
    log = Log(tmp_path, LogConfig(tensorboard=False), True, {})
    for stage, step in (("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)):
        log.write(stage, step, {"loss": 1.0})
    log.rewind("grpo", 1)
    kept = [(row["stage"], row["step"]) for row in map(json.loads, log.path.read_text().splitlines())]
    assert kept == [("sft", 1), ("sft", 2), ("grpo", 1)]
