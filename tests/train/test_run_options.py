"""Steps that are not finite, and evaluations on the way: what they leave, and what they keep."""

import json
import math
import signal
from functools import partial

import forked_ranks
import option_runs
import pytest
import small_runs as runs
import torch

import geo_r1.train.run
import geo_r1.train.stages.grpo
import geo_r1.train.stages.sft
from geo_r1.train.__main__ import main
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.state.checkpoint import Checkpoints
from geo_r1.train.updater import Updater

MODULES = {"sft": geo_r1.train.stages.sft, "grpo": geo_r1.train.stages.grpo}


def spoil_loss(patch, stage, bad, gradient_too=True):
    """The loss of the calls that `bad` names, from 1 on, becomes nan, and the gradient with it or not."""
    calls, real = [], MODULES[stage]._loss

    def loss(*args):
        calls.append(args)
        value, *rest = real(*args)
        if bad(len(calls)):
            value = value * math.nan if gradient_too else value + math.nan
        return value, *rest

    patch.setattr(MODULES[stage], "_loss", loss)


def spoil_gradient(patch, stage, bad):
    """One entry of one weight's gradient becomes infinite, the loss stays as it is."""
    calls, real = [], Policy.learn

    def learn(self, *args, **options):
        calls.append(args)
        out = real(self, *args, **options)
        if bad(len(calls)):
            self.parameters[-1].grad.view(-1)[0] = math.inf
        return out

    patch.setattr(Policy, "learn", learn)


SPOILT = {
    "loss": partial(spoil_loss, gradient_too=False),
    "gradient": spoil_gradient,
    "loss and gradient": spoil_loss,
}


def watch_updates(monkeypatch) -> list:
    """Micro-batches and states before and after every update from now on."""
    updates, real = [], Updater.apply

    def state(updater):
        sections = updater.policy.state(updater.optimizer)
        return {f"{s}.{name}": t.clone() for s, tensors in sections.items() for name, t in tensors.items()}

    def apply(self, loss, micro_batches):
        before = state(self)
        figures = real(self, loss, micro_batches)
        updates.append((micro_batches, before, state(self)))
        return figures

    monkeypatch.setattr(Updater, "apply", apply)
    return updates


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_step_that_is_not_finite_changes_nothing(stage, what, tmp_path, monkeypatch, capsys):
    SPOILT[what](monkeypatch, stage, lambda call: call == 2)
    updates = watch_updates(monkeypatch)
    run_dir = runs.train(tmp_path / "run", stage, grpo__num_iterations=1)
    assert len(updates) == 5
    for number, (_, before, after) in enumerate(updates, 1):
        same = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
        assert len(same) == (len(after) if number == 2 else 0), number
    rows = runs.metrics(run_dir, stage)
    assert [row.get("bad_steps") for row in rows] == [None, 1, 1, 1, 1]
    assert [math.isfinite(row["grad_norm"]) for row in rows] == [True, what == "loss", True, True, True]
    assert [math.isfinite(row["loss"]) for row in rows] == [True, what == "gradient", True, True, True]
    assert all(tensor.isfinite().all() for tensor in option_runs.exported(run_dir, stage).values())

    [file] = (run_dir / "bad").iterdir()
    assert file.name == f"{stage}-000002-rank0.pt"
    [record], ([batch], *_) = torch.load(file, weights_only=True), updates[1]
    assert {"token_ids", "position_ids", "image_grids", "prompt_len", "completion_len"} <= {*record}
    for name in ("token_ids", "position_ids", "image_rows", "pixel_values", "target_R"):
        assert torch.equal(record[name], getattr(batch, name)), name
    for name in ("token_weight_R", *(("advantage_R", "ref_logp_R") if stage == "grpo" else ())):
        assert torch.equal(record[name], getattr(batch, name)), name
    assert record["completion_len"].tolist() == batch.completion_len
    assert [tuple(grid) for grid in record["image_grids"].tolist()] == [*batch.image_grids]
    assert f"{stage} step 2: loss " in capsys.readouterr().out


