"""Ranks compute what one computes, whatever the strategy and whatever share of the batch each gets."""

import json

import forked_ranks
import pytest
import small_runs as runs
from compared_runs import RATE, RELATIVE, distances, same_metrics, same_weights
from forked_ranks import STRATEGIES

from geo_r1.data import read_samples
from geo_r1.data.source import Source

SPLITS = {
    "uneven": {"sft__batch_size": 5, "grpo__prompts_per_step": 3},
    "a rank with nothing": {"sft__batch_size": 1, "grpo__prompts_per_step": 1, "eval__num_samples": 1},
}
NUM_IMAGES = (0, 1, 6)


def mixed_data(folder):
    """A file whose rows have no image, one, or six."""
    data = runs.write_dataset(folder, 6)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    images = [image for row in rows for image in row["images"]]
    for number, row in enumerate(rows):
        count = NUM_IMAGES[number % 3]
        row["images"] = images[number : number + count]
        row["prompt"] = "Seen: " + "<image> " * count + "Same place, A or B?"
    return runs.write_rows(folder / "mixed.jsonl", rows)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_model):
    """Options of runs on mixed data, and one that one rank alone has done."""
    folder = tmp_path_factory.mktemp("mixed")
    data = mixed_data(folder)
    changes = RATE | {"sft__data": data, "grpo__data": data, "sft__steps": 10, "grpo__steps": 10}
    changes |= {"sft__batch_size": 2, "grpo__prompts_per_step": 2}
    one = folder / "one"
    forked_ranks.train(one, "sft", "grpo", strategy="one", **changes)
    return one, changes


def test_mixed_batches_are_mixed(mixed):
    """Two samples on two ranks, each on one: what there is to happen, does."""
    _, changes = mixed
    source = Source.of(read_samples(changes["sft__data"]))
    counts = [len(source.draw(position, 0).images) for position in range(20)]
    steps = [{*counts[i : i + 2]} for i in range(0, 20, 2)]
    assert {0, 6} in steps  # a rank without images beside one with many
    assert {0, 1} in steps
    assert {1, 6} in steps


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one"])
def test_every_strategy_takes_the_same_steps(strategy, mixed, tmp_path, tiny_model):
    one, changes = mixed
    forked_ranks.train(tmp_path / "run", "sft", "grpo", strategy=strategy, **changes)
    for stage in ("sft", "grpo"):
        same_metrics(tmp_path / "run", one, stage, 10)
    same_weights(tmp_path / "run", one, "sft", "grpo")
    for start, stage in ((tiny_model, "sft"), (one / "models" / "sft", "grpo")):
        moved = distances(one / "models" / stage, start)
        apart = distances(tmp_path / "run" / "models" / stage, one / "models" / stage)
        for name in moved:  # every tensor moved, and what it moved by is the same to a thousandth
            assert moved[name] > 3 * RELATIVE, name
            assert apart[name] < 1e-3 * moved[name], name


@pytest.mark.parametrize("strategy", ["ddp", "zero 3"])
def test_a_rank_may_have_no_samples(strategy, tmp_path):
    """Batches of one: with images or without, the other rank has nothing."""
    data = mixed_data(tmp_path)
    changes = RATE | SPLITS["a rank with nothing"] | {"sft__data": data, "grpo__data": data}
    for name in ("one", strategy):
        forked_ranks.train(tmp_path / name, "sft", "grpo", strategy=name, **changes)
    for stage in ("sft", "grpo"):
        same_metrics(tmp_path / strategy, tmp_path / "one", stage, 5)
    same_weights(tmp_path / strategy, tmp_path / "one", "sft", "grpo")


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_train_and_evaluate_as_one(split, tmp_path):
    changes = SPLITS[split] | {
        "rewards__functions": ["small_runs:needs_completions"],
        "grpo__loss__entropy_coef": 0.01,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    forked_ranks.train(one, "sft", "grpo", "eval", strategy="one", **changes)
    forked_ranks.train(two, "sft", "grpo", "eval", strategy="fsdp2", **changes)
    for stage in ("sft", "grpo"):
        same_metrics(two, one, stage, 5)
        for row in runs.metrics(one, stage):
            assert abs(row["loss"]) > 1e-4
            assert row["grad_norm"] > 1e-3
    for row in ("base", "sft", "grpo"):
        for file in ("predictions.jsonl", "gallery.jsonl", "summary.json"):
            assert (one / "eval" / row / file).read_bytes() == (two / "eval" / row / file).read_bytes()
    assert json.loads((one / "summary.json").read_text()) == json.loads((two / "summary.json").read_text())


def test_a_rank_whose_rewards_are_equal_has_nothing_to_pack(tmp_path):
    changes = {"rewards__functions": ["small_runs:same_for_some_answers"], "grpo__loss__beta": 0.0}
    changes |= {"grpo__steps": 6, "model__dtype": "float64"}
    for strategy in ("one", "fsdp2"):
        forked_ranks.train(tmp_path / strategy, "grpo", strategy=strategy, **changes)
    # two prompts a step: one on each rank
    rows = runs.metrics(tmp_path / "fsdp2", "grpo")
    assert {row["frac_reward_zero_std"] for row in rows} == {0, 0.5, 1}
    same_metrics(tmp_path / "fsdp2", tmp_path / "one", "grpo", 6)


def test_torchrun_starts_ranks_and_an_error_on_one_ends_all_with_its_line(tmp_path):
    data = runs.write_dataset(tmp_path, 4)
    (tmp_path / "images" / "above2.png").unlink()
    changes = {"sft__data": data, "sft__batch_size": 2, "sft__steps": 4}
    done = runs.launch(runs.arguments(tmp_path / "run", "sft", **changes), ranks=2)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if "geo_r1: " in line]
    told = line[line.index("geo_r1: ") :]
    assert told.startswith(tuple(f"geo_r1: rank {rank}: {data}, row 3: image " for rank in (0, 1)))
    assert told.endswith("above2.png does not exist")
    assert not (tmp_path / "run" / "models").exists()
