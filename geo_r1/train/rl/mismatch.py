"""How far the sampler's log-probabilities are from the trainer's, and the weights that correct for it.

Another context, another precision or older weights: completions then come from a distribution q that is not
quite the policy p. With d = log p - log q of a sampled token, both under the recipe's temperature, and q as
top_p, top_k and the tokens that are never sampled leave it,

    sampling/logp_difference/mean, max     mean and largest |d|
    sampling/token_mult_prob_error         mean exp(|d|): 1 where they agree; 1.02 is 2 % a token
    importance weight                      exp(d), cut off at a cap (truncate) or dropped beyond it (mask)

Sources: token_mult_prob_error as NVIDIA's NeMo-RL reports it; truncated importance sampling as in TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geo_r1.train.parallel.micro_batches import MicroBatch
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import RolloutConfig


def importance_weights(micro: MicroBatch, config: RolloutConfig) -> Tensor:
    """[R] p / q of each token, where p is `micro.old_logp`, as `rollout.importance_sampling` bounds it."""
    assert micro.old_logp is not None and micro.sampled_logp is not None
    ratio = (micro.old_logp - micro.sampled_logp).exp()
    if config.importance_sampling == "truncate":
        return ratio.clamp(max=config.importance_cap)
    return torch.where((ratio <= config.importance_cap) & (ratio >= 1 / config.importance_cap), ratio, 0)


def differences(logp: Tensor, sampled_logp: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """[2] float64 sums of |d| and exp(|d|), and the largest |d|, over the rows that count.

    Args:
        logp, sampled_logp: [R].
        counts: [R] bool.
    """
    d = torch.where(counts, (logp.double() - sampled_logp).abs(), 0)
    return torch.stack([d.sum(), torch.where(counts, d.exp(), 0).sum()]), d.max()


def mismatch_metrics(ranks: Ranks, num_tokens: float, sums: Tensor, largest: Tensor) -> dict[str, float]:
    """The step's figures from each rank's sums [2] and its largest; `num_tokens` is over all ranks."""
    absolute, multiplied = ranks.sum(sums.tolist())
    return {
        "sampling/logp_difference/mean": absolute / num_tokens,
        "sampling/logp_difference/max": max(ranks.gather(largest.item())),
        "sampling/token_mult_prob_error": multiplied / num_tokens,
    }


def importance_metrics(
    ranks: Ranks, micro_batches: list[MicroBatch], config: RolloutConfig
) -> dict[str, float]:
    """Mean importance weight, and the share of tokens whose ratio was bounded, over the rows that count."""
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for micro in micro_batches:
        assert micro.importance is not None
        counts = micro.weight != 0
        beyond = (micro.importance == config.importance_cap) | (micro.importance == 0)
        columns = (torch.ones_like(counts), micro.importance, beyond)
        sums += torch.stack([torch.where(counts, column, 0).double().sum() for column in columns])
    tokens, weight, bounded = ranks.sum(sums.tolist())
    if not tokens:
        return {}
    return {
        "sampling/importance_weight/mean": weight / tokens,
        "sampling/importance_weight/bounded": bounded / tokens,
    }


def check_mismatch(step: int, figures: dict[str, float], limit: float | None) -> None:
    """Raise ValueError where the sampler is further from the trainer than the recipe allows."""
    error = figures.get("sampling/token_mult_prob_error", 1.0)
    if limit is not None and not error <= limit:  # nor may it be no number
        raise ValueError(
            f"grpo step {step}: sampling/token_mult_prob_error is {error:.4g}, rollout.max_mismatch is "
            f"{limit:g}: what samples is not the policy that learns. Compare precision, rollout.engine, "
            "rollout.max_staleness, and top_p and top_k, which count too; the step was not taken"
        )
