"""The losses in plain torch, any float dtype: their definition, with the derivatives written out.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

Rows of weight zero contribute exactly zero, to the loss and to every gradient, whatever they hold.

Source: GRPO, arXiv:2402.03300; names and options follow TRL's GRPOTrainer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geo_r1.kernels.loss.config import GRPOLossConfig

# sigmoid(40) is 1 in float64 and its derivative 0, so clamping SAPO's ratio there changes no bit.
SAPO_SATURATED = 40.0
LOG_1E_8 = math.log(1e-8)


class LossRows(NamedTuple):
    """The loss's inputs for each row, [R] each; see `grpo_loss`."""

    advantage_R: Tensor
    token_weight_R: Tensor
    old_logp_R: Tensor | None
    ref_logp_R: Tensor | None
    importance_weight_R: Tensor | None
    sequence_R: Tensor | None
    entropy_weight_R: Tensor | None = None

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


class _Sequences:
    """Sums and means over the kept rows of each row's sequence; the ids need not be sorted or dense."""

    def __init__(self, sequence_R: Tensor, kept_R: Tensor) -> None:
        # Sorting gives dense ids, at most R of them, without the host sync of torch.unique.
        ordered, self.order = sequence_R.sort(stable=True)
        rank = torch.zeros_like(ordered)
        rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        self.slot = torch.empty_like(rank).scatter_(0, self.order, rank)
        self.lengths = torch.zeros_like(rank).scatter_add_(0, rank, torch.ones_like(rank))
        self.kept_R = kept_R

    def sum(self, value_R: Tensor) -> Tensor:
        value_R = torch.where(self.kept_R, value_R, 0.0)
        # Not index_add, whose order of addition is not fixed on a GPU.
        total = torch.segment_reduce(value_R[self.order], "sum", lengths=self.lengths, unsafe=True)
        return torch.where(self.kept_R, total[self.slot], 0.0)

    def mean(self, value_R: Tensor) -> Tensor:
        """The derivative of a mean is a mean."""
        return self.sum(value_R) / self.sum(torch.ones_like(value_R)).clamp(min=1)


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

    logp_R, entropy_R, advantage_R = kept(logp_R), kept(entropy_R), kept(rows.advantage_R)
    weight_R = kept(rows.token_weight_R)
    importance_R = None if rows.importance_weight_R is None else kept(rows.importance_weight_R)
    log_ratio_R = torch.zeros_like(logp_R) if rows.old_logp_R is None else logp_R - kept(rows.old_logp_R)
    counts_R = high_R = torch.ones_like(kept_R)  # rows whose policy term counts, rows of high entropy
    if config.top_entropy_quantile < 1:  # arXiv:2506.01939
        known_R = torch.where(kept_R, entropy_R, torch.nan)
        counts_R = high_R = entropy_R >= torch.nanquantile(known_R, 1 - config.top_entropy_quantile)
    sequences = None
    if config.needs_sequences:
        assert rows.sequence_R is not None
        sequences = _Sequences(rows.sequence_R, kept_R)
        if config.off_policy_mask_threshold is not None:  # arXiv:2512.02556
            far_R = sequences.mean(-log_ratio_R) > config.off_policy_mask_threshold
            counts_R = counts_R & ~(far_R & (advantage_R < 0))

    free_R = torch.ones_like(kept_R)  # rows whose log-ratio moves the ratio
    if config.policy == "geo_mean":
        token_R = log_ratio_R
        log_ratio_R = _geo_mean_bounded(token_R, advantage_R, config)
        free_R = (log_ratio_R == token_R) & (advantage_R != 0)
    whole = config.importance_sampling_level == "sequence"  # a row's log-ratio moves all of its sequence
    if config.importance_sampling_level == "token":
        ratio_R = log_ratio_R.exp()
    else:
        assert sequences is not None
        ratio_R = kept(sequences.mean(log_ratio_R)).exp()

    def by_ratio(d_R: Tensor) -> Tensor:
        """The derivative in logp of what has the derivative d_R in each row's log-ratio."""
        if whole:
            assert sequences is not None
            d_R = sequences.mean(d_R)
        return torch.where(free_R, d_R, 0.0)

    if config.policy == "vespo":
        assert sequences is not None
        term_R, d_logp_R = _vespo_term(logp_R, log_ratio_R, importance_R, advantage_R, sequences, config)
        clipped_R = torch.zeros_like(kept_R)
    else:
        term_R, d_logp_R, clipped_R = _policy_term(logp_R, ratio_R, advantage_R, config)
        if config.policy == "geo_mean":
            clipped_R = kept_R & ~free_R & (advantage_R != 0)
        if importance_R is not None:
            term_R, d_logp_R = term_R * importance_R, d_logp_R * importance_R
    term_R, d_logp_R = torch.where(counts_R, term_R, 0.0), weight_R * torch.where(counts_R, d_logp_R, 0.0)
    if config.policy not in ("cispo", "vespo"):  # whose ratios are constants
        d_logp_R = by_ratio(d_logp_R)
    kl_R = torch.zeros_like(logp_R)
    if rows.ref_logp_R is not None:
        kl_R, d_kl_R = _kl(kept(rows.ref_logp_R) - logp_R, config.kl_estimator)
        if config.use_bias_correction_kl:
            kl_R, d_kl_R = kl_R * ratio_R, d_kl_R * ratio_R
        if config.beta != 0:
            term_R, d_logp_R = term_R + config.beta * kl_R, d_logp_R + weight_R * config.beta * d_kl_R
            if config.use_bias_correction_kl:
                d_logp_R = d_logp_R + by_ratio(weight_R * config.beta * kl_R)
    loss_R, d_entropy_R = weight_R * term_R, torch.zeros_like(logp_R)
    if config.entropy_coef != 0:
        share_R = weight_R if rows.entropy_weight_R is None else kept(rows.entropy_weight_R)
        d_entropy_R = -config.entropy_coef * torch.where(high_R, share_R, 0.0)
        loss_R = loss_R + d_entropy_R * entropy_R
    return RowLoss(loss_R, d_logp_R, d_entropy_R, kl_R, ratio_R, clipped_R)


