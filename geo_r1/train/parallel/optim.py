"""AdamW in the precision of the recipe, its schedule, and its state under the weights' own names.

The state is a flat {"<weight>.<entry>": tensor}, sharded as the weights are. No entry depends on how, so any
number of ranks can read a checkpoint of it. Rates and decay come from the recipe, not from the state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from geo_r1.errors import UserError
from geo_r1.models.qwen_vl import VISION
from geo_r1.train.recipe.sections import OptimConfig

BLOCK = 256  # weights that share a scale; torchao's default
SMALLEST = 4096  # weights of a tensor worth 8 bits; torchao's choice


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over a model's weights that require gradients.

    The vision tower with its projector is a group of its own if `config.vision_lr` is given. Every group has
    its own `base_lr`, which `set_learning_rate` scales.

    Args:
        model: a Qwen-VL, or shards of one; "adamw_bf16" needs its trained weights in bfloat16.

    Raises:
        UserError: all weights are frozen, torchao is not installed, or weights have the wrong dtype.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vision_lr = config.vision_lr if name.startswith(VISION) else None
            groups.setdefault(vision_lr or config.lr, []).append(parameter)
    if not groups:
        raise UserError("all weights are frozen: nothing would be trained")
    trained = [parameter for group in groups.values() for parameter in group]
    params = [{"params": group, "lr": lr, "base_lr": lr} for lr, group in groups.items()]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        # fused is one pass; torch's default on a GPU holds temporaries as large as the weights
        return torch.optim.AdamW(params, **options, fused=trained[0].device.type == "cuda" or None)
    if find_spec("torchao") is None:
        raise UserError(f"the optimizer {config.optimizer} needs torchao: pip install '.[torchao]'")
    from torchao.optim import AdamW8bit, _AdamW

    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw_8bit":
        optimizer = AdamW8bit(params, **options, block_size=BLOCK)
        for group in optimizer.param_groups:
            group["eight_bits"] = True
        _fill_state(optimizer)  # torchao's own choice of what gets 8 bits depends on the number of ranks
        return optimizer
    if other := {p.dtype for p in trained} - {torch.bfloat16}:
        raise UserError(f"the optimizer adamw_bf16 trains weights in bfloat16, these are in {other.pop()}")
    optimizer = _AdamW(params, **options, bf16_stochastic_round=True)
    _draw_by_step(optimizer)
    return optimizer


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate at a step: it rises over the warm-up, then follows the schedule to the last step."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, num_steps - warmup)
    cosine = (1 + math.cos(math.pi * (1 - left))) / 2
    fall = {"constant": 1.0, "linear": left, "cosine": cosine}[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, num_steps: int
) -> float:
    """Set every group's rate for a step in proportion to its `base_lr`; returns that of `config.lr`."""
    rate = learning_rate(config, step, num_steps)
    for group in optimizer.param_groups:
        own = rate * (group["base_lr"] / config.lr)
        if isinstance(group["lr"], Tensor):  # torchao's compiled update reads the tensor
            group["lr"].fill_(own)
        else:
            group["lr"] = own
    return rate


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state for a checkpoint, to write it or to read into: {"<weight>.<entry>": tensor}.

    Tensors share the optimiser's memory, and are DTensors where weights are; all zeros before the first step.
    In 8 bits a weight [R, ...] has `exp_avg.codes`, uint8 [R, ...], and `exp_avg.scale`, float32 [R, blocks
    of a row], instead of `exp_avg`; likewise for `exp_avg_sq`.
    """
    state = {}
    for name, parameter, entries in _named_state(model, optimizer):
        own = optimizer.state[parameter]
        for entry, local in entries.items():
            state[f"{name}.{entry}"] = own[entry] if entry in own else _like(parameter, local)
    return state


@torch.no_grad()
def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Take over a state from `optimizer_state` of a model whose weights are sharded as here.

    Raises:
        UserError: an entry is missing, or of another shape.
    """
    for name, _, entries in _named_state(model, optimizer):
        for entry, local in entries.items():
            saved = state.get(f"{name}.{entry}")
            if saved is None:
                raise UserError(f"the optimiser's state is of another run: it has no {name}.{entry}")
            source = saved.to_local() if isinstance(saved, DTensor) else saved
            if source.shape != local.shape:
                raise UserError(
                    f"the optimiser's state is of another run: {name}.{entry} is {list(source.shape)} there, "
                    f"{list(local.shape)} here"
                )
            local.copy_(source)


def _named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
    """Each trained weight's name, the weight, and this rank's part of its state, in the state's memory."""
    _fill_state(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entries: dict[str, Tensor] = {}
            for entry, value in optimizer.state[parameter].items():
                local: Any = value.to_local() if isinstance(value, DTensor) else value
                if entry == "step" or not _has_eight_bits(parameter, group):
                    entries[entry] = local
                    continue
                rows, blocks = len(local), parameter.shape[1:].numel() // BLOCK
                codes, scale = (local.codes, local.scale) if rows else (local.byte(), local.new_empty(0))
                entries |= {f"{entry}.codes": codes, f"{entry}.scale": scale.view(rows, blocks)}
            yield names[parameter], parameter, entries


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = empty_state(parameter, group)


def empty_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state that a weight's first step would make, all zeros."""
    # a fused update counts on its device
    step = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
    moments = {"exp_avg": _zeros(parameter, group, True), "exp_avg_sq": _zeros(parameter, group, False)}
    return {"step": step, **moments}


def _zeros(parameter: Tensor, group: dict[str, Any], signed: bool) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if not (_has_eight_bits(parameter, group) and len(local)):
        return torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    from torchao.optim.subclass_8bit import OptimState8bit

    zeros = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device, dtype=local.dtype)
    return _like(parameter, zeros)


def _has_eight_bits(parameter: Tensor, group: dict[str, Any]) -> bool:
    """True for a large matrix whose rows are whole blocks, so that no shard cuts a block."""
    if not group.get("eight_bits"):
        return False
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    assert all(place.dim == 0 for place in placements if isinstance(place, Shard)), "rows are in shards"
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST and parameter.shape[1:].numel() % BLOCK == 0


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """This rank's part of a tensor [R, ...], sharded like a weight [R, ...]; a scalar stays a scalar."""
    if not isinstance(parameter, DTensor) or local.ndim == 0:
        return local
    shape = torch.Size((parameter.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return sharded.to(parameter.device)  # weights offloaded to the host have a mesh of GPUs


def _draw_by_step(optimizer: torch.optim.Optimizer) -> None:
    """Seed stochastic rounding with the number of the step.

    A resumed run then draws as an uninterrupted one does, and copies of a weight stay equal.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stack = ExitStack()

    def seed(*_: Any) -> None:
        steps = [int(state["step"]) for state in optimizer.state.values() if state]
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(max(steps, default=0))

    optimizer.register_step_pre_hook(seed)
    optimizer.register_step_post_hook(lambda *_: stack.close())
