"""Rollouts ahead of their step: whose weights sample, what survives a checkpoint, a sampler that goes."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forked_ranks
import option_runs
import pytest
import small_runs as runs
import torch
from transformers import AutoConfig

import geo_r1.train.rl.rollout_engines
import geo_r1.train.stages.grpo
from geo_r1.models.lora import DOWN, UP, merged_state
from geo_r1.rollout.engine import EngineLost, WeightsLost
from geo_r1.train.__main__ import main
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.rl.rollout_engines import CopySampler, check_rollout_engine, max_model_len

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
    load, sample = CopySampler.load, CopySampler.sample

    def loads(self, tensors, **options):
        asked.append("load")
        load(self, tensors, **options)

    def samples(self, prompts, count, sampling, streams):
        asked.append([int(stream.split("/")[1]) for stream in streams])
        return sample(self, prompts, count, sampling, streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopySampler, "load", loads)
        patch.setattr(CopySampler, "sample", samples)
        yield asked


def test_the_next_step_is_sampled_with_the_weights_before_this_one_learns(tmp_path):
    with watched() as asked:
        rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **AHEAD), "grpo")
    # steps 0 and 1 by the weights at the start, step n by those before step n - 1 learns
    assert asked == ["load", [0, 1], [2, 3], "load", [4, 5], "load", [6, 7], "load", [8, 9]]
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
    assert asked == ["load", [6, 7], "load", [8, 9]]


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
    sample = CopySampler.sample

    def fails(self, *args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return sample(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopySampler, "sample", fails)
        yield calls


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("changes", [AHEAD, DYNAMIC], ids=["plain", "dynamic"])
def test_a_sampler_that_goes_loses_nothing(number, changes, tmp_path, capfd):
    whole = runs.train(tmp_path / "whole", "grpo", **changes)
    with failing(number, EngineLost("the server at http://here does not answer")):
        assert main(runs.arguments(tmp_path / "lost", "grpo", **changes)) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"geo_r1: the server at http://here does not answer(; grpo goes on after step [1-4])?", line
    )
    found = runs.train(tmp_path / "lost", "grpo", **changes)
    assert [row["step"] for row in runs.metrics(found, "grpo")] == [1, 2, 3, 4, 5]
    if number == 1:  # what it had not answered later gets newer weights, but in the first step there are none
        option_runs.assert_same_run(found, whole, "grpo")


@pytest.mark.parametrize(("staleness", "number"), [(1, 2), (1, 3), (3, 2)])
def test_a_sampler_that_goes_while_it_is_given_weights_loses_nothing(staleness, number, tmp_path, capfd):
    """By then the step's own completions are there, and have not been learnt from."""
    changes = AHEAD | {"rollout__max_staleness": staleness}
    calls, load = [], CopySampler.load

    def loads(self, tensors, **options):
        calls.append(options)
        if len(calls) == number:
            raise EngineLost("the server at http://here does not answer")
        load(self, tensors, **options)

    with pytest.MonkeyPatch.context() as patch, watched() as first:
        patch.setattr(CopySampler, "load", loads)
        assert main(runs.arguments(tmp_path / "lost", "grpo", **changes)) == 1
    assert "grpo goes on after step" in capfd.readouterr().err
    with watched() as then:
        found = runs.train(tmp_path / "lost", "grpo", **changes)
    positions = [place for entry in (*first, *then) if entry != "load" for place in entry]
    assert positions == [*range(10)]
    assert [row["step"] for row in runs.metrics(found, "grpo")] == [1, 2, 3, 4, 5]