def _geo_mean_bounded(log_ratio_R: Tensor, advantage_R: Tensor, config: GRPOLossConfig) -> Tensor:
    """GMPO's log-ratios, bounded on the side to which the advantage pushes. Source: arXiv:2507.20673."""
    bounded_R = log_ratio_R.clamp(-config.epsilon, config.clip_high)
    pushed_R = torch.where(advantage_R > 0, log_ratio_R.minimum(bounded_R), log_ratio_R.maximum(bounded_R))
    return torch.where(advantage_R == 0, 0.0, pushed_R)


def _vespo_term(
    logp_R: Tensor,
    log_ratio_R: Tensor,
    importance_R: Tensor | None,
    advantage_R: Tensor,
    sequences: _Sequences,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor]:
    """VESPO's policy term and its derivative in logp. Source: arXiv:2602.10693, with TRL's bounds.

    -phi(w) A logp with phi(w) = e^lambda w^k e^(-lambda w) and w the product of a sequence's ratios and
    importance weights. phi is a constant.
    """
    log_w_R = sequences.sum(log_ratio_R.clamp(-20, 20))
    if importance_R is not None:
        log_w_R = log_w_R + sequences.sum(importance_R.log().clamp(LOG_1E_8, 20))
    log_w_R = log_w_R.clamp(LOG_1E_8, 20)
    rises_R = advantage_R >= 0
    k_R = torch.where(rises_R, config.vespo_k_pos, torch.full_like(logp_R, config.vespo_k_neg))
    lambda_R = torch.where(rises_R, config.vespo_lambda_pos, torch.full_like(logp_R, config.vespo_lambda_neg))
    phi_R = (lambda_R + k_R * log_w_R - lambda_R * log_w_R.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
    return -phi_R * advantage_R * logp_R, -phi_R * advantage_R


def _policy_term(
    logp_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, config: GRPOLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy term (to be minimised), its derivative in the log-ratio, and which rows were clipped.

    Where a bound replaces the ratio, the derivative is exactly 0 and is not multiplied by the ratio, which
    may have overflowed. Comparisons are written so that a NaN ratio stays NaN.
    """
    high = config.clip_high
    if config.policy == "geo_mean":
        return -ratio_R * advantage_R, -ratio_R * advantage_R, torch.zeros_like(ratio_R, dtype=torch.bool)
    if config.policy == "cispo":  # arXiv:2506.13585; only logp is differentiated
        weight_R = -ratio_R.clamp(config.cispo_low, high) * advantage_R
        clipped_R = (ratio_R > high) & (advantage_R > 0)
        if config.cispo_low is not None:
            clipped_R = clipped_R | ((ratio_R < config.cispo_low) & (advantage_R < 0))
        return weight_R * logp_R, weight_R, clipped_R
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
    if estimator == "abs":
        return d_R.abs(), -d_R.sign()
    if estimator == "k1+":  # straight through: the value of one, the derivative of k2
        return -d_R, -d_R
    k3_R, d_k3_R = torch.expm1(d_R) - d_R, -torch.expm1(d_R)
    if estimator == "k3+":
        return k3_R, -d_R
    if estimator == "low_var_kl":  # verl's k3
        return k3_R.clamp(max=10), torch.where(k3_R > 10, 0.0, d_k3_R)
    return k3_R, d_k3_R
