"""`deepspeed`: gradients and optimiser in shards (ZeRO 2), and weights too (ZeRO 3).

A checkpoint is that of the other strategies: whole tensors by name, each rank holding its rows of them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from geo_r1.models import PackedVLM
from geo_r1.train.parallel.place import hand_out
from geo_r1.train.parallel.policy import Function, Policy, Runner
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.run_sections import ParallelConfig

# What the recipe, not a JSON of the user's, decides.
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
)
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroPolicy(Policy):
    """A policy whose engine is DeepSpeed; it exists once an optimiser is attached."""

    engine: Any

    def __init__(self, vlm: PackedVLM, ranks: Ranks, alpha: float | None, config: ParallelConfig) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("parallel.strategy = deepspeed needs DeepSpeed: pip install '.[deepspeed]'")
        if vlm.compute_dtype == torch.float64:
            raise ValueError("DeepSpeed computes in float32 or bfloat16, not in model.dtype = float64")
        self.vlm, self.ranks, self.alpha, self.config, self.everyone = vlm, ranks, alpha, config, True
        ranks.join()
        hand_out(vlm.model, ranks)
        self.sharded = config.zero_stage == 3

    def attach(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        import deepspeed

        if type(optimizer) is not torch.optim.AdamW:
            raise ValueError(
                "DeepSpeed flattens weights, which torchao's optimisers cannot update: use adamw"
            )
        # DeepSpeed calls functions that torch has renamed, which would be said at every collective.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        narrow = self.vlm.compute_dtype == torch.bfloat16
        settings = engine_settings(self.config, max_grad_norm, narrow)
        start = self._rows_of_weights() if narrow else {}
        self.engine, wrapped, *_ = deepspeed.initialize(
            model=Runner(self.vlm), optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.root = self.engine
        if self.sharded:  # the loss reads it outside of any layer
            deepspeed.zero.register_external_parameter(self.engine.module, self.vlm.lm_head)
        # AdamW makes its state in its first step, but a run that goes on fills it before that.
        flat = (
            wrapped.fp32_partitioned_groups_flat if self.sharded else wrapped.single_partition_of_fp32_groups
        )
        for tensor in flat:
            zeros = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            step = torch.zeros((), device=tensor.device if optimizer.defaults["fused"] else "cpu")
            wrapped.optimizer.state[tensor] = {"step": step, **zeros}
        if not self.sharded:  # show each weight its part of them, as the first step would
            wrapped._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.vlm.model.named_parameters():
            if name in start:  # DeepSpeed has made its float32 weights from rounded ones
                self._set(parameter, None, _whole(start[name], self.ranks))
        return wrapped

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # ZeRO 3 leaves the root in it
        del self.engine, self.root

    @torch.no_grad()
    def run(self, function: Function, *args: Any) -> Any:
        return self.engine(function, *args)

    def learn(self, function: Function, *args: Any, last: bool) -> tuple[Tensor, ...]:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, *rest = self.engine(function, *args)
        self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        return loss.detach(), *(x.detach() for x in rest)

    def update(self, optimizer: Optimizer, max_grad_norm: float, wanted: bool) -> float:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        if not wanted:  # DeepSpeed takes no step where a gradient is not finite
            first: Any = self.parameters[0]
            shape = (first.ds_tensor.ds_numel,) if self.sharded else first.shape
            set_gradient = safe_set_local_grad if self.sharded else safe_set_full_grad
            set_gradient(first, torch.full(shape, math.nan, device=self.ranks.device))
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def whole(self) -> Iterator[PackedVLM]:
        if not self.sharded:
            yield self.vlm
            return
        replica = self.replica(self.vlm.compute_dtype, self.ranks.device)
        assert replica is not None
        yield replica

    @contextmanager
    def exported(self) -> Iterator[PreTrainedModel | None]:
        yield self._plain_copy(torch.float32)

    def full_tensors(
        self, dtype: torch.dtype | None = None, ends: tuple[str, ...] = ("",)
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.vlm.model.named_parameters():
            if name.endswith(ends):
                tensor = self._full(parameter, dtype)
                yield name, tensor if dtype is None else tensor.to(dtype)

    def state(self, optimizer: Optimizer | None) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        rows = self._row_shards()
        model, optim = {}, {}
        step = self._step()
        for name, parameter in self.vlm.model.named_parameters():
            if parameter.requires_grad or self.alpha is None:
                model[name] = rows(self._full(parameter, torch.float32).float())
            if parameter.requires_grad:
                for moment in MOMENTS:
                    optim[f"{name}.{moment}"] = rows(safe_get_full_optimizer_state(parameter, moment))
                optim[f"{name}.step"] = torch.tensor(step)
        return {"model": model, "optim": optim}

    def load_state(self, optimizer: Optimizer | None, state: dict[str, dict[str, Any]]) -> None:
        import deepspeed

        for name, parameter in self.vlm.model.named_parameters():
            if not parameter.requires_grad:
                continue
            weight = _whole(state["model"][name], self.ranks)
            self._set(parameter, None, weight)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)  # what layers compute with, until the next step
            for moment in MOMENTS:
                self._set(parameter, moment, _whole(state["optim"][f"{name}.{moment}"], self.ranks))
        steps = {value.item() for name, value in state["optim"].items() if name.endswith(".step")}
        assert len(steps) == 1, "all weights are updated together"
        for own in self.engine.optimizer.optimizer.state.values():
            own["step"] = torch.full_like(torch.as_tensor(own["step"]), *steps)

    def _set(self, parameter: Any, moment: str | None, whole: Tensor) -> None:
        """Overwrite what the optimiser holds of a weight: a moment of it, or itself in float32."""
        from deepspeed import utils

        if not self.sharded:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # By parts: given a whole, DeepSpeed fails where the ranks do not divide it.
        size = parameter.ds_tensor.ds_numel
        padded = F.pad(whole.flatten(), (0, size * self.ranks.size - whole.numel()))
        part = padded.narrow(0, self.ranks.rank * size, size)
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)

    def _row_shards(self) -> Callable[[Tensor], Tensor]:
        """What cuts a whole tensor to this rank's rows, on the host."""
        mesh = init_device_mesh("cpu", (self.ranks.size,))
        return lambda tensor: distribute_tensor(tensor.cpu(), mesh, [Shard(0)], src_data_rank=None)

    def _rows_of_weights(self) -> dict[str, Tensor]:
        """Of the trained weights as they are before DeepSpeed has them."""
        rows = self._row_shards()
        named = self.vlm.model.named_parameters()
        return {name: rows(parameter.detach()) for name, parameter in named if parameter.requires_grad}

    def _step(self) -> float:
        [step] = {float(own["step"]) for own in self.engine.optimizer.optimizer.state.values()}
        return step

    def _full(self, parameter: torch.nn.Parameter, dtype: torch.dtype | None) -> Tensor:
        """A whole weight; in float32 the one that the optimiser updates, not the layers' narrower one."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad and dtype in (None, torch.float32):
            return safe_get_full_fp32_param(parameter)
        if not self.sharded:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def engine_settings(config: ParallelConfig, max_grad_norm: float, narrow: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON, where there is one, and what the recipe decides.

    Raises:
        ValueError: the JSON cannot be read, or decides what the recipe does; names the key.
    """
    own: dict[str, Any] = _read(config.deepspeed_config) if config.deepspeed_config else {}
    zero = own.setdefault("zero_optimization", {})
    for key in OURS:
        if key in own:
            raise ValueError(f"{config.deepspeed_config}: {key} is the recipe's to decide; take it out")
    if zero.setdefault("stage", config.zero_stage) != config.zero_stage:
        raise ValueError(
            f"{config.deepspeed_config}: zero_optimization.stage is {zero['stage']}, but parallel.zero_stage "
            f"is {config.zero_stage}"
        )
    if config.cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
        if config.zero_stage == 3:
            zero.setdefault("offload_param", {"device": "cpu"})
    return own | {
        "train_micro_batch_size_per_gpu": 1,  # of what is packed there may be any number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": narrow, "check_grad_overflow": True},
        # of many micro-batches, sums in bfloat16 would lose what is small
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"parallel.deepspeed_config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"parallel.deepspeed_config {path} is a {type(values).__name__}, not an object")
    return values


def _whole(tensor: Tensor, ranks: Ranks) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(ranks.device)