def test_bad_steps_are_counted_across_a_stop(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        spoil_loss(patch, "sft", lambda call: call == 2)
        run_dir = option_runs.stopped(tmp_path / "run", "sft", 3)
    runs.train(run_dir, "sft")
    assert [row.get("bad_steps") for row in runs.metrics(run_dir, "sft")] == [None, 1, 1, 1, 1]


@pytest.mark.parametrize(("allowed", "written"), [(0, {1}), (2, {1, 2, 3})])
def test_too_many_bad_steps_end_the_run(allowed, written, tmp_path, monkeypatch, capfd):
    spoil_loss(monkeypatch, "sft", lambda call: True)
    run_dir = tmp_path / "run"
    assert main(runs.arguments(run_dir, "sft", run__max_bad_steps=allowed)) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        f"geo_r1: sft step {allowed + 1}: loss nan, gradient nan: {allowed + 1} steps were not finite, "
        f"run.max_bad_steps is {allowed}; "
    )
    assert {path.name for path in (run_dir / "bad").iterdir()} == {f"sft-{n:06d}-rank0.pt" for n in written}
    assert (run_dir / "metrics.jsonl").exists() == (allowed > 0)
    assert not allowed or len(runs.metrics(run_dir, "sft")) == allowed
    assert not (run_dir / "models").exists()


