"""The losses in plain torch, any float dtype: their definition, with the derivatives written out.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

Rows of weight zero contribute exactly zero, to the loss and to every gradient, whatever they hold.

Source: GRPO, arXiv:2402.03300; names and options follow TRL's GRPOTrainer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geo_r1.kernels.loss.config import GRPOLossConfig

# sigmoid(40) is 1 in float64 and its derivative 0, so clamping SAPO's ratio there changes no bit.
SAPO_SATURATED = 40.0


class LossRows(NamedTuple):
    """The loss's inputs for each row, [R] each; see `grpo_loss`."""

    advantage_R: Tensor
    token_weight_R: Tensor
    old_logp_R: Tensor | None
    ref_logp_R: Tensor | None
    importance_weight_R: Tensor | None
    sequence_R: Tensor | None

    def part(self, index: slice | Tensor) -> LossRows:
        """Some of the rows."""
        return LossRows._make(None if row_R is None else row_R[index] for row_R in self)

    def detached(self) -> LossRows:
        """The same values, cut from their graphs: the loss has no gradient in them."""
        return LossRows._make(None if row_R is None else row_R.detach() for row_R in self)


class RowLoss(NamedTuple):
    """The formula's results for each row, float32 or float64. Rows of weight zero: 0, 0, 0, 0, 1, False."""

    loss_R: Tensor  # [R] weighted part of the loss
    d_logp_R: Tensor  # [R] derivative of the whole loss with respect to the row's logp
    d_entropy_R: Tensor  # [R] and with respect to its entropy
    kl_R: Tensor  # [R] nats
    ratio_R: Tensor  # [R]
    clipped_R: Tensor  # [R] bool


