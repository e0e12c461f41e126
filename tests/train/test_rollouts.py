"""Rollouts ahead of their step: whose weights sample, what survives a checkpoint, a sampler that goes."""

import json
import math
import os
from contextlib import contextmanager

import option_runs
import pytest
import small_runs as runs
from transformers import AutoConfig

import geo_r1.train.grpo
import geo_r1.train.samplers
import geo_r1.train.serve
from geo_r1.rollout.engine import EngineLost, WeightsLost
from geo_r1.train.__main__ import main
from geo_r1.train.config import Recipe
from geo_r1.train.samplers import Copy, check_sampler, max_model_len

AHEAD = {"rollout__max_staleness": 1, "grpo__num_iterations": 1, "model__dtype": "float64"}
DYNAMIC = AHEAD | {
    "rewards__functions": ["small_runs:same_for_some_answers"],
    "grpo__max_resamples": 3,
    "grpo__loss__beta": 0.0,
}


# The sampler never says a vision token; a model that knows nothing yet gives each of the four its even share.
FORBIDDEN = 0.012


@contextmanager
def watched():
    """What a sampler of its own is asked, in order: "load", or the streams of the prompts."""
    asked = []
    load, sample = Copy.load, Copy.sample

    def loads(self, tensors):
        asked.append("load")
        load(self, tensors)

    def samples(self, prompts, count, sampling, streams):
        asked.append([int(stream.split("/")[1]) for stream in streams])
        return sample(self, prompts, count, sampling, streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copy, "load", loads)
        patch.setattr(Copy, "sample", samples)
        yield asked


def test_the_next_step_is_sampled_with_the_weights_before_this_one_learns(tmp_path):
    with watched() as asked:
        rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **AHEAD), "grpo")
    # steps 0 and 1 by the weights at the start, step n by those before step n - 1 learns
    assert asked == ["load", [0, 1], [2, 3], "load", [4, 5], "load", [6, 7], "load", [8, 9], "load"]
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 1, 1, 1]
    apart = [row["sampling/logp_difference/mean"] for row in rows]
    assert apart[0] < FORBIDDEN < 2 * FORBIDDEN < min(apart[1:4])


def test_never_more_updates_behind_than_allowed(tmp_path):
    changes = AHEAD | {"rollout__max_staleness": 3, "grpo__steps": 8}
    with watched() as asked:
        rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **changes), "grpo")
    assert [entry for entry in asked if entry != "load"] == [[2 * i, 2 * i + 1] for i in range(8)]
    ages = [row["sampling/staleness"] for row in rows]
    assert ages[:4] == [0, 1, 2, 3] and max(ages) <= 3


def test_a_step_that_waits_has_nearly_the_policys_own_log_probabilities(tmp_path):
    rows = runs.metrics(runs.train(tmp_path / "run", "grpo", model__dtype="float64"), "grpo")
    for row in rows:
        mean, largest = row["sampling/logp_difference/mean"], row["sampling/logp_difference/max"]
        assert mean < FORBIDDEN and mean <= largest < 1.5 * FORBIDDEN
        assert row["sampling/token_mult_prob_error"] == pytest.approx(math.exp(mean), abs=1e-5)
        assert "sampling/staleness" not in row


@pytest.mark.parametrize("changes", [AHEAD, DYNAMIC], ids=["plain", "dynamic"])
def test_pending_rollouts_survive_a_checkpoint(changes, tmp_path):
    whole = runs.train(tmp_path / "whole", "grpo", **changes)
    option_runs.assert_goes_on_bit_by_bit(whole, "grpo", 3, **changes)


def test_a_checkpoint_holds_what_was_sampled_ahead(tmp_path):
    run_dir = option_runs.stopped(tmp_path / "run", "grpo", 2, **AHEAD)
    state = json.loads((run_dir / "checkpoints" / "grpo-000002" / "trainer.json").read_text())["trainer"]
    [draw] = state["pending"]
    assert (draw["step"], draw["version"], draw["positions"], state["drawn"]) == (2, 1, [4, 5], 6)
    assert {place: len(group) for place, group in draw["answers"].items()} == {"4": 4, "5": 4}
    with watched() as asked:
        runs.train(run_dir, "grpo", **AHEAD)
    assert asked == ["load", [6, 7], "load", [8, 9], "load"]