def test_two_ranks_agree_that_a_step_is_bad(tmp_path):
    """At such a rate one update is enough. Both keep their part of the batch; the run ends with one line."""
    changes = {"sft__optim__lr": 1e30, "run__max_bad_steps": 1}
    run_dir = tmp_path / "run"
    ended = forked_ranks.run(runs.arguments(run_dir, "sft", **changes), 2)
    # SIGTERM may come before the second rank has failed too
    assert 2 in ended.codes and {*ended.codes} <= {2, -signal.SIGTERM}, "\n".join(ended.stderr)
    lines = [line for text in ended.stderr for line in text.splitlines() if line.startswith("geo_r1: ")]
    assert len({*lines}) == 1 and "2 steps were not finite, run.max_bad_steps is 1" in lines[0]
    assert {path.name for path in (run_dir / "bad").iterdir()} == {
        f"sft-{step:06d}-rank{rank}.pt" for step in (2, 3) for rank in (0, 1)
    }
    tokens = [torch.load(run_dir / "bad" / f"sft-000002-rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(len(micro["token_ids"]) > 0 for records in tokens for micro in records)


def test_as_many_bad_steps_as_allowed_do_not(tmp_path, monkeypatch):
    spoil_loss(monkeypatch, "sft", lambda call: call > 3)
    rows = runs.metrics(runs.train(tmp_path / "run", "sft", run__max_bad_steps=2), "sft")
    assert [row.get("bad_steps") for row in rows] == [None, None, None, 1, 2]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_evaluations_on_the_way(stage, tmp_path):
    """At every fifth and at no other step; the last one is that of the stage's finished model."""
    changes = {f"{stage}__steps": 6, "eval__num_samples": 4}
    plain = runs.train(tmp_path / "plain", stage, "eval", **changes)
    run_dir = runs.train(tmp_path / "run", stage, "eval", **changes, eval__every=3)
    rows, expected = runs.metrics(run_dir, stage), runs.metrics(plain, stage)
    names = {"eval/accuracy", "eval/well_formed", "eval/completion_length"}
    assert [names & {*row} for row in rows] == [set(), set(), names] * 2
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {name: rows[-1][f"eval/{name}"] for name in ("accuracy", "well_formed", "completion_length")} == {
        name: summary[stage][name] for name in ("accuracy", "well_formed", "completion_length")
    }
    # they change nothing
    assert [{n: v for n, v in row.items() if n not in names} for row in rows] == expected
    assert runs.weights(run_dir, stage) == runs.weights(plain, stage)


def test_evaluations_on_the_way_may_take_fewer_samples(tmp_path, monkeypatch):
    counts, real = [], geo_r1.train.run.validate

    def validate(context, vlm, stage, source):
        sample = source.sample
        seen = []
        object.__setattr__(source, "sample", lambda index: seen.append(index) or sample(index))
        out = real(context, vlm, stage, source)
        object.__setattr__(source, "sample", sample)
        counts.append(seen)
        return out

    monkeypatch.setattr(geo_r1.train.run, "validate", validate)
    runs.train(tmp_path / "run", "sft", eval__every=2, eval__every_num_samples=3)
    assert counts == [[0, 1, 2], [0, 1, 2]]


def script_accuracies(monkeypatch, accuracies):
    """Say how accurate the model is at each evaluation, and keep what was evaluated, by accuracy."""
    seen = {}

    def validate(context, vlm, stage, source):
        accuracy = accuracies[len(seen)]
        seen[len(seen)] = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
        return {"accuracy": accuracy}, accuracy

    monkeypatch.setattr(geo_r1.train.run, "validate", validate)
    return seen


def watch_finishing(monkeypatch) -> list[set[str]]:
    """What lies under checkpoints/ when a stage is about to delete all but the last."""
    found, real = [], Checkpoints.finish

    def finish(self):
        self.wait()
        found.append({path.name for path in (self.run_dir / "checkpoints").iterdir()})
        real(self)

    monkeypatch.setattr(Checkpoints, "finish", finish)
    return found


@pytest.mark.parametrize("lora", [0, 4], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("accuracies", "best"),
    [((0.1, 0.5, 0.3, 0.5, 0.2), 2), ((0.1, 0.2, 0.3, 0.4, 0.5), 5), ((0.5, 0.4, 0.3, 0.2, 0.1), 1)],
)
def test_the_best_model_is_what_a_stage_leaves(accuracies, best, lora, tmp_path, monkeypatch):
    seen = script_accuracies(monkeypatch, accuracies)
    changes = {"eval__every": 1, "eval__keep_best": True, "lora__rank": lora}
    with pytest.MonkeyPatch.context() as patch:
        policies, left = option_runs.watch_exports(patch), watch_finishing(patch)
        run_dir = runs.train(tmp_path / "run", "sft", **changes, sft__save_every=1, run__keep_checkpoints=1)
    assert [row["eval/accuracy"] for row in runs.metrics(run_dir, "sft")] == [*accuracies]
    kept = {f"sft-{best:06d}", "sft-000005", "sft-best.json"}
    assert left == [kept]
    [policy] = policies
    for name, parameter in policy.vlm.model.named_parameters():
        assert torch.equal(parameter, seen[best - 1][name]), name
    assert runs.checkpoints(run_dir) == kept
    if not lora:  # with adapters, what is exported is merged
        after = option_runs.exported(run_dir, "sft")
        assert all(torch.equal(tensor, seen[best - 1][name]) for name, tensor in after.items())


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_the_best_is_remembered_across_a_stop(stop, tmp_path, monkeypatch):
    changes = {"eval__every": 1, "eval__keep_best": True}
    accuracies = (0.1, 0.5, 0.3, 0.4, 0.2)
    seen = script_accuracies(monkeypatch, accuracies)
    whole = runs.train(tmp_path / "whole", "sft", **changes)
    seen.clear()
    option_runs.assert_goes_on_bit_by_bit(whole, "sft", stop, **changes)


def test_newest_checkpoints_stay_by_number(tmp_path, monkeypatch):
    left = watch_finishing(monkeypatch)
    runs.train(tmp_path / "run", "sft", sft__save_every=1, run__keep_checkpoints=3)
    assert left == [{"sft-000003", "sft-000004", "sft-000005"}]


def test_without_keep_best_the_last_model_stays(tmp_path, monkeypatch):
    seen, left = script_accuracies(monkeypatch, (0.9, 0.1)), watch_finishing(monkeypatch)
    run_dir = runs.train(tmp_path / "run", "sft", eval__every=2, sft__steps=4, sft__save_every=2)
    assert left == [{"sft-000002", "sft-000004"}]
    after = option_runs.exported(run_dir, "sft")
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in after.items())


def test_two_ranks_keep_the_best_model_that_one_does(tmp_path):
    changes = {"eval__every": 1, "eval__keep_best": True, "sft__optim__schedule": "constant"}
    one = runs.train(tmp_path / "one", "sft", **changes)
    two = option_runs.on_two_ranks(tmp_path / "two", "sft", **changes)
    option_runs.assert_same_figures(two, one, "sft")
    expected = option_runs.exported(one, "sft")
    for name, tensor in option_runs.exported(two, "sft").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-3, msg=name)