def test_a_sampler_whose_log_probabilities_are_no_numbers_stops_the_run(tmp_path, monkeypatch, capfd):
    sample = CopySampler.sample

    def samples(self, *args):
        groups = sample(self, *args)
        return [[dataclasses.replace(c, logp=[math.nan] * len(c.logp)) for c in group] for group in groups]

    monkeypatch.setattr(CopySampler, "sample", samples)
    changes = AHEAD | {"rollout__max_mismatch": 1.5}
    assert main(runs.arguments(tmp_path / "run", "grpo", **changes)) == 2
    assert "sampling/token_mult_prob_error is nan" in capfd.readouterr().err


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_samples_ahead_too(zero_stage, tmp_path):
    pytest.importorskip("deepspeed")
    changes = {
        "rollout__max_staleness": 1,
        "grpo__num_iterations": 1,
        "grpo__steps": 2,
        "grpo__loss__beta": 0.0,
    }
    zero = {"parallel__strategy": "deepspeed", "parallel__zero_stage": zero_stage}
    one = runs.train(tmp_path / "one", "grpo", **changes)
    ended = forked_ranks.run(runs.arguments(tmp_path / "two", "grpo", **changes, **zero), 2)
    assert ended.codes == [0, 0], ended.stderr
    option_runs.assert_same_figures(tmp_path / "two", one, "grpo")


def test_a_sampler_that_lost_its_weights_gets_them_again(tmp_path):
    changes = AHEAD | {"grpo__steps": 3}
    with failing(2, WeightsLost("it was started anew")), watched() as asked:
        rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **changes), "grpo")
    assert asked == ["load", [0, 1], [2, 3], "load", [2, 3], [4, 5]]
    assert [row["sampling/staleness"] for row in rows] == [0, 0, 1]


def test_one_that_loses_them_every_time_is_given_up(tmp_path, monkeypatch, capfd):
    def lost(*_):
        raise WeightsLost("the server at http://here has other weights")

    monkeypatch.setattr(CopySampler, "sample", lost)
    assert main(runs.arguments(tmp_path / "run", "grpo", **AHEAD)) == 1
    assert "http://here has other weights" in capfd.readouterr().err


class Shared(CopySampler):
    """Stands in for a server: what rank 0 sent it lies in a folder, and every rank samples with that.

    Attributes:
        folder: has the weights, and the names of those that came with each load.
        forgets_at: the load, counted from 0, at which it is found to have been started again.
    """

    copies = "one"
    folder: Path
    forgets_at: int | None = None
    calls = 0

    def load(self, tensors, *, alpha=None):
        self.calls += 1
        if self.calls - 1 == self.forgets_at:
            self.holds_base, self.kept = False, {}
            raise WeightsLost("it has lost the base weights")
        came = {name: tensor.clone() for name, tensor in tensors}
        self.kept = self.kept | came if self.holds_base else came
        torch.save(dict(merged_state(self.kept.items(), alpha)), self.folder / "weights.pt")
        with (self.folder / "came.jsonl").open("a") as file:
            file.write(json.dumps([*came]) + "\n")
        self.holds_base = True

    def sample(self, *args):
        super().load(torch.load(self.folder / "weights.pt").items())
        return super().sample(*args)


