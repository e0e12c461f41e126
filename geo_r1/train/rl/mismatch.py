"""How far the sampler's log-probabilities are from the trainer's, and the weights that correct for it.

With another engine, another precision or older weights, completions come from a distribution q that is not
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

from geo_r1.errors import UserError
from geo_r1.models import PackedBatch
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import RolloutConfig
from geo_r1.train.rl.metrics import TokenSums


def importance_weights(batch: PackedBatch, config: RolloutConfig) -> Tensor:
    """[R] p / q of each token, where p is `batch.old_logp_R`, as `rollout.importance_sampling` bounds it."""
    assert batch.old_logp_R is not None and batch.sampled_logp_R is not None
    ratio = (batch.old_logp_R - batch.sampled_logp_R).exp()
    if config.importance_sampling == "truncate":
        return ratio.clamp(max=config.importance_cap)
    return torch.where((ratio <= config.importance_cap) & (ratio >= 1 / config.importance_cap), ratio, 0)


def differences(logp_R: Tensor, sampled_logp_R: Tensor | None) -> dict[str, Tensor]:
    """[R] float64 |d| and exp(|d|), by the names of their metrics."""
    assert sampled_logp_R is not None
    d = (logp_R.double() - sampled_logp_R).abs()
    return {
        "sampling/logp_difference/mean": d,
        "sampling/logp_difference/max": d,
        "sampling/token_mult_prob_error": d.exp(),
    }


def importance_metrics(
    ranks: Ranks, micro_batches: list[PackedBatch], config: RolloutConfig
) -> dict[str, float]:
    """Mean importance weight, and the share of tokens whose ratio was bounded, over the rows that count."""
    sums = TokenSums(ranks)
    for batch in micro_batches:
        weight_R = batch.importance_weight_R
        assert weight_R is not None and batch.token_weight_R is not None
        bounded = (weight_R == config.importance_cap) | (weight_R == 0)
        rows = {"mean": weight_R, "bounded": bounded}
        named = {f"sampling/importance_weight/{name}": row for name, row in rows.items()}
        sums.add(torch.zeros((), device=weight_R.device), batch.token_weight_R != 0, named)
    found = sums.means()
    del found["loss"]
    return found


def check_mismatch(step: int, figures: dict[str, float], limit: float | None) -> None:
    """Raise UserError if the sampler is further from the trainer than `rollout.max_mismatch`."""
    error = figures.get("sampling/token_mult_prob_error", 1.0)
    if limit is not None and not error <= limit:  # nor may it be no number
        raise UserError(
            f"grpo step {step}: sampling/token_mult_prob_error is {error:.4g}, rollout.max_mismatch is "
            f"{limit:g}: the sampler differs from the policy. Compare precision, rollout.engine, "
            "rollout.max_staleness, and top_p and top_k, which count too; the step was not taken"
        )
