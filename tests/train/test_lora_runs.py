"""Low-rank adapters through the trainer: trained alone, checkpointed alone, and gone from what it leaves."""

import option_runs
import pytest
import small_runs as runs
import torch
from torch.distributed.checkpoint import FileSystemReader

import geo_r1.train.stages.grpo
from geo_r1.data import World, exemplars
from geo_r1.kernels import linear_logprob
from geo_r1.models import load_model, pack
from geo_r1.models.lora import DOWN, UP, lora_layers
from geo_r1.train.__main__ import main
from geo_r1.train.models import Models

LORA = {"lora__rank": 4, "lora__alpha": 8.0, "lora__vision": True}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONE_UPDATE = LORA | {"grpo__num_iterations": 1, "grpo__optim__schedule": "constant"}


def has_adapter(name: str, vision: bool) -> bool:
    """Whether a weight of the plain model gets one."""
    if not name.endswith(".weight") or "norm" in name:
        return False
    if name.startswith("model.visual.blocks."):
        return vision
    return name.startswith("model.language_model.layers.") and name.split(".")[-2] in TARGETS


def adapter_names(model):
    """Names of the adapters' weights in the model's state dict."""
    return {name + end for name in lora_layers(model) for end in (DOWN, UP)}


@pytest.mark.parametrize("vision", [True, False])
def test_the_weights_get_what_their_adapters_learned_and_no_other_changes(vision, tmp_path):
    run_dir = runs.train(tmp_path / "run", "sft", **LORA | {"lora__vision": vision})
    expected = {name for name in option_runs.started_from() if has_adapter(name, vision)}
    assert len(expected) > 10
    assert option_runs.changed(run_dir, "sft") == expected
    # of rank 4, as the adapters are
    before, after = option_runs.started_from(), option_runs.exported(run_dir, "sft")
    for name in expected:
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert values[3] > 1e-9 and values[4:].max() < 1e-3 * values[0], name
    losses = [row["loss"] for row in runs.metrics(run_dir, "sft")]
    assert losses[-1] < losses[0]


def test_only_adapters_are_trained(tmp_path, monkeypatch):
    policies = option_runs.watch_exports(monkeypatch)
    runs.train(tmp_path / "run", "sft", "grpo", **LORA)
    assert len(policies) == 2
    for policy in policies:
        named = dict(policy.vlm.model.named_parameters())
        trained = {name for name, parameter in named.items() if parameter.requires_grad}
        assert trained == adapter_names(policy.vlm.model)
        assert all(bool(named[name].any()) for name in trained)
    # the second stage starts from the first with adapters of its own: none on top of adapters
    assert {*dict(policies[0].vlm.model.named_parameters())} == {
        *dict(policies[1].vlm.model.named_parameters())
    }


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_checkpoint_holds_adapters_alone(stage, tmp_path, monkeypatch):
    run_dir = option_runs.stopped(tmp_path / "run", stage, 2, **LORA)
    folder = run_dir / "checkpoints" / f"{stage}-000002"
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    policies = option_runs.watch_exports(monkeypatch)
    runs.train(run_dir, stage, **LORA)
    model = policies[0].vlm.model
    names = adapter_names(model)
    entries = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"model.{name}" for name in names}
    expected |= {f"optim.{name}.{entry}" for name in names for entry in entries}
    assert {*found} == expected
    numbers = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert sum(entry.size.numel() for entry in found.values()) == 3 * numbers + len(names)


def test_a_checkpoint_is_smaller_than_a_tenth_of_the_model_s(tmp_path):
    sizes = []
    for name, options in (("whole", {}), ("lora", {"lora__rank": 1, "lora__targets": ["q_proj"]})):
        run_dir = option_runs.stopped(tmp_path / name, "sft", 2, **options)
        shards = (run_dir / "checkpoints" / "sft-000002").glob("*.distcp")
        sizes.append(sum(shard.stat().st_size for shard in shards))
    assert sizes[1] < 0.1 * sizes[0]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_transformers_computes_what_the_policy_with_adapters_does(stage, tmp_path, monkeypatch):
    policies = option_runs.watch_exports(monkeypatch)
    folder = runs.train(tmp_path / "run", stage, **LORA) / "models" / stage
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= names and not any("adapter" in name for name in names)
    prompt, response, logits_RV = option_runs.as_transformers_reads(
        folder, exemplars.chain_of_thought(World(), "test", 3)
    )
    [policy] = policies
    policy.vlm.model.eval()
    start, *_ = load_model(runs.SMALL["model.path"], torch.float32)
    with torch.no_grad():
        batch = pack([prompt], [[response]])
        own_RV, start_RV = (vlm.loss_rows(batch) @ vlm.lm_head.T for vlm in (policy.vlm, start))
    torch.testing.assert_close(logits_RV, own_RV, rtol=1e-4, atol=1e-4)
    assert (own_RV - start_RV).abs().max() > 1e-2


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_with_adapters_and_dropout_goes_on_bit_by_bit(stage, tmp_path):
    """Dropout is of supervised stages: GRPO's ratios compare like with like."""
    changes = LORA | {"lora__dropout": 0.2}
    whole = runs.train(tmp_path / "whole", stage, **changes)
    option_runs.assert_goes_on_bit_by_bit(whole, stage, 3, **changes)
    without = runs.train(tmp_path / "without", stage, **LORA)
    same = runs.weights(whole, stage) == runs.weights(without, stage)
    assert same == (stage == "grpo")


def test_the_reference_is_the_policy_without_its_adapters(tmp_path, monkeypatch):
    """No second model is loaded; after training, too, it computes what the stage started from."""
    batches, real = [], geo_r1.train.stages.grpo.share_out
    monkeypatch.setattr(
        geo_r1.train.stages.grpo, "share_out", lambda *args: batches.append(real(*args)) or batches[-1]
    )
    monkeypatch.delattr(Models, "reference")
    rows = runs.metrics(runs.train(tmp_path / "run", "grpo", **ONE_UPDATE, grpo__loss__beta=0.1), "grpo")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert all(row["kl"] > 1e-7 for row in rows[1:])
    start, *_ = load_model(runs.SMALL["model.path"], torch.float32)
    for step in (batches[0], batches[-1]):
        for batch in step.micro_batches:
            with torch.no_grad():
                rows_RC = start.loss_rows(batch)
                expected_R, _ = linear_logprob(rows_RC, start.lm_head, batch.target_R)
            torch.testing.assert_close(batch.ref_logp_R, expected_R, rtol=1e-4, atol=1e-5)


def test_two_ranks_train_adapters_as_one(tmp_path):
    changes = ONE_UPDATE | {"grpo__loss__beta": 0.1, "grpo__prompts_per_step": 3, "sft__batch_size": 5}
    one = runs.train(tmp_path / "one", "sft", "grpo", **changes)
    two = option_runs.on_two_ranks(tmp_path / "two", "sft", "grpo", **changes)
    for stage in ("sft", "grpo"):
        option_runs.assert_same_figures(two, one, stage)
        for name, tensor in option_runs.exported(two, stage).items():
            assert tensor.isfinite().all(), name
    assert option_runs.changed(two, "sft") == option_runs.changed(one, "sft")


def test_targets_that_the_model_has_not(tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "sft", lora__rank=4, lora__targets=["wqkv"])) == 2
    said = capfd.readouterr().err
    assert said.startswith("geo_r1: lora.targets names wqkv; the text layers' linear layers are q_proj, ")
    assert said.count("\n") == 1
