"""AdamW three ways: its groups and rates, and a state that goes on bit for bit, on any number of ranks."""

import copy
import math
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import geo_r1.train.parallel.optim
from geo_r1.train.parallel.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from geo_r1.train.recipe.sections import OptimConfig

OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16")
RATES = {"lr": 0.02, "vision_lr": 0.005, "weight_decay": 0.1, "schedule": "linear", "warmup_ratio": 0.4}
NUM_STEPS = 5


class Toy(nn.Module):
    """Names as in a Qwen-VL; rows of whole blocks, rows of none, fewer rows than ranks, a frozen weight."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.ModuleDict({"visual": nn.Linear(512, 25), "language_model": nn.Linear(25, 4096)})
            self.lm_head = nn.Linear(4096, 1, bias=False)
            self.frozen = nn.Linear(1, 1)
        self.to(dtype).frozen.requires_grad_(False)

    def forward(self, x):
        hidden = self.model["visual"](x).tanh()
        return self.frozen(self.lm_head(self.model["language_model"](hidden).tanh()))


def options(name):
    if name != "adamw":
        pytest.importorskip("torchao")
    return OptimConfig(optimizer=name, **RATES)


def toy(config):
    return Toy(torch.bfloat16 if config.optimizer == "adamw_bf16" else torch.float32)


@contextmanager
def not_compiled():
    """torchao compiles its update: seconds a shape on a CPU."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def train(model, optimizer, config, steps):
    for step in steps:
        x = torch.randn(8, 512, generator=torch.Generator().manual_seed(step))
        model(x.to(model.lm_head.weight.dtype)).square().mean().backward()
        set_learning_rate(optimizer, config, step, NUM_STEPS)
        with not_compiled():
            optimizer.step()
        optimizer.zero_grad()


def trained(config, steps):
    model = toy(config)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, config, steps)
    return model, optimizer


