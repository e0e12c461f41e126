"""What a step computes: packing does not change it, options and figures mean what they are called."""

import itertools
import json
import math

import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file

import geo_r1.train.stages.grpo
from geo_r1.eval.cross_view import wilson_interval
from geo_r1.train.__main__ import main
from geo_r1.train.models import Models

PLAN_FIGURES = {"num_micro_batches", "plan/waiting", "plan/teraflop", "plan/moved_prompts"}
SFT_FIGURES = {"stage", "step", "loss", "grad_norm", "learning_rate", "num_tokens"} | PLAN_FIGURES
GRPO_FIGURES = {
    "stage", "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/small_runs:spread/mean",
    "rewards/small_runs:spread/std", "loss", "entropy", "clip_ratio/region_mean", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "grad_norm", "learning_rate", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length", "num_tokens",
    "tokens/computed", "tokens/saved_by_sharing", "tokens/saved_by_packing", "tokens/repeated_prompt",
    "completions/dropped_zero_advantage", "tokens/dropped_zero_advantage", *PLAN_FIGURES,
    "sampling/logp_difference/mean", "sampling/logp_difference/max", "sampling/token_mult_prob_error",
}  # fmt: skip
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")
POLICIES = ("clip", "cispo", "sapo")
LEVELS = ("token", "sequence")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_micro_batches_do_not_change_a_step(stage, tmp_path):
    """190 tokens hold one sample, 120 one prompt and some of its completions; 16384 hold the whole step."""
    name = f"{stage}__optim__max_tokens"
    wide = runs.train(tmp_path / "wide", stage, **{name: 16384})
    narrow = runs.train(tmp_path / "narrow", stage, **{name: 190 if stage == "sft" else 120})
    for expected, found in zip(runs.metrics(wide, stage), runs.metrics(narrow, stage), strict=True):
        for figure in ("loss", "grad_norm", *(("entropy", "kl", "reward") if stage == "grpo" else ())):
            assert found[figure] == pytest.approx(expected[figure], rel=1e-5, abs=1e-6), figure
    if stage == "sft":
        assert [row["num_micro_batches"] for row in runs.metrics(wide, stage)] == [1] * 5
        assert min(row["num_micro_batches"] for row in runs.metrics(narrow, stage)) == 4
        assert {*runs.metrics(wide, stage)[0]} >= SFT_FIGURES
    else:
        assert {row["tokens/repeated_prompt"] for row in runs.metrics(wide, stage)} == {0}
        assert min(row["tokens/repeated_prompt"] for row in runs.metrics(narrow, stage)) > 0


def test_fine_tuning_learns_its_samples(tmp_path):
    data = runs.write_dataset(tmp_path, 2)
    changes = {"sft__data": data, "sft__batch_size": 2, "sft__steps": 30, "sft__optim__lr": 1e-2}
    losses = [row["loss"] for row in runs.metrics(runs.train(tmp_path / "run", "sft", **changes), "sft")]
    assert losses[0] > 5
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("loss", "policy", "level"), [*itertools.product(LOSSES, POLICIES, LEVELS)])
def test_every_loss_runs(loss, policy, level, tmp_path):
    """With the KL term for half of them: its figure, and the model it needs, are there only then."""
    beta = 0.1 * (level == "sequence")
    changes = {
        "grpo__loss__type": loss,
        "grpo__loss__policy": policy,
        "grpo__steps": 2,
        "grpo__loss__beta": beta,
    }
    changes |= {"grpo__loss__epsilon_high": 5.0} if policy == "cispo" else {}
    changes |= {"grpo__loss__importance_sampling_level": level, "rollout__max_new_tokens": 8}
    run_dir = runs.train(tmp_path / "run", "grpo", **changes)
    rows = runs.metrics(run_dir, "grpo")
    assert len(rows) == 2
    for row in rows:
        assert {*row} == GRPO_FIGURES | ({"kl"} if beta else set())
        assert all(math.isfinite(value) for name, value in row.items() if name != "stage")
        assert row["grad_norm"] > 0
        assert 0 < row["entropy"] < math.log(512)
    start = (runs.SMALL["model.path"] / "model.safetensors").read_bytes()
    assert runs.weights(run_dir, "grpo") != start