def test_two_ranks_and_one_sample_the_same_ahead(tmp_path):
    changes = AHEAD | {"grpo__prompts_per_step": 3, "grpo__steps": 3}
    one = runs.train(tmp_path / "one", "grpo", **changes)
    two = option_runs.on_two_ranks(tmp_path / "two", "grpo", **changes)
    option_runs.assert_same_figures(two, one, "grpo")
    assert runs.metrics(two, "grpo")[-1]["sampling/staleness"] == 1


def test_two_ranks_go_on_with_what_one_sampled_ahead(tmp_path):
    changes = AHEAD | {"grpo__prompts_per_step": 3, "grpo__steps": 3}
    whole = runs.train(tmp_path / "whole", "grpo", **changes)
    run_dir = option_runs.stopped(tmp_path / "stopped", "grpo", 2, **changes)
    option_runs.assert_same_figures(option_runs.on_two_ranks(run_dir, "grpo", **changes), whole, "grpo")


@contextmanager
def failing(number, error):
    """The n-th call of a sampler of its own fails, in another way than by an answer."""
    calls = []
    sample = Copy.sample

    def fails(self, *args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return sample(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copy, "sample", fails)
        yield calls


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("changes", [AHEAD, DYNAMIC], ids=["plain", "dynamic"])
def test_a_sampler_that_goes_loses_nothing(number, changes, tmp_path, capfd):
    whole = runs.train(tmp_path / "whole", "grpo", **changes)
    with failing(number, EngineLost("the server at http://here does not answer")):
        assert main(runs.arguments(tmp_path / "lost", "grpo", **changes)) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("geo_r1: the server at http://here does not answer; grpo goes on after step ")
    found = runs.train(tmp_path / "lost", "grpo", **changes)
    assert [row["step"] for row in runs.metrics(found, "grpo")] == [1, 2, 3, 4, 5]
    if number == 1:  # what it had not answered later gets newer weights, but in the first step there are none
        option_runs.assert_same_run(found, whole, "grpo")


def test_a_sampler_that_lost_its_weights_gets_them_again(tmp_path):
    changes = AHEAD | {"grpo__steps": 3}
    with failing(2, WeightsLost("it was started anew")), watched() as asked:
        rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **changes), "grpo")
    assert asked == ["load", [0, 1], [2, 3], "load", [2, 3], [4, 5], "load"]
    assert [row["sampling/staleness"] for row in rows] == [0, 0, 1]


def test_one_that_loses_them_every_time_is_given_up(tmp_path, monkeypatch, capfd):
    def lost(*_):
        raise WeightsLost("the server at http://here has other weights")

    monkeypatch.setattr(Copy, "sample", lost)
    assert main(runs.arguments(tmp_path / "run", "grpo", **AHEAD)) == 2
    assert "http://here has other weights" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_importance_weights_reach_the_loss(kind, tmp_path, monkeypatch):
    seen, loss = [], geo_r1.train.grpo.linear_grpo_loss

    def watched_loss(*args, **options):
        seen.append(options)
        return loss(*args, **options)

    monkeypatch.setattr(geo_r1.train.grpo, "linear_grpo_loss", watched_loss)
    changes = {"rollout__importance_sampling": kind, "rollout__importance_cap": 1.02, "grpo__loss__beta": 0.0}
    rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **AHEAD, **changes), "grpo")
    assert rows[0]["sampling/importance_weight/mean"] == pytest.approx(1, abs=FORBIDDEN)
    for row, options in zip(rows, seen, strict=True):
        weight = options["importance_weight_R"]
        assert options["old_logp_R"] is None
        assert row["sampling/importance_weight/mean"] == pytest.approx(weight.double().mean().item())
        bounded = (weight == 1.02) | (weight == 0)
        assert row["sampling/importance_weight/bounded"] == pytest.approx(bounded.double().mean().item())
        assert weight.max() <= 1.02
    kept = seen[-1]["importance_weight_R"]
    assert rows[-1]["sampling/importance_weight/bounded"] > 0
    assert bool((kept == 0).any()) == (kind == "mask")
    assert bool((kept == 1.02).any()) == (kind == "truncate")