def row_statistics(logits_RV: Tensor, target_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the entropy of its distribution.

        z = logits / temperature;  logp = z[target] - logsumexp(z);  H = -sum_v p_v log p_v

    Args:
        logits_RV: [R, V] floating; may hold -inf (tokens that cannot be sampled).
        target_R: [R] int64 in [0, V).
        temperature: divides the logits.

    Returns:
        logp_R, entropy_R: [R] float32 (float64 for float64 logits), nats.
    """
    logp_RV = _log_softmax(logits_RV, temperature)
    p_RV = logp_RV.exp()
    entropy_R = -p_RV.mul_(_finite(logp_RV)).sum(-1)
    return logp_RV.gather(1, target_R[:, None]).squeeze(1), entropy_R


def logit_gradient(
    logits_RV: Tensor,
    target_R: Tensor,
    entropy_R: Tensor,
    d_logp_R: Tensor,
    d_entropy_R: Tensor | None,
    temperature: float,
    d_loss: Tensor | float = 1.0,
) -> Tensor:
    """The gradient of `row_statistics`, dlogits = (dlogp (onehot - p) - dH p (log p + H)) / temperature,
    times `d_loss`.

    Rows whose derivatives are zero get exactly zero, whatever their logits hold.

    Returns:
        [R, V], dtype of the logits.
    """
    logp_RV = _log_softmax(logits_RV, temperature)
    p_RV = logp_RV.exp()
    idle_R = d_logp_R == 0
    d_logp_R = d_logp_R * d_loss / temperature
    factor_RV = -d_logp_R[:, None]
    if d_entropy_R is not None:
        idle_R = idle_R & (d_entropy_R == 0)
        factor_RV = factor_RV - (d_entropy_R * d_loss / temperature)[:, None] * (
            _finite(logp_RV) + entropy_R[:, None]
        )
    d_RV = p_RV.mul_(factor_RV).scatter_add_(1, target_R[:, None], d_logp_R[:, None])
    return d_RV.masked_fill_(idle_R[:, None], 0.0).to(logits_RV.dtype)


def _log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    z_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return (z_RV if temperature == 1 else z_RV / temperature).log_softmax(-1)


def _finite(logp_RV: Tensor) -> Tensor:
    """Replace -inf with a finite number, so that its product with a probability of 0 is 0."""
    return logp_RV.clamp(min=torch.finfo(logp_RV.dtype).min)


def grpo_row_loss(logp_R: Tensor, entropy_R: Tensor, rows: LossRows, config: GRPOLossConfig) -> RowLoss:
    """Each row's weighted part of the loss, its derivatives and its report.

    Args:
        logp_R, entropy_R: [R] float32 or float64, nats; everything is computed in their dtype.
        rows: the other inputs of the loss.
        config: options of the loss.
    """
    kept_R = rows.token_weight_R != 0

    def kept(value_R: Tensor) -> Tensor:
        # Inputs of dropped rows become finite first, since zero times NaN would be NaN further down.
        return torch.where(kept_R, value_R.to(logp_R.dtype), 0.0)

    logp_R, advantage_R, weight_R = kept(logp_R), kept(rows.advantage_R), kept(rows.token_weight_R)
    log_ratio_R = torch.zeros_like(logp_R) if rows.old_logp_R is None else logp_R - kept(rows.old_logp_R)
    if config.importance_sampling_level == "sequence":
        assert rows.sequence_R is not None
        log_ratio_R = kept(_sequence_mean(log_ratio_R, kept_R, rows.sequence_R))
    ratio_R = log_ratio_R.exp()

    term_R, d_logp_R, clipped_R = _policy_term(logp_R, ratio_R, advantage_R, config)
    if rows.importance_weight_R is not None:
        importance_R = kept(rows.importance_weight_R)
        term_R, d_logp_R = term_R * importance_R, d_logp_R * importance_R
    d_logp_R = weight_R * d_logp_R
    if config.importance_sampling_level == "sequence" and config.policy != "cispo":
        assert rows.sequence_R is not None
        d_logp_R = kept(_sequence_mean(d_logp_R, kept_R, rows.sequence_R))  # a mean's derivative is a mean
    kl_R = torch.zeros_like(logp_R)
    if rows.ref_logp_R is not None:
        kl_R, d_kl_R = _kl(kept(rows.ref_logp_R) - logp_R, config.kl_estimator)
        if config.beta != 0:
            term_R = term_R + config.beta * kl_R
            d_logp_R = d_logp_R + weight_R * config.beta * d_kl_R
    if config.entropy_coef != 0:
        term_R = term_R - config.entropy_coef * kept(entropy_R)
    return RowLoss(weight_R * term_R, d_logp_R, -config.entropy_coef * weight_R, kl_R, ratio_R, clipped_R)


def _sequence_mean(value_R: Tensor, kept_R: Tensor, sequence_R: Tensor) -> Tensor:
    """Mean over the kept rows of each row's sequence; the ids need not be sorted or dense."""
    # Sorting gives dense ids, at most R of them, without the host sync of torch.unique.
    ordered, order = sequence_R.sort(stable=True)
    rank = torch.zeros_like(ordered)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    slot = torch.empty_like(rank).scatter_(0, order, rank)
    lengths = torch.zeros_like(rank).scatter_add_(0, rank, torch.ones_like(rank))
    # Not index_add, whose order of addition is not fixed on a GPU.
    total, count = (
        torch.segment_reduce(x[order], "sum", lengths=lengths, unsafe=True)
        for x in (value_R, kept_R.to(value_R.dtype))
    )
    return (total / count.clamp(min=1))[slot]


def _policy_term(
    logp_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, config: GRPOLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy term (to be minimised), its derivative in the log-ratio, and which rows were clipped.

    Where a bound replaces the ratio, the derivative is exactly 0 and is not multiplied by the ratio, which
    may have overflowed. Comparisons are written so that a NaN ratio stays NaN.
    """
    high = config.clip_high
    if config.policy == "cispo":  # arXiv:2506.13585; only logp is differentiated
        weight_R = -ratio_R.clamp(max=high) * advantage_R
        return weight_R * logp_R, weight_R, (ratio_R > high) & (advantage_R > 0)
    if config.policy == "sapo":  # arXiv:2511.20347
        cold_R = torch.full_like(ratio_R, config.sapo_temperature_neg)
        temperature_R = torch.where(advantage_R > 0, config.sapo_temperature_pos, cold_R)
        chosen_R = ratio_R.minimum(1 + SAPO_SATURATED / temperature_R)
        gate_R = torch.sigmoid(temperature_R * (chosen_R - 1))
        d_gate_R = 4 * gate_R * (1 - gate_R) * _live(chosen_R, ratio_R)
        clipped_R = torch.zeros_like(ratio_R, dtype=torch.bool)
        return -advantage_R * gate_R * 4 / temperature_R, -advantage_R * d_gate_R, clipped_R
    # Clipped PPO; delta bounds the side that clipping leaves open (arXiv:2505.07291).
    low_R = ratio_R.clamp(1 - config.epsilon, 1 + high)
    open_R = ratio_R if config.delta is None else ratio_R.clamp(max=config.delta)
    # With a zero advantage and an overflowed ratio this compares NaN, and False takes the bounded side.
    chosen_R = torch.where(open_R * advantage_R <= low_R * advantage_R, open_R, low_R)
    clipped_R = ((ratio_R < 1 - config.epsilon) & (advantage_R < 0)) | (
        (ratio_R > 1 + high) & (advantage_R > 0)
    )
    return -chosen_R * advantage_R, -_live(chosen_R, ratio_R) * advantage_R, clipped_R


def _live(chosen_R: Tensor, ratio_R: Tensor) -> Tensor:
    """The chosen value's derivative: the ratio, or 0 where a bound replaced it."""
    return torch.where((chosen_R < ratio_R) | (chosen_R > ratio_R), 0.0, ratio_R)


def _kl(d_R: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) from d = ref_logp - logp, nats, and its derivative in logp.

    Source: http://joschu.net/blog/kl-approx.html
    """
    if estimator == "k1":
        return -d_R, torch.ones_like(d_R)
    if estimator == "k2":
        return d_R.square() / 2, -d_R
    return torch.expm1(d_R) - d_R, -torch.expm1(d_R)
