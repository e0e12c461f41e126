"""How samples reach the trainer: in which order, prepared by whom, and what becomes of long prompts."""

import json

import option_runs
import pytest
import small_runs as runs

import geo_r1.train.stages.grpo
import geo_r1.train.stages.sft
from geo_r1.data import World
from geo_r1.train.__main__ import main

BOTH = {"sft__steps": 3, "grpo__steps": 3}


@pytest.mark.parametrize(
    "options", [{"num_workers": 2}, {"num_workers": 1, "cache_mib": 4}, {"cache_mib": 4}]
)
def test_who_prepares_prompts_does_not_change_the_run(options, tmp_path):
    """Of a file that is gone through twice, so that a cache finds images again."""
    data = runs.write_dataset(tmp_path, 6)
    changes = {
        "sft__data": data,
        "sft__epochs": 2,
        "sft__batch_size": 3,
        "grpo__data": data,
        "grpo__epochs": 2,
    }
    here = runs.train(tmp_path / "here", "sft", "grpo", **changes)
    there = runs.train(
        tmp_path / "there", "sft", "grpo", **changes, **{f"data__{name}": n for name, n in options.items()}
    )
    for stage, num_steps in (("sft", 4), ("grpo", 6)):
        option_runs.assert_same_run(there, here, stage)
        assert len(runs.metrics(there, stage)) == num_steps


def test_workers_draw_from_the_world_what_the_rank_would(tmp_path):
    changes = BOTH | {
        "world__curriculum_start": 0.1,
        "world__curriculum_samples": 4,
        "grpo__max_resamples": 1,
    }
    changes |= {"rewards__functions": ["small_runs:same_for_some_answers"]}
    here = runs.train(tmp_path / "here", "sft", "grpo", **changes)
    there = runs.train(tmp_path / "there", "sft", "grpo", **changes, data__num_workers=2)
    for stage in ("sft", "grpo"):
        option_runs.assert_same_run(there, here, stage)


def test_workers_go_on_where_they_stopped(tmp_path):
    whole = runs.train(tmp_path / "whole", "sft", data__num_workers=1)
    option_runs.assert_goes_on_bit_by_bit(whole, "sft", 3, data__num_workers=1)


def watch_groups(monkeypatch) -> list:
    """The groups of every step from now on."""
    steps = []
    for module in (geo_r1.train.stages.sft, geo_r1.train.stages.grpo):
        real = module.share_out

        def share_out(policy, groups, *args, real=real):
            steps.append(groups)
            return real(policy, groups, *args)

        monkeypatch.setattr(module, "share_out", share_out)
    return steps


@pytest.fixture
def one_long_prompt(tmp_path):
    """Four samples, of which the second has a longer text than the others."""
    text = "Ground: <image> Above: <image> " + "Same place, same place, same place, A or B?" * 3
    return runs.write_dataset(tmp_path, 4, prompt=text)


def of_file(data) -> dict:
    changes = {"sft__data": data, "sft__steps": 2, "sft__batch_size": 4, "grpo__data": data, "grpo__steps": 2}
    return changes | {"grpo__prompts_per_step": 4, "eval__data": data}


def prompt_lengths(steps) -> list[dict[str, int]]:
    return [{g.prompt.sample_id: len(g.prompt.token_ids) for g in groups} for groups in steps]


def test_prompts_that_are_too_long_are_left_out(one_long_prompt, tmp_path, monkeypatch, capfd):
    steps, changes = watch_groups(monkeypatch), of_file(one_long_prompt)
    every = runs.train(tmp_path / "every", "sft", **changes)
    lengths = prompt_lengths(steps)[0]
    assert lengths["row1"] > lengths["row0"] == lengths["row2"] == lengths["row3"]
    assert all("num_skipped" not in row for row in runs.metrics(every, "sft"))

    limit = {"data__max_prompt_tokens": lengths["row0"]}
    assert main(runs.arguments(tmp_path / "error", "sft", **changes, **limit)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("geo_r1: ")]
    expected = (
        f"geo_r1: sample row1: the prompt has {lengths['row1']} tokens, 6 of them images; the budget is "
    )
    assert len(said) == 1 and said[0].startswith(expected + str(lengths["row0"]))

    steps.clear()
    some = runs.train(tmp_path / "some", "sft", "grpo", **changes, **limit, data__on_overlong="skip")
    assert len(steps) == 4
    left = {name: length for name, length in lengths.items() if name != "row1"}
    assert prompt_lengths(steps) == [left] * 4
    for row, full in zip(runs.metrics(some, "sft"), runs.metrics(every, "sft"), strict=True):
        assert row["num_skipped"] == 1
        assert 0 < row["num_tokens"] < full["num_tokens"]


