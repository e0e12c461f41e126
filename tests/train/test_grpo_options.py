"""GRPO's options: groups that are replaced, completions that are masked, a reference that moves."""

import dataclasses
import json

import option_runs
import pytest
import small_runs as runs
import torch

import geo_r1.train.rl.rollout_engines
import geo_r1.train.stages.grpo
from geo_r1.data import World, exemplars
from geo_r1.data.source import Source
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.rl.groups import GroupCollector

DYNAMIC = {
    "rewards__functions": ["small_runs:same_for_some_answers"],
    "grpo__loss__beta": 0.0,
    "model__dtype": "float64",
}


def expected_sampling(num_steps: int, wanted: int, rounds: int):
    """Positions of each step's rounds, and how many groups of each step are kept: those of C, D and E."""
    source = Source(exemplars.Numbered(exemplars.question, World(), "train", 2_000_000), None)
    drawn, rounds_of, kept_of = 0, [], []
    for _ in range(num_steps):
        kept = 0
        rounds_of.append([])
        for _ in range(rounds):
            rounds_of[-1].append([*range(drawn, drawn + wanted - kept)])
            drawn += wanted - kept
            kept += sum(source.draw(position, 0).answer not in "AB" for position in rounds_of[-1][-1])
            if kept == wanted:
                break
        kept_of.append(kept)
    return rounds_of, kept_of


@pytest.mark.parametrize("resamples", [1, 4])
def test_groups_with_equal_rewards_are_replaced(resamples, tmp_path, monkeypatch):
    asked, updates = [], []
    scored, parts = GroupCollector._scored, geo_r1.train.stages.grpo.contributing_parts
    monkeypatch.setattr(
        GroupCollector,
        "_scored",
        lambda self, groups, *args: (
            asked.append([group.position for group in groups]) or scored(self, groups, *args)
        ),
    )
    monkeypatch.setattr(
        geo_r1.train.stages.grpo,
        "contributing_parts",
        lambda *args: updates.append(args[1]) or parts(*args),
    )
    run_dir = runs.train(tmp_path / "run", "grpo", **DYNAMIC, grpo__max_resamples=resamples)
    rounds, kept = expected_sampling(5, 2, 1 + resamples)
    assert asked == [positions for step in rounds for positions in step]
    assert 1 < max(map(len, rounds)) <= 1 + resamples
    assert (min(kept) < 2) == (resamples == 1)  # the limit is met with one, and never with four
    rows = runs.metrics(run_dir, "grpo")
    assert [row["sampling/groups"] for row in rows] == [sum(map(len, step)) for step in rounds]
    assert [row["sampling/kept_groups"] for row in rows] == kept
    assert [len(groups) for groups in updates] == kept
    assert all(group.reward_std > 0 for groups in updates for group in groups)
    for row, count in zip(rows, kept, strict=True):
        assert row["frac_reward_zero_std"] == pytest.approx(1 - count / row["sampling/groups"])


def test_dynamic_sampling_goes_on_where_it_stopped(tmp_path):
    changes = DYNAMIC | {"grpo__max_resamples": 4}
    whole = runs.train(tmp_path / "whole", "grpo", **changes)
    option_runs.assert_goes_on_bit_by_bit(whole, "grpo", 3, **changes)


def test_the_cursor_is_in_the_checkpoint(tmp_path):
    run_dir = option_runs.stopped(tmp_path / "run", "grpo", 3, **DYNAMIC, grpo__max_resamples=4)
    rounds, _ = expected_sampling(3, 2, 5)
    state = json.loads((run_dir / "checkpoints" / "grpo-000003" / "trainer.json").read_text())
    assert state["trainer"] == {"step": 3, "drawn": rounds[-1][-1][-1] + 1, "bad_steps": 0, "pending": []}
    assert state["trainer"]["drawn"] > 3 * 2


def test_without_it_groups_stay_as_they_are(tmp_path):
    rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **DYNAMIC), "grpo")
    assert all("sampling/groups" not in row for row in rows)
    assert max(row["frac_reward_zero_std"] for row in rows) > 0


def test_steps_without_any_signal_change_nothing(tmp_path):
    changes = {"rewards__functions": ["option_runs:equal_rewards"], "grpo__loss__beta": 0.0}
    changes |= {"grpo__steps": 2, "grpo__max_resamples": 2}
    run_dir = runs.train(tmp_path / "one", "grpo", **changes)
    two = option_runs.on_two_ranks(tmp_path / "two", "grpo", **changes)
    for row in (*runs.metrics(run_dir, "grpo"), *runs.metrics(two, "grpo")):
        assert (row["sampling/groups"], row["sampling/kept_groups"]) == (6, 0)
        assert (row["reward"], row["reward_std"], row["frac_reward_zero_std"]) == (0.5, 0, 1)
        assert (row["loss"], row["grad_norm"]) == (0, 0)
        assert "completions/mean_length" not in row
    assert option_runs.changed(run_dir, "grpo") == option_runs.changed(two, "grpo") == set()


def test_two_ranks_replace_the_groups_that_one_does(tmp_path):
    changes = DYNAMIC | {"grpo__max_resamples": 2, "grpo__prompts_per_step": 3}
    one = runs.train(tmp_path / "one", "grpo", **changes)
    two = option_runs.on_two_ranks(tmp_path / "two", "grpo", **changes)
    option_runs.assert_same_figures(two, one, "grpo")
    assert max(row["sampling/groups"] for row in runs.metrics(one, "grpo")) > 3