def assert_equal_weights(model, other):
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight.full_tensor() if isinstance(weight, DTensor) else weight, expected), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_changes_no_bit(name):
    config = options(name)
    expected, _ = trained(config, range(5))
    model, optimizer = trained(config, range(3))
    state = copy.deepcopy(optimizer_state(model, optimizer))
    torch.rand(3)  # what is drawn elsewhere does not matter
    fresh = build_optimizer(model, config)
    load_optimizer_state(model, fresh, state)
    found = optimizer_state(model, fresh)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    before = torch.get_rng_state()
    train(model, fresh, config, range(3, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_weights(model, expected)
    assert not torch.equal(model.lm_head.weight, toy(config).lm_head.weight)
    assert torch.equal(model.frozen.weight, toy(config).frozen.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_before_the_first_step_is_what_the_first_step_makes(name):
    config = options(name)
    model = toy(config)
    optimizer = build_optimizer(model, config)
    empty = copy.deepcopy(optimizer_state(model, optimizer))
    train(model, optimizer, config, range(1))
    after = optimizer_state(model, optimizer)
    weights = [key for key, p in model.named_parameters() if p.requires_grad]
    assert {key.removesuffix(".step") for key in after if key.endswith(".step")} == set(weights)
    assert {key: (v.shape, v.dtype, v.device) for key, v in empty.items()} == {
        key: (v.shape, v.dtype, v.device) for key, v in after.items()
    }
    assert not any(value.any() for value in empty.values())
    assert all(value.any() for value in after.values())
    untouched = toy(config)
    optimizer_state(untouched, build_optimizer(untouched, config))
    assert_equal_weights(untouched, toy(config))
    expected, _ = trained(config, range(1))
    assert_equal_weights(model, expected)


def test_eight_bits_hold_rows_of_whole_blocks_and_come_close():
    config = options("adamw_8bit")
    model, optimizer = trained(config, range(5))
    state = optimizer_state(model, optimizer)
    codes = {key: tuple(v.shape) for key, v in state.items() if key.endswith(".exp_avg.codes")}
    assert codes == {
        "model.visual.weight.exp_avg.codes": (25, 512),
        "lm_head.weight.exp_avg.codes": (1, 4096),
    }
    assert {v.dtype for key, v in state.items() if "codes" in key} == {torch.uint8}
    assert state["model.visual.weight.exp_avg.scale"].shape == (25, 2)
    assert state["model.language_model.weight.exp_avg"].dtype == torch.float32
    wide, _ = trained(options("adamw"), range(5))
    start = Toy()
    for weight, expected, first in zip(
        model.parameters(), wide.parameters(), start.parameters(), strict=True
    ):
        moved = (expected - first).norm()
        assert (weight - expected).norm() <= 0.05 * moved


def test_stochastic_rounding_keeps_what_is_too_small_for_bfloat16():
    """Steps of a 16th of a weight's last place: rounded to nearest they would all be lost."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    model = nn.ParameterDict({"weight": weight})
    config = options("adamw_bf16").model_copy(update={"lr": 2.0**-12, "weight_decay": 0.0})
    optimizer = build_optimizer(model, config)
    for _ in range(32):
        weight.grad = torch.ones_like(weight)
        with not_compiled():
            optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert weight.float().mean().item() == pytest.approx(1 - 32 * 2.0**-12, abs=5e-4)
    assert 1 < weight.unique().numel() < 16


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_group_follows_the_schedule_from_its_own_rate(name):
    config = options(name)
    model = toy(config)
    optimizer = build_optimizer(model, config)
    by_name = {
        weight: group
        for group in optimizer.param_groups
        for weight, p in model.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert len(optimizer.param_groups) == 2 and len(by_name) == 5
    for step, share in enumerate([0.5, 1.0, 1.0, 2 / 3, 1 / 3]):
        assert set_learning_rate(optimizer, config, step, NUM_STEPS) == pytest.approx(0.02 * share)
        for weight, group in by_name.items():
            base = 0.005 if "visual" in weight else 0.02
            assert float(group["lr"]) == pytest.approx(base * share)
            assert group["weight_decay"] == 0.1 and tuple(group["betas"]) == (0.9, 0.999)


def test_one_group_where_the_tower_has_no_rate_of_its_own():
    model = Toy()
    [group] = build_optimizer(model, OptimConfig(lr=0.5)).param_groups
    assert (len(group["params"]), group["lr"], group["base_lr"]) == (5, 0.5, 0.5)
    model.requires_grad_(False).model["visual"].requires_grad_(True)
    [group] = build_optimizer(model, OptimConfig(lr=0.5, vision_lr=0.25)).param_groups
    assert (len(group["params"]), group["lr"], group["base_lr"]) == (2, 0.25, 0.25)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 10),
        ({"schedule": "linear"}, [1 - i / 10 for i in range(10)]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, [0.5 + 0.5 * (1 - i / 10) for i in range(10)]),
        ({"schedule": "linear", "warmup_ratio": 0.2}, [0.5, 1.0, *(1 - i / 8 for i in range(8))]),
        ({"schedule": "constant", "warmup_ratio": 0.25}, [1 / 3, 2 / 3, *[1.0] * 8]),
        ({"schedule": "cosine", "warmup_ratio": 1.0}, [(i + 1) / 10 for i in range(10)]),
    ],
)
def test_learning_rate(options, expected):
    config = OptimConfig(lr=2.0, **options)
    assert [learning_rate(config, step, 10) for step in range(10)] == pytest.approx([2 * x for x in expected])


def test_what_cannot_be_trained(monkeypatch):
    with pytest.raises(ValueError, match="all weights are frozen"):
        build_optimizer(Toy().requires_grad_(False), OptimConfig())
    with pytest.raises(ValueError, match=r"trains weights in bfloat16, these are in torch\.float32"):
        build_optimizer(Toy(), options("adamw_bf16"))
    monkeypatch.setattr(geo_r1.train.parallel.optim, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs torchao: pip install '\.\[torchao\]'"):
        build_optimizer(Toy(), OptimConfig(optimizer="adamw_8bit"))


def test_state_of_another_run():
    model, optimizer = trained(OptimConfig(), range(1))
    state = optimizer_state(model, optimizer)
    wrong = state | {"lm_head.weight.exp_avg": torch.zeros(2, 4096)}
    with pytest.raises(ValueError, match=r"lm_head\.weight\.exp_avg is \[2, 4096\] there, \[1, 4096\] here"):
        load_optimizer_state(model, optimizer, wrong)
    del state["model.visual.bias.step"]
    with pytest.raises(ValueError, match=r"it has no model\.visual\.bias\.step"):
        load_optimizer_state(model, optimizer, state)


def saved(model, optimizer):
    return {"model": model.state_dict(), "optim": optimizer_state(model, optimizer)}


def go_on(model, folder, config):
    """Read a checkpoint into a new model, and do the last two steps."""
    optimizer = build_optimizer(model, config)
    state = saved(model, optimizer)
    with warnings.catch_warnings():  # outside of a process group it says so
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder)
    load_optimizer_state(model, optimizer, state["optim"])
    train(model, optimizer, config, range(3, 5))
    return model


def train_in_shards(rank, folder, names):
    """One of two ranks: trains as one does, and goes on from its own checkpoint and from a single rank's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def shards(config):
        return fully_shard(toy(config), mesh=mesh)

    for name in names:
        config = OptimConfig(optimizer=name, **RATES)
        model = shards(config)
        optimizer = build_optimizer(model, config)
        train(model, optimizer, config, range(3))
        dcp.save(saved(model, optimizer), checkpoint_id=f"{folder}/two-{name}")
        train(model, optimizer, config, range(3, 5))
        whole = [p.full_tensor() for p in model.parameters()]
        again = go_on(shards(config), f"{folder}/two-{name}", config)
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(again.parameters(), whole, strict=True))
        if name != "adamw_bf16":  # whose rounding is drawn anew
            expected, _ = trained(config, range(5))
            assert_equal_weights(model, expected)
            assert_equal_weights(go_on(shards(config), f"{folder}/one-{name}", config), expected)
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine torch's threads may abort an interpreter that takes its time to end


def test_any_number_of_ranks_goes_on(tmp_path):
    pytest.importorskip("torchao")
    for name in OPTIMIZERS:
        config = options(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(saved(*trained(config, range(3))), checkpoint_id=tmp_path / f"one-{name}")
    torch.multiprocessing.spawn(train_in_shards, (str(tmp_path), OPTIMIZERS), nprocs=2)
    for name in ("adamw", "adamw_8bit"):
        expected, _ = trained(options(name), range(5))
        assert_equal_weights(go_on(toy(options(name)), tmp_path / f"two-{name}", options(name)), expected)