@pytest.mark.parametrize(
    ("baseline", "scale"), [*itertools.product(("mean", "leave_one_out"), ("group", "batch", "none"))]
)
def test_every_advantage_runs(baseline, scale, tmp_path):
    changes = {"grpo__advantage__baseline": baseline, "grpo__advantage__scale": scale, "grpo__steps": 1}
    [row] = runs.metrics(runs.train(tmp_path / "run", "grpo", **changes), "grpo")
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_reference_is_held_only_for_the_kl(beta, tmp_path, monkeypatch):
    copies = []
    real = Models.reference
    monkeypatch.setattr(
        Models, "reference", lambda *args, **how: copies.append(real(*args, **how)) or copies[-1]
    )
    rows = runs.metrics(runs.train(tmp_path / "run", "grpo", grpo__loss__beta=beta), "grpo")
    assert len(copies) == (beta > 0)
    assert all(("kl" in row) == (beta > 0) for row in rows)
    if beta:
        assert not any(parameter.requires_grad for parameter in copies[0].vlm.model.parameters())
        assert all(row["kl"] > 0 for row in rows)


def test_groups_without_signal_are_counted(tmp_path):
    rows = runs.metrics(
        runs.train(tmp_path / "run", "grpo", rewards__functions=["small_runs:first_group_constant"]), "grpo"
    )
    assert {row["frac_reward_zero_std"] for row in rows} == {0.5}
    assert all(row["reward_std"] > 0 for row in rows)


def test_a_completion_that_nothing_scores_takes_no_part(tmp_path, monkeypatch):
    """It is not packed, and has no place in the reward's figures."""
    seen = []
    for name in ("contributing_parts", "share_out"):
        real = getattr(geo_r1.train.stages.grpo, name)

        def watched(*args, real=real):
            seen.append((args, real(*args)))
            return seen[-1][1]

        monkeypatch.setattr(geo_r1.train.stages.grpo, name, watched)
    changes = {"rewards__functions": ["small_runs:first_of_group_unscored"], "grpo__steps": 1}
    [row] = runs.metrics(runs.train(tmp_path / "run", "grpo", **changes), "grpo")
    [((_, scored), _), (_, batches)] = seen
    [batch] = batches.micro_batches
    assert [[reward is not None for reward in group.reward] for group in scored] == [[False, *[True] * 3]] * 2
    lengths = [[len(completion.token_ids) for completion in group.completions] for group in scored]
    assert batch.completion_len == [length for group in lengths for length in group[1:]]
    assert bool((batch.token_weight_R > 0).all())
    assert row["completions/dropped_zero_advantage"] == 2
    assert row["tokens/dropped_zero_advantage"] == sum(group[0] for group in lengths)
    rewards = torch.tensor([runs.spread([c.token_ids for c in group.completions])[1:] for group in scored])
    assert row["reward"] == pytest.approx(rewards.mean().item())
    assert row["reward_std"] == pytest.approx(rewards.std(1).mean().item())
    assert row["rewards/small_runs:first_of_group_unscored/mean"] == pytest.approx(rewards.mean().item())


def test_a_step_that_nothing_scores_changes_only_by_the_kl(tmp_path):
    changes = {"rewards__functions": ["small_runs:never_scores"], "grpo__steps": 2, "grpo__loss__beta": 0.0}
    run_dir = runs.train(tmp_path / "run", "grpo", **changes)
    for row in runs.metrics(run_dir, "grpo"):
        assert (row["reward"], row["reward_std"], row["frac_reward_zero_std"]) == (0, 0, 1)
        assert (row["loss"], row["grad_norm"], row["tokens/computed"]) == (0, 0, 0)
        assert row["completions/dropped_zero_advantage"] == 8
        assert "entropy" not in row  # there is nothing to take the mean of
        assert "rewards/small_runs:never_scores/mean" not in row


def test_equal_rewards_cost_nothing_and_change_nothing(tmp_path, monkeypatch):
    """Groups without signal are left out; with them the weights, Adam's averages among them, end the same."""
    changes = {
        "rewards__functions": ["small_runs:same_for_some_answers"],
        "model__dtype": "float64",
        "grpo__steps": 6,
        "grpo__loss__beta": 0.0,
        "grpo__optim__weight_decay": 0.1,
    }
    without = runs.train(tmp_path / "without", "grpo", **changes)
    real = geo_r1.train.stages.grpo.contributing_parts

    def all_that_count(config, groups):  # as if a term of the loss needed them
        loss = config.loss.model_copy(update={"entropy_coef": 1.0})
        return real(config.model_copy(update={"loss": loss}), groups)

    monkeypatch.setattr(geo_r1.train.stages.grpo, "contributing_parts", all_that_count)
    packed = runs.train(tmp_path / "packed", "grpo", **changes)
    rows = [*zip(runs.metrics(without, "grpo"), runs.metrics(packed, "grpo"), strict=True)]
    assert {row["frac_reward_zero_std"] for row, _ in rows} == {0, 0.5, 1}
    for found, expected in rows:
        same = found["frac_reward_zero_std"]
        assert found["completions/dropped_zero_advantage"] == 8 * same
        for name in ("loss", "grad_norm", "learning_rate", "reward", "tokens/saved_by_packing"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-12), name
        assert found["tokens/saved_by_sharing"] == expected["tokens/saved_by_sharing"]
        left = expected["tokens/computed"] - found["tokens/computed"]
        assert found["tokens/dropped_zero_advantage"] == left and (left > 0) == (same > 0)
        assert ("entropy" in found) == (same < 1)
    ends = [load_file(run_dir / "models" / "grpo" / "model.safetensors") for run_dir in (without, packed)]
    for name, expected in ends[1].items():
        torch.testing.assert_close(ends[0][name], expected, rtol=0, atol=1e-6, msg=name)