def set_endings(monkeypatch, *ended):
    """Say which of each group's four completions ended by themselves."""
    real = geo_r1.train.rl.rollout_engines.generate

    def generate(*args, **options):
        groups = real(*args, **options)
        return [
            [dataclasses.replace(c, ended=e) for c, e in zip(group, ended, strict=True)] for group in groups
        ]

    monkeypatch.setattr(geo_r1.train.rl.rollout_engines, "generate", generate)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_truncated_completions_do_not_reach_the_gradient(loss, tmp_path, monkeypatch):
    set_endings(monkeypatch, False, True, False, True)
    seen = []
    real = geo_r1.train.stages.grpo.share_out

    def share_out(policy, groups, *args):
        seen.append((groups, real(policy, groups, *args)))
        return seen[-1][1]

    monkeypatch.setattr(geo_r1.train.stages.grpo, "share_out", share_out)
    rows = {}
    for mask in (False, True):
        changes = {"grpo__mask_truncated": mask, "grpo__steps": 1, "grpo__loss__type": loss}
        [rows[mask]] = runs.metrics(runs.train(tmp_path / str(mask), "grpo", **changes), "grpo")
    (every, all_batches), (whole, batches) = seen
    assert [len(group.completions) for group in every] == [4, 4]
    # advantages are those of the whole group: what was cut off counts in its mean
    for group, masked in zip(every, whole, strict=True):
        assert masked.completions == group.completions[1::2]
        assert torch.equal(masked.advantage_N, group.advantage_N[1::2])
    lengths = [length for group in whole for length in group.completion_len]
    [batch], [unmasked] = batches.micro_batches, all_batches.micro_batches
    assert batch.completion_len == lengths
    a_token = {
        "dapo": [1 / sum(lengths)] * sum(lengths),
        "grpo": [1 / (4 * n) for n in lengths for _ in range(n)],
        "dr_grpo": [1 / (4 * 16)] * sum(lengths),
    }[loss]
    assert batch.token_weight_R.tolist() == pytest.approx(a_token)
    assert len(unmasked.token_weight_R) > len(batch.token_weight_R)
    assert rows[True]["completions/clipped_ratio"] == 0.5
    assert rows[True]["completions/dropped_zero_advantage"] == 4
    assert rows[False]["completions/dropped_zero_advantage"] == 0
    assert rows[True]["reward"] == rows[False]["reward"]
    assert rows[True]["tokens/computed"] < rows[False]["tokens/computed"]
    assert rows[True]["grad_norm"] != pytest.approx(rows[False]["grad_norm"], rel=1e-3)


def test_where_all_are_truncated_nothing_is_learned(tmp_path, monkeypatch):
    set_endings(monkeypatch, False, False, False, False)
    run_dir = runs.train(tmp_path / "run", "grpo", grpo__mask_truncated=True, grpo__steps=2)
    for row in runs.metrics(run_dir, "grpo"):
        assert row["completions/clipped_ratio"] == 1
        assert (row["loss"], row["grad_norm"], row["tokens/computed"]) == (0, 0, 0)
    assert option_runs.changed(run_dir, "grpo") == set()


SYNCED = {"grpo__num_iterations": 1, "grpo__optim__schedule": "constant", "grpo__reference__sync_steps": 2}


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.full_tensors()}


def test_the_reference_moves_as_the_formula_says(tmp_path, monkeypatch):
    moves, real = [], Policy.move_towards

    def move_towards(self, other, share):
        before = weights_of(self)
        real(self, other, share)
        moves.append((before, weights_of(other), weights_of(self), share))

    monkeypatch.setattr(Policy, "move_towards", move_towards)
    changes = SYNCED | {"grpo__reference__sync_share": 0.75}
    runs.train(tmp_path / "run", "grpo", **changes)
    start = option_runs.started_from()
    assert len(moves) == 2  # after the steps 2 and 4 of 5
    for before, policy, after, share in moves:
        assert share == 0.75
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, 0.75 * policy[name] + 0.25 * before[name], msg=name)
    (first, policy, once, _), (again, later, *_) = moves
    assert all(torch.equal(tensor, start[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, once[name]) for name, tensor in again.items())
    assert any(not torch.equal(tensor, later[name]) for name, tensor in policy.items())


def test_the_kl_falls_where_the_reference_has_moved(tmp_path):
    kl = {}
    for steps, share in ((0, 0.6), (2, 0.6), (2, 1.0)):
        changes = SYNCED | {"grpo__reference__sync_steps": steps, "grpo__reference__sync_share": share}
        run_dir = runs.train(tmp_path / f"{steps}-{share}", "grpo", **changes)
        kl[steps, share] = [row["kl"] for row in runs.metrics(run_dir, "grpo")]
    still, part, whole = kl.values()
    assert still[:2] == part[:2] == whole[:2]
    assert still[0] == pytest.approx(0, abs=1e-9) and min(still[1:]) > 1e-6
    # a policy that is its own reference again, and one that is nearer to it than it was
    assert whole[2] == pytest.approx(0, abs=1e-9) and whole[4] == pytest.approx(0, abs=1e-9)
    assert 0 < part[2] < 0.5 * still[2]


def test_a_moved_reference_goes_on_bit_by_bit(tmp_path):
    whole = runs.train(tmp_path / "whole", "grpo", **SYNCED)
    option_runs.assert_goes_on_bit_by_bit(whole, "grpo", 3, **SYNCED)
