"""Give every rank its part of a model, by the strategy that the recipe names."""

from __future__ import annotations

from geo_r1.models import PackedVLM
from geo_r1.train.parallel.fsdp import ShardedPolicy
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.run_sections import ParallelConfig


def shard_model(
    vlm: PackedVLM,
    ranks: Ranks,
    config: ParallelConfig,
    *,
    trained: bool = True,
    alpha: float | None = None,
) -> Policy:
    """Hand out a model that rank 0 holds, and spread it over the ranks.

    Args:
        vlm: whole on rank 0; on the others on the meta device.
        trained: False for a model that only computes; fsdp2 shards it, DeepSpeed is not needed.
        alpha: of the model's adapters; None where it has none.
    """
    strategy = strategy_of(config, ranks)
    if strategy == "deepspeed" and trained:
        from geo_r1.train.parallel.zero import ZeroPolicy  # imports DeepSpeed, which takes seconds

        return ZeroPolicy(vlm, ranks, alpha, config)
    if strategy == "fsdp2" or (strategy == "deepspeed" and config.zero_stage == 3):
        return ShardedPolicy(vlm, ranks, trained, alpha, config)
    return Policy(vlm, ranks, trained, alpha)


def strategy_of(config: ParallelConfig, ranks: Ranks) -> str:
    """The strategy of the recipe; `auto` depends on the number of ranks."""
    if config.strategy == "auto":
        return "fsdp2" if ranks.size > 1 else "ddp"
    return config.strategy