def test_resampling_replaces_what_was_left_out(one_long_prompt, tmp_path, monkeypatch):
    steps, changes = watch_groups(monkeypatch), of_file(one_long_prompt)
    runs.train(tmp_path / "every", "sft", **changes)
    limit = {"data__max_prompt_tokens": prompt_lengths(steps)[0]["row0"], "data__on_overlong": "skip"}
    run_dir = runs.train(tmp_path / "run", "grpo", **changes, **limit, grpo__max_resamples=3)
    for row in runs.metrics(run_dir, "grpo"):
        assert (row["sampling/kept_groups"], row["sampling/groups"]) == (4, 4)


def test_images_of_prompts_that_are_too_long_are_shrunk(one_long_prompt, tmp_path, monkeypatch):
    steps, changes = watch_groups(monkeypatch), of_file(one_long_prompt)
    runs.train(tmp_path / "every", "sft", **changes)
    lengths = prompt_lengths(steps)[0]
    steps.clear()
    limit = {"data__max_prompt_tokens": lengths["row1"] - 2, "data__on_overlong": "resize"}
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", **changes, **limit)
    assert len(steps) == 4
    for groups in steps:
        tokens = {g.prompt.sample_id: len(g.prompt.image_rows) for g in groups}
        assert tokens.pop("row1") <= 4 and tokens == {"row0": 6, "row2": 6, "row3": 6}
        assert all(len(w.prompt.token_ids) <= lengths["row1"] - 2 for w in groups)
    assert all("num_skipped" not in row for row in runs.metrics(run_dir, "sft"))


def test_difficulty_rises_with_the_prompts_drawn(tmp_path, monkeypatch):
    met, real = {}, World.pairing

    def pairing(self, split, index, difficulty=None):
        if split == "train" and index >= 2_000_000:  # GRPO's
            met[index - 2_000_000] = difficulty
        return real(self, split, index, difficulty)

    monkeypatch.setattr(World, "pairing", pairing)
    changes = {"world__difficulty": 0.8, "world__curriculum_start": 0.2, "world__curriculum_samples": 6}
    runs.train(tmp_path / "run", "grpo", **changes)
    rising = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert [*map(met.get, range(10))] == pytest.approx([*rising, 0.8, 0.8, 0.8, 0.8])


def test_the_first_epoch_of_a_file_goes_from_easy_to_hard(tmp_path, monkeypatch):
    data = runs.write_dataset(tmp_path, 6)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    hard = dict(zip((row["id"] for row in rows), (3, 0, 5, 1, 4, 2), strict=True))
    runs.write_rows(data, [row | {"difficulty": hard[row["id"]]} for row in rows])
    steps = watch_groups(monkeypatch)
    changes = {"sft__data": data, "sft__epochs": 2, "sft__batch_size": 1, "data__curriculum": True}
    runs.train(tmp_path / "run", "sft", **changes)
    order = [hard[w.prompt.sample_id] for [w] in steps]
    assert order[:6] == [*range(6)]
    assert order[6:] != order[:6] and sorted(order[6:]) == [*range(6)]


def test_a_curriculum_does_not_start_above_its_end(tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "grpo", world__curriculum_start=0.9)) == 2
    said = capfd.readouterr().err
    assert said == "geo_r1: world.curriculum_start must be 0 to world.difficulty = 0.8, got 0.9\n"


@pytest.mark.parametrize("name", ["lmms-lab/multimodal-open-r1", "hf://datasets/a/multimodal-open-r1"])
def test_a_data_set_of_the_hub_is_told_how_to_become_a_file(name, tmp_path, capsys):
    assert main(runs.arguments(tmp_path / "run", "grpo", grpo__data=name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    whole = name.removeprefix("hf://datasets/")
    assert line.startswith(f"geo_r1: grpo.data: no file {name}. A data set of the hub becomes one by: python")
    assert f"load_dataset('{whole}', split='train').to_parquet('multimodal-open-r1.parquet')" in line


@pytest.mark.parametrize("name", ["folder/rows.jsonl", "rows.parquet"])
def test_a_file_that_is_missing_is_no_data_set_of_the_hub(name, tmp_path, capsys):
    assert main(runs.arguments(tmp_path / "run", "grpo", grpo__data=name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} does not exist" in line and "hub" not in line
