"""`deepspeed`: gradients and optimiser in shards (ZeRO 2), and weights too (ZeRO 3).

Checkpoints are as with the other strategies: whole tensors by name, of which each rank writes its rows.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from geo_r1.errors import UserError
from geo_r1.models import PackedVLM
from geo_r1.train.parallel.optim import empty_state
from geo_r1.train.parallel.policy import Function, Policy, Runner, hand_out
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.run_sections import ParallelConfig

# The recipe decides these, so the user's JSON may not hold them.
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
    """A policy run by DeepSpeed's engine, which exists once an optimiser is attached."""

    deepspeed_engine: Any
    copied = True  # the model's own weights may be narrower than the optimiser's

    def __init__(self, vlm: PackedVLM, ranks: Ranks, alpha: float | None, config: ParallelConfig) -> None:
        if find_spec("deepspeed") is None:
            raise UserError("parallel.strategy = deepspeed needs DeepSpeed: pip install '.[deepspeed]'")
        if vlm.compute_dtype == torch.float64:
            raise UserError("DeepSpeed computes in float32 or bfloat16, not in model.dtype = float64")
        self.vlm, self.ranks, self.alpha, self.config, self.everyone = vlm, ranks, alpha, config, True
        ranks.join()
        hand_out(vlm.model, ranks)
        self.host_mesh = init_device_mesh("cpu", (ranks.size,))
        self.sharded = config.zero_stage == 3

    def attach(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        import deepspeed

        if type(optimizer) is not torch.optim.AdamW:
            raise UserError("DeepSpeed flattens weights, which torchao's optimisers cannot update: use adamw")
        # DeepSpeed calls functions that torch has renamed: a warning at every collective.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        narrow = self.vlm.compute_dtype == torch.bfloat16
        settings = deepspeed_settings(self.config, max_grad_norm, narrow)
        trained = {name: p for name, p in self.vlm.model.named_parameters() if p.requires_grad}
        start = {name: self._rows(p.detach()) for name, p in trained.items()} if narrow else {}
        self.deepspeed_engine, wrapped, *_ = deepspeed.initialize(
            model=Runner(self.vlm), optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.root = self.deepspeed_engine
        if self.sharded:  # the loss reads lm_head outside of any layer
            deepspeed.zero.register_external_parameter(self.deepspeed_engine.module, self.vlm.lm_head)
        # AdamW makes its state in its first step, but a resumed run fills it before that.
        flat = (
            wrapped.fp32_partitioned_groups_flat if self.sharded else wrapped.single_partition_of_fp32_groups
        )
        for tensor in flat:
            wrapped.optimizer.state[tensor] = empty_state(tensor, optimizer.defaults)
        if not self.sharded:  # link each weight to its part of the state, as the first step would
            wrapped._lazy_init_hp_params_optimizer_state()
        for name, rows in start.items():  # DeepSpeed made its float32 weights from rounded ones
            self._set(trained[name], None, self._whole(rows))
        return wrapped

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.deepspeed_engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # ZeRO 3 leaves the root in it
        del self.deepspeed_engine, self.root

    @torch.no_grad()
    def run(self, function: Function, *args: Any) -> Any:
        return self.deepspeed_engine(function, *args)

    def learn(self, function: Function, *args: Any, last: bool) -> tuple[Tensor, ...]:
        self.deepspeed_engine.set_gradient_accumulation_boundary(last)
        loss, *rest = self.deepspeed_engine(function, *args)
        self.deepspeed_engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        return loss.detach(), *(x.detach() for x in rest)

    def update(self, optimizer: Optimizer, max_grad_norm: float, wanted: bool) -> float:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        if not wanted:  # DeepSpeed takes no step where a gradient is not finite
            first: Any = self.parameters[0]
            shape = (first.ds_tensor.ds_numel,) if self.sharded else first.shape
            set_gradient = safe_set_local_grad if self.sharded else safe_set_full_grad
            set_gradient(first, torch.full(shape, math.nan, device=self.ranks.device))
        self.deepspeed_engine.step()
        return float(self.deepspeed_engine.get_global_grad_norm())

    def full(self, parameter: torch.nn.Parameter, dtype: torch.dtype | None) -> Tensor:
        """A whole weight; in float32 the optimiser's, not the layers' narrower one."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad and dtype in (None, torch.float32):
            return safe_get_full_fp32_param(parameter)
        if not self.sharded:
            return parameter.detach().to(dtype=dtype)
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to(dtype=dtype, copy=True)

    def state(self, optimizer: Optimizer | None) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        model, optim = {}, {}
        [step] = {float(own["step"]) for own in self._adamw_states()}
        for name, parameter in self.vlm.model.named_parameters():
            if parameter.requires_grad or self.alpha is None:
                model[name] = self._rows(self.full(parameter, torch.float32))
            if parameter.requires_grad:
                for moment in MOMENTS:
                    optim[f"{name}.{moment}"] = self._rows(safe_get_full_optimizer_state(parameter, moment))
                optim[f"{name}.step"] = torch.tensor(step)
        return {"model": model, "optim": optim}

    def load_state(self, optimizer: Optimizer | None, state: dict[str, dict[str, Any]]) -> None:
        import deepspeed

        for name, parameter in self.vlm.model.named_parameters():
            if not parameter.requires_grad:
                continue
            weight = self._whole(state["model"][name])
            self._set(parameter, None, weight)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)  # layers compute with these until the next step
            for moment in MOMENTS:
                self._set(parameter, moment, self._whole(state["optim"][f"{name}.{moment}"]))
        [step] = {value.item() for name, value in state["optim"].items() if name.endswith(".step")}
        for own in self._adamw_states():  # all weights are updated together
            own["step"] = torch.full_like(torch.as_tensor(own["step"]), step)

    def _adamw_states(self) -> Iterable[dict[str, Any]]:
        return self.deepspeed_engine.optimizer.optimizer.state.values()

    def _set(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """Overwrite a weight's moment in the optimiser, or its float32 weight, by a whole tensor."""
        from deepspeed import utils

        if self.sharded:  # by parts: given a whole, DeepSpeed fails where the ranks do not divide it
            size = parameter.ds_tensor.ds_numel
            value = F.pad(value.flatten(), (0, size * self.ranks.size - value.numel()))
            value = value.narrow(0, self.ranks.rank * size, size)
        part = "local" if self.sharded else "full"
        if moment is None:
            getattr(utils, f"safe_set_{part}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{part}_optimizer_state")(parameter, value, moment)

    def _rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole tensor, on the host."""
        return distribute_tensor(tensor.cpu(), self.host_mesh, [Shard(0)], src_data_rank=None)

    def _whole(self, tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(self.ranks.device)


def deepspeed_settings(config: ParallelConfig, max_grad_norm: float, narrow: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON, if there is one, and the recipe's decisions.

    Raises:
        UserError: the JSON cannot be read, or holds a key that the recipe decides; names the key.
    """
    path = config.deepspeed_config
    own: Any = {}
    if path:
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"parallel.deepspeed_config {path} cannot be read: {error}") from error
        if not isinstance(own, dict):
            raise UserError(f"parallel.deepspeed_config {path} is a {type(own).__name__}, not an object")
    for key in OURS:
        if key in own:
            raise UserError(f"{path}: {key} is the recipe's to decide; take it out")
    zero = own.setdefault("zero_optimization", {})
    if zero.setdefault("stage", config.zero_stage) != config.zero_stage:
        raise UserError(
            f"{path}: zero_optimization.stage is {zero['stage']}, "
            f"but parallel.zero_stage is {config.zero_stage}"
        )
    if config.cpu_offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
        if config.zero_stage == 3:
            zero.setdefault("offload_param", {"device": "cpu"})
    return own | {
        "train_micro_batch_size_per_gpu": 1,  # not read: a packed batch holds any number of samples
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": narrow, "check_grad_overflow": True},
        # sums of many micro-batches in bfloat16 would lose small terms
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