@contextmanager
def shared_sampler(folder, forgets_at=None):
    """Runs sample with a `Shared` one."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shared, "folder", folder, raising=False)
        patch.setattr(Shared, "forgets_at", forgets_at)
        patch.setattr(geo_r1.train.rl.rollout_engines, "CopySampler", Shared)
        yield


def assert_came(folder, whole):
    """All weights came with the loads that `whole` says, with the others those of adapters alone."""
    loads = [json.loads(line) for line in (folder / "came.jsonl").read_text().splitlines()]
    plain = set(option_runs.started_from())
    assert {name for name, _ in merged_state(((n, torch.zeros(1, 1)) for n in loads[0]), 1.0)} == plain
    adapters = [name for name in loads[0] if name.endswith((DOWN, UP))]
    assert 10 < len(adapters) < len(loads[0]) / 2
    assert loads == [loads[0] if all_came else adapters for all_came in whole]


ADAPTERS = AHEAD | {"lora__rank": 4, "lora__alpha": 8.0, "lora__vision": True, "grpo__steps": 4}


@pytest.mark.parametrize("forgets_at", [None, 2])
def test_a_sampler_that_has_the_base_weights_gets_adapters_alone(forgets_at, tmp_path):
    """And the run is that of a sampler which is given merged weights every time."""
    merged = runs.train(tmp_path / "merged", "grpo", **ADAPTERS)
    with shared_sampler(tmp_path / "sampler", forgets_at):
        found = runs.train(tmp_path / "run", "grpo", **ADAPTERS)
    assert_came(tmp_path / "sampler", [True, False, forgets_at == 2])
    option_runs.assert_same_run(found, merged, "grpo")


def test_two_ranks_send_what_one_does(tmp_path):
    changes = ADAPTERS | {"grpo__prompts_per_step": 3, "grpo__steps": 3}
    one = runs.train(tmp_path / "one", "grpo", **changes)
    argv = runs.arguments(tmp_path / "two", "grpo", **changes, parallel__strategy="fsdp2")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = os.environ | address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, __file__, str(tmp_path / "sampler"), *argv]
            with (tmp_path / f"log{rank}").open("w") as log:
                own = common | {"RANK": rank, "LOCAL_RANK": rank}
                ranks.append(subprocess.Popen(command, env=own, stderr=log))
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(path.read_text() for path in tmp_path.glob("log?"))
    assert_came(tmp_path / "sampler", [True, False])
    option_runs.assert_same_figures(tmp_path / "two", one, "grpo")


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_importance_weights_reach_the_loss(kind, tmp_path, monkeypatch):
    seen, loss = [], geo_r1.train.stages.grpo.linear_grpo_loss

    def watched_loss(*args, **options):
        seen.append(options)
        return loss(*args, **options)

    monkeypatch.setattr(geo_r1.train.stages.grpo, "linear_grpo_loss", watched_loss)
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
        ({"rollout__server_url": "http://here:1"}, "server_url is for engine = vllm"),
        ({"rollout__max_model_len": 9}, "max_model_len is for engine = vllm"),
        ({"rollout__tensor_parallel_size": 2}, "tensor_parallel_size is for engine = vllm"),
        (
            {"rollout__engine": "vllm", "rollout__tensor_parallel_size": 2, "rollout__max_staleness": 1},
            "sample ahead (max_staleness) with a server, or with one copy per rank",
        ),
        ({"rollout__cuda_graphs": True, "rollout__max_staleness": 1}, "nothing may run beside a capture"),
        ({"rollout__cuda_graphs": True}, "rollout.cuda_graphs needs a GPU"),
        ({"rollout__gpu_memory": 0.5}, "gpu_memory is for engine = vllm inside the ranks"),
        ({"rollout__patience": 5}, "patience is for a server: set server_url"),
        ({"rollout__importance_cap": 3}, "importance_cap is for importance_sampling = truncate or mask"),
        (
            {"rollout__engine": "vllm", "rollout__server_url": "here:80x"},
            "like http://host:8000, not here:80x",
        ),
        ({"rollout__engine": "vllm", "rollout__server_url": "http://here:1/v1"}, "like http://host:8000"),
        ({"rollout__engine": "vllm", "rollout__server_url": "http://me:x@here:1"}, "must hold no password"),
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
    monkeypatch.setattr(geo_r1.train.rl.rollout_engines, "find_spec", lambda name: None)
    argv = runs.arguments(tmp_path / "run", "sft", "grpo", rollout__engine="vllm", **changes)
    assert main(argv) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ranks_that_engines_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(geo_r1.train.rl.rollout_engines, "find_spec", lambda name: object())
    recipe = Recipe(rollout={"engine": "vllm", "tensor_parallel_size": 2})
    check_rollout_engine(recipe, 4)
    with pytest.raises(ValueError, match="tensor_parallel_size = 2 needs a multiple of 2 ranks, there are 3"):
        check_rollout_engine(recipe, 3)


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


def test_a_server_that_is_not_there_is_said_at_once(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    changes = {
        "rollout__engine": "vllm",
        "rollout__server_url": url,
        "rollout__patience": 0.2,
        "sft__steps": 1,
    }
    assert main(runs.arguments(tmp_path / "run", "sft", "grpo", **changes)) == 1
    told = capfd.readouterr()
    first, tuned = (told.out.index(text) for text in (f"{url} does not answer yet", "sft 1/1"))
    assert first < tuned
    assert f"{url} has not answered for" in told.err and "--serve=HOST:" in told.err


if __name__ == "__main__":  # one of the ranks of test_two_ranks_send_what_one_does
    with shared_sampler(Path(sys.argv[1])):
        sys.exit(main(sys.argv[2:]))