def test_a_run_says_who_computes_its_layers(tmp_path, capsys):
    runs.train(tmp_path / "run", "sft", sft__steps=1)
    assert "layers that liger-kernel computes: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        (0, 10, (0.0, 0.27754)),
        (10, 10, (0.72246, 1.0)),
        (5, 10, (0.23659, 0.76341)),
        (81, 263, (0.2553, 0.3662)),
    ],
)
def test_wilson_interval_against_published_values(successes, trials, interval):
    """The last is the example of Newcombe, Statistics in Medicine 17, 1998: 0.2553 to 0.3662."""
    assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


def test_stages_one_at_a_time_make_the_same_run(tmp_path):
    stages = ("pretrain", "sft", "grpo", "eval")
    changes = {"pretrain__steps": 2, "pretrain__batch_size": 4}
    together = runs.train(tmp_path / "together", *stages, **changes)
    apart = tmp_path / "apart"
    for stage in stages:
        runs.train(apart, stage, **changes)
    for stage in ("pretrain", "sft", "grpo"):
        assert runs.weights(apart, stage) == runs.weights(together, stage)
        assert runs.metrics(apart, stage) == runs.metrics(together, stage)
    assert (apart / "summary.json").read_bytes() == (together / "summary.json").read_bytes()
    assert [*json.loads((apart / "summary.json").read_text())] == ["base", "sft", "grpo"]


def test_a_file_of_samples_runs_through_every_stage(tmp_path):
    """Epochs decide the steps; a row without an answer can be trained on but not scored."""
    data = runs.write_dataset(tmp_path, 6)
    changes = {
        "sft__data": data,
        "sft__epochs": 1.5,
        "sft__batch_size": 4,
        "grpo__data": data,
        "grpo__epochs": 1,
    }
    changes |= {"eval__data": data, "eval__num_samples": 0, "rewards__functions": ["accuracy", "format"]}
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", "eval", **changes)
    assert len(runs.metrics(run_dir, "sft")) == 2  # 1.5 x 6 / 4, rounded
    assert len(runs.metrics(run_dir, "grpo")) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    for row in ("base", "sft", "grpo"):
        lines = (run_dir / "eval" / row / "predictions.jsonl").read_text().splitlines()
        predictions = [json.loads(line) for line in lines]
        assert [p["id"] for p in predictions] == [f"row{i}" for i in range(6)]
        assert [p["answer"] for p in predictions] == [*"ABABAB"]
        found = summary[row]
        assert found["chance"] == 0.5
        assert found["num_samples"] == 6
        assert found["accuracy"] == sum(p["correct"] for p in predictions) / 6
        assert found["completion_length"] == pytest.approx(
            sum(p["completion_length"] for p in predictions) / 6
        )
        gallery = [
            json.loads(line) for line in (run_dir / "eval" / row / "gallery.jsonl").read_text().splitlines()
        ]
        assert [item["id"] for item in gallery] == ["row0", "row1"]
        assert all((run_dir / path).is_file() for item in gallery for path in item["images"])


def test_an_epoch_meets_every_sample_once(tmp_path, monkeypatch):
    met = []
    data = runs.write_dataset(tmp_path, 5)
    real = geo_r1.data.source.Source.draw
    monkeypatch.setattr(
        geo_r1.data.source.Source,
        "draw",
        lambda self, *args: met.append(real(self, *args).id) or real(self, *args),
    )
    changes = {"sft__data": data, "sft__epochs": 2, "sft__batch_size": 1}
    runs.train(tmp_path / "run", "sft", **changes)
    assert sorted(met[:5]) == sorted(met[5:]) == [f"row{i}" for i in range(5)]
    assert met[:5] != met[5:]


def test_tensorboard_holds_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = runs.train(tmp_path / "run", "sft", log__tensorboard=True)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("sft/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in runs.metrics(run_dir, "sft")]


def test_a_stage_cannot_be_put_before_one_that_is_done(tmp_path, capfd):
    run_dir = runs.train(tmp_path / "run", "grpo")
    assert main(runs.arguments(run_dir, "sft", "grpo")) == 2
    assert "holds grpo, which did not start from the sft" in capfd.readouterr().err
    assert not (run_dir / "models" / "sft").exists()
