"""Two ranks compute what one computes, whatever share of the batch each gets."""

import json

import pytest
import small_runs as runs

# Sums over ranks are added up in another order than sums over one batch.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
SPLITS = {
    "even": {"sft__batch_size": 4, "grpo__prompts_per_step": 2},
    "uneven": {"sft__batch_size": 5, "grpo__prompts_per_step": 3},
    "a rank with nothing": {"sft__batch_size": 1, "grpo__prompts_per_step": 1, "eval__num_samples": 1},
}
# How many micro-batches a rank packs is its own business, and packing decides what is computed how often.
OWN = ("num_micro_batches",)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_train_and_evaluate_as_one(split, tmp_path):
    changes = SPLITS[split] | {
        "rewards__functions": ["small_runs:needs_completions"],
        "grpo__loss__entropy_coef": 0.01,
    }
    one = runs.train(tmp_path / "one", "sft", "grpo", "eval", **changes)
    two = tmp_path / "two"
    done = runs.launch(runs.arguments(two, "sft", "grpo", "eval", **changes), ranks=2)
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "grpo"):
        alone, together = runs.metrics(one, stage), runs.metrics(two, stage)
        assert len(alone) == len(together) == 5
        for expected, found in zip(alone, together, strict=True):
            assert {*found} == {*expected}
            for name in {*expected} - {"stage", *OWN}:
                assert found[name] == pytest.approx(expected[name], rel=RELATIVE, abs=ABSOLUTE), (stage, name)
            assert abs(expected["loss"]) > 1e-4
            assert expected["grad_norm"] > 1e-3
    for row in ("base", "sft", "grpo"):
        for file in ("predictions.jsonl", "gallery.jsonl", "summary.json"):
            assert (one / "eval" / row / file).read_bytes() == (two / "eval" / row / file).read_bytes()
    assert json.loads((one / "summary.json").read_text()) == json.loads((two / "summary.json").read_text())


def test_a_rank_whose_rewards_are_equal_has_nothing_to_pack(tmp_path):
    changes = {"rewards__functions": ["small_runs:same_for_some_answers"], "grpo__loss__beta": 0.0}
    changes |= {"grpo__steps": 6, "model__dtype": "float64"}
    one = runs.train(tmp_path / "one", "grpo", **changes)
    two = tmp_path / "two"
    done = runs.launch(runs.arguments(two, "grpo", **changes), ranks=2)
    assert done.returncode == 0, done.stderr
    alone, together = runs.metrics(one, "grpo"), runs.metrics(two, "grpo")
    # two prompts a step: one on each rank
    assert {row["frac_reward_zero_std"] for row in together} == {0, 0.5, 1}
    for expected, found in zip(alone, together, strict=True):
        assert {*found} == {*expected}
        for name in {*expected} - {"stage"}:
            assert found[name] == pytest.approx(expected[name], rel=RELATIVE, abs=ABSOLUTE), name


def test_an_error_on_one_rank_ends_all_with_its_line(tmp_path):
    data = runs.write_dataset(tmp_path, 4)
    (tmp_path / "images" / "above2.png").unlink()
    changes = {"sft__data": data, "sft__batch_size": 2, "sft__steps": 4}
    done = runs.launch(runs.arguments(tmp_path / "run", "sft", **changes), ranks=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "geo_r1: " in line]
    [culprit] = [line for line in lines if "another rank has ended" not in line]
    assert culprit.startswith("geo_r1: sample row2: image ")
    assert culprit.endswith("above2.png does not exist")
    assert len(lines) <= 2  # the other rank says at most that it was left alone
    assert not (tmp_path / "run" / "models").exists()
