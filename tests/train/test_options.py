"""What is trained, at which rate, in what memory and precision: each option through small runs."""

import shutil
import warnings
from pathlib import Path

import option_runs
import pytest
import small_runs as runs
import torch

from geo_r1.models import PackedVLM, memory
from geo_r1.train.__main__ import main

PARTS = {"vision", "projector", "text"}
FROZEN = [
    ("vision",),
    ("projector",),
    ("text",),
    ("vision", "projector"),
    ("vision", "text"),
    ("projector", "text"),
]


@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_frozen_parts_stay_bit_by_bit(frozen, tmp_path):
    run_dir = runs.train(tmp_path / "run", "sft", sft__freeze=[*frozen], sft__steps=2)
    changed = option_runs.changed(run_dir, "sft")
    expected = {name for name in option_runs.started_from() if option_runs.part_of(name) not in frozen}
    assert changed == expected
    assert {option_runs.part_of(name) for name in changed} == PARTS - {*frozen}


def test_grpo_freezes_for_itself(tmp_path):
    """What one stage freezes, the next may train."""
    changes = {
        "sft__freeze": ["text"],
        "grpo__freeze": ["vision", "projector"],
        "sft__steps": 2,
        "grpo__steps": 2,
    }
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", **changes)
    assert {option_runs.part_of(name) for name in option_runs.changed(run_dir, "sft")} == PARTS - {"text"}
    before, after = option_runs.exported(run_dir, "sft"), option_runs.exported(run_dir, "grpo")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {option_runs.part_of(name) for name in changed} == {"text"}


def test_there_has_to_be_something_to_train(tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "sft", sft__freeze=["text", "vision", "projector"])) == 2
    said = capfd.readouterr().err
    assert said == "geo_r1: freeze = ['text', 'vision', 'projector'] leaves nothing to train\n"


@pytest.mark.parametrize(("lr", "vision_lr"), [(1e-6, 1e-3), (1e-3, 1e-6)])
def test_the_tower_moves_at_its_own_rate(lr, vision_lr, tmp_path):
    """Adam's first step moves a weight by its rate, wherever its gradient is not tiny."""
    changes = {"sft__optim__lr": lr, "sft__optim__vision_lr": vision_lr, "sft__steps": 1}
    run_dir = runs.train(tmp_path / "run", "sft", **changes, model__dtype="float64")
    before, after = option_runs.started_from(), option_runs.exported(run_dir, "sft")
    moved = dict.fromkeys(PARTS, 0.0)
    for name, tensor in after.items():
        part = option_runs.part_of(name)
        moved[part] = max(moved[part], (tensor.double() - before[name].double()).abs().max().item())
    assert moved == pytest.approx({"text": lr, "vision": vision_lr, "projector": vision_lr}, rel=1e-2)
    assert runs.metrics(run_dir, "sft")[0]["learning_rate"] == lr


def test_both_rates_follow_one_schedule(tmp_path):
    """Where the tower's own rate is that of the rest, it is as if there were none."""
    rates = {"sft__optim__lr": 1e-3, "sft__optim__schedule": "linear", "sft__optim__warmup_ratio": 0.4}
    one = runs.train(tmp_path / "one", "sft", **rates)
    two = runs.train(tmp_path / "two", "sft", **rates, sft__optim__vision_lr=1e-3)
    option_runs.assert_same_run(two, one, "sft")
    found = [row["learning_rate"] for row in runs.metrics(two, "sft")]
    assert found == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize(
    ("kind", "offload"),
    [("selective", False), ("full", False), ("none", True), ("selective", True), ("full", True)],
)
def test_less_memory_gives_the_same_run(kind, offload, tmp_path, monkeypatch):
    changes = {"sft__steps": 2, "grpo__steps": 2}
    plain = runs.train(tmp_path / "plain", "sft", "grpo", **changes)
    policies, hosts = option_runs.watch_exports(monkeypatch), []
    start = memory.HostMemory.__init__

    def small_tensors_too(self, model):
        start(self, model)
        self.smallest = 1
        hosts.append(self)

    monkeypatch.setattr(memory.HostMemory, "__init__", small_tensors_too)
    changes |= {"model__checkpointing": kind, "model__offload_activations": offload}
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", **changes)
    for stage in ("sft", "grpo"):
        option_runs.assert_same_figures(run_dir, plain, stage, 1e-5)
    assert [p.vlm.checkpointing for p in policies] == [kind] * 2
    assert len(hosts) == 2 * offload
    assert all(host.num_packed == host.num_unpacked > 0 for host in hosts)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
def test_compiled_layers_give_the_same_run(tmp_path, monkeypatch):
    compiled = []
    real = PackedVLM.compile_layers
    monkeypatch.setattr(
        PackedVLM, "compile_layers", lambda vlm: (compiled.append(len(vlm.layers)), real(vlm))
    )
    changes = {"sft__steps": 1, "sft__batch_size": 2}
    plain = runs.train(tmp_path / "plain", "sft", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        run_dir = runs.train(tmp_path / "run", "sft", **changes, model__compile=True)
    torch.compiler.reset()
    option_runs.assert_same_figures(run_dir, plain, "sft", 1e-5)
    assert len(compiled) == 1 and compiled[0] > 2


def test_weights_in_bfloat16_learn(tmp_path, monkeypatch):
    """Rounded by lot and by the number of the step, so a run that goes on rounds as one that did not stop."""
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")  # torchao compiles its update: seconds a shape on a CPU
    policies = option_runs.watch_exports(monkeypatch)
    changes = {"sft__data": runs.write_dataset(tmp_path, 2), "sft__batch_size": 2, "sft__steps": 12}
    changes |= {"sft__optim__optimizer": "adamw_bf16", "sft__optim__lr": 5e-3, "model__dtype": "bfloat16"}
    try:
        whole = runs.train(tmp_path / "whole", "sft", **changes)
        option_runs.assert_goes_on_bit_by_bit(whole, "sft", 5, **changes)
    finally:
        torch.compiler.set_stance("default")
    assert {p.dtype for policy in policies for p in policy.parameters} == {torch.bfloat16}
    assert {tensor.dtype for tensor in option_runs.exported(whole, "sft").values()} == {torch.bfloat16}
    losses = [row["loss"] for row in runs.metrics(whole, "sft")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def qwen3_vl(tmp_path, monkeypatch):
    """A folder of a random Qwen3-VL, as small as the other model of these tests."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "models")
    from vlm_cases import Lab

    lab = Lab("qwen3_vl")
    for piece in (lab.own.float(), lab.tokenizer, lab.image_processor):
        piece.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_qwen3_vl_trains(qwen3_vl, tmp_path):
    changes = {"model__path": qwen3_vl, "sft__steps": 2, "grpo__steps": 2, "sft__freeze": ["projector"]}
    run_dir = runs.train(tmp_path / "run", "sft", "grpo", **changes)
    start, sft, grpo = map(
        option_runs.weights_in, (qwen3_vl, *(run_dir / "models" / s for s in ("sft", "grpo")))
    )
    # the mergers of features from within the tower are projectors, too
    mergers = tuple(f"model.visual.{name}." for name in ("merger", "deepstack_merger_list"))
    assert {name for name in start if torch.equal(sft[name], start[name])} == {
        name for name in start if name.startswith(mergers)
    }
    assert not any(torch.equal(grpo[name], sft[name]) for name in start)
    for stage in ("sft", "grpo"):
        assert all(row["grad_norm"] > 1e-3 for row in runs.metrics(run_dir, stage))
