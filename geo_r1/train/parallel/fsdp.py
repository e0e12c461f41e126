"""`fsdp2`: each layer's weights are gathered for its forward and backward, and freed again."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from geo_r1.errors import UserError
from geo_r1.models import PackedVLM
from geo_r1.train.parallel.policy import Function, Policy, Runner, hand_out
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.run_sections import ParallelConfig


class ShardedPolicy(Policy):
    """A policy in shards of whole layers and, in one more group, of everything outside of them."""

    sharded = copied = True

    def __init__(
        self, vlm: PackedVLM, ranks: Ranks, trained: bool, alpha: float | None, config: ParallelConfig
    ) -> None:
        self.vlm, self.ranks, self.alpha, self.everyone = vlm, ranks, alpha, True
        ranks.join()
        offload = config.cpu_offload and ranks.device.type != "cpu"
        narrow = vlm.compute_dtype != vlm.model.dtype
        options: dict[str, Any] = {
            "mesh": _mesh(ranks, config.shard_size),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=vlm.compute_dtype if narrow else None,
                reduce_dtype=torch.float32 if narrow else None,
                cast_forward_inputs=False,  # advantages and weights of tokens keep their dtype
            ),
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        for layer in vlm.layers:  # handed out and sharded one by one: never two layers whole
            hand_out(layer, ranks)
            fully_shard(layer, reshard_after_forward=config.reshard_after_forward or not trained, **options)
        hand_out(vlm.model, ranks)
        self.root = Runner(vlm)
        fully_shard(self.root, reshard_after_forward=not trained, **options)

    @torch.no_grad()
    def run(self, function: Function, *args: Any) -> Any:
        out = self.root(function, *args)
        for module in self.root.modules():  # there is no backward that would do it
            if isinstance(module, FSDPModule):
                module.reshard()
        return out


def _mesh(ranks: Ranks, shard_size: int | None) -> Any:
    if shard_size is None or shard_size == ranks.size:
        return init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=("shard",))
    if ranks.size % shard_size:
        raise UserError(
            f"parallel.shard_size = {shard_size} does not divide the {ranks.size} ranks; "
            f"try {next(n for n in range(shard_size, 0, -1) if ranks.size % n == 0)}"
        )
    shape = (ranks.size // shard_size, shard_size)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