def test_a_mismatch_above_the_limit_stops_the_run_before_its_update(tmp_path, capfd):
    changes = AHEAD | {"rollout__max_mismatch": 1.02}
    assert main(runs.arguments(tmp_path / "run", "grpo", **changes)) == 2
    message = capfd.readouterr().err
    assert message.startswith("geo_r1: grpo step 2: sampling/token_mult_prob_error is 1.0")
    assert "rollout.max_mismatch is 1.02" in message
    assert len(runs.metrics(tmp_path / "run", "grpo")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__server_url": "http://here:1"}, "server_url is for engine = vllm, not native"),
        ({"rollout__max_model_len": 9}, "max_model_len is for engine = vllm, not native"),
        ({"rollout__tensor_parallel_size": 2}, "tensor_parallel_size is for vllm inside the ranks"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(changes, message, tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "grpo", **changes)) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dtype": "float64"}, "vLLM computes in float32 or bfloat16, not in model.dtype = float64"),
        ({"rollout__temperature": 3.0}, "vLLM samples at temperature 0 or 0.01 to 2.0, not 3.0"),
        ({}, "rollout.engine = vllm needs vLLM: pip install '.[vllm]'"),
    ],
)
def test_what_vllm_cannot_do_is_said_before_anything_is_trained(
    changes, message, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(geo_r1.train.samplers, "find_spec", lambda name: None)
    argv = runs.arguments(tmp_path / "run", "sft", "grpo", rollout__engine="vllm", **changes)
    assert main(argv) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ranks_that_engines_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(geo_r1.train.samplers, "find_spec", lambda name: object())
    recipe = Recipe(rollout={"engine": "vllm", "tensor_parallel_size": 2})
    check_sampler(recipe, 4)
    with pytest.raises(ValueError, match="tensor_parallel_size = 2 does not divide the 3 ranks"):
        check_sampler(recipe, 3)


@pytest.mark.parametrize(
    ("rollout", "data", "length"),
    [
        ({}, {}, 4096),
        ({}, {"max_prompt_tokens": 300}, 556),
        ({}, {"max_prompt_tokens": 4000}, 4096),
        ({"max_model_len": 777}, {"max_prompt_tokens": 300}, 777),
    ],
)
def test_how_long_vllm_has_to_be_ready_for(rollout, data, length, tiny_model):
    recipe = Recipe(rollout={"engine": "vllm", **rollout}, data=data)
    assert max_model_len(recipe, AutoConfig.from_pretrained(tiny_model)) == length


def test_a_server_is_not_started_where_vllm_is_not(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(geo_r1.train.serve, "find_spec", lambda name: None)
    assert main([*runs.arguments(tmp_path / "run", "grpo"), "--serve"]) == 2
    assert "there is no vLLM beside geo_r1 here" in capfd.readouterr().err
    assert main([*runs.arguments(tmp_path / "run", "grpo"), "--serve=x"]) == 2
    assert "--serve takes a number, such as --serve=8, not x" in capfd.readouterr().err


def test_a_server_is_vllms_own_with_the_recipes_model_but_no_weights(tmp_path, capfd, monkeypatch):
    became = []
    monkeypatch.setattr(geo_r1.train.serve, "find_spec", lambda name: object())
    monkeypatch.setattr(
        os, "execve", lambda *command: became.append(command) or (_ for _ in ()).throw(SystemExit)
    )
    with pytest.raises(SystemExit):
        main([*runs.arguments(tmp_path / "run", "grpo", data__max_prompt_tokens=300), "--serve=9000"])
    [(_, command, environment)] = became
    folder = tmp_path / "run-server"
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert command[command.index("--port") + 1] == "9000"
    assert command[command.index("--max-model-len") + 1] == str(300 + 16)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
    }
    assert not [*folder.glob("*.safetensors")]
    assert "vllm serve" in capfd.readouterr().out
