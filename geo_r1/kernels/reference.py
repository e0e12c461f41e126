"""The losses in plain torch: the formula, differentiable, that every op goes through, and the walk in chunks.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

Rows of weight zero contribute exactly zero, to the loss and to every gradient, whatever they hold.

Source: GRPO, arXiv:2402.03300; names and options follow TRL's GRPOTrainer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geo_r1.kernels.loss_config import GRPOLossConfig

# sigmoid(40) is 1 in float64, with derivative 0: SAPO's ratio may be held there without changing a bit.
_SAPO_SATURATED = 40.0


def row_statistics(logits_RV: Tensor, target_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the entropy of its distribution.

        z = logits / temperature;  logp = z[target] - logsumexp(z);  H = -sum_v p_v log p_v

    Args:
        logits_RV: [R, V] floating; may hold -inf (entries that cannot be drawn).
        target_R: [R] int64 in [0, V).
        temperature: divides the logits.

    Returns:
        logp_R, entropy_R: [R] float32 (float64 for float64 logits), nats, differentiable.
    """
    z_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature
    logp_RV = z_RV.log_softmax(-1)
    p_RV = logp_RV.exp()
    # 0 log 0 = 0, and its gradient is 0 too.
    entropy_R = -(p_RV * logp_RV.masked_fill(p_RV == 0, 0.0)).sum(-1)
    return logp_RV.gather(1, target_R[:, None]).squeeze(1), entropy_R


def grpo_row_loss(
    logp_R: Tensor,
    entropy_R: Tensor,
    advantage_R: Tensor,
    token_weight_R: Tensor,
    old_logp_R: Tensor | None,
    ref_logp_R: Tensor | None,
    importance_weight_R: Tensor | None,
    sequence_R: Tensor | None,
    config: GRPOLossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's weighted part of the loss, and its report. Only logp and entropy get gradients.

    Args:
        logp_R, entropy_R: [R] float32 or float64, nats; the dtype everything is computed in.
        advantage_R, token_weight_R: [R] floating, no unit.
        old_logp_R, ref_logp_R: [R] floating, nats, or None.
        importance_weight_R: [R] floating, multiplies the policy term, or None for 1.
        sequence_R: [R] int64 ids, any values; read where ratios are per sequence.
        config: options of the loss.

    Returns:
        loss_R (differentiable), kl_R, ratio_R, clipped_R (bool). Rows of weight zero: 0, 0, 1, False.
    """
    kept_R = token_weight_R != 0

    def kept(value_R: Tensor) -> Tensor:
        return torch.where(kept_R, value_R, 0.0)

    def constant(value_R: Tensor) -> Tensor:
        return kept(value_R.detach().to(logp_R.dtype))

    # Every input is made finite on dropped rows first: a zero times a NaN further down would be a NaN.
    logp_R = kept(logp_R)
    old_R = logp_R.detach() if old_logp_R is None else constant(old_logp_R)
    advantage_R = constant(advantage_R)
    log_ratio_R = logp_R - old_R
    if config.importance_sampling_level == "sequence":
        assert sequence_R is not None
        log_ratio_R = kept(_sequence_mean(log_ratio_R, kept_R, sequence_R))

    term_R, clipped_R = _policy_term(logp_R, log_ratio_R, advantage_R, config)
    if importance_weight_R is not None:
        term_R = term_R * constant(importance_weight_R)
    kl_R = torch.zeros_like(logp_R)
    if ref_logp_R is not None:
        kl_R = _kl(constant(ref_logp_R) - logp_R, config.kl_estimator)
    if config.beta != 0:
        term_R = term_R + config.beta * kl_R
    if config.entropy_coef != 0:
        term_R = term_R - config.entropy_coef * kept(entropy_R)
    loss_R = constant(token_weight_R) * term_R
    return loss_R, kl_R.detach(), log_ratio_R.detach().exp(), clipped_R


def _sequence_mean(value_R: Tensor, kept_R: Tensor, sequence_R: Tensor) -> Tensor:
    """Mean over the kept rows of each row's sequence; the ids need be neither sorted nor dense."""
    # Dense ids by sorting: R of them at most, and no host sync as torch.unique would need.
    ordered, order = sequence_R.sort()
    rank = torch.zeros_like(ordered)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    slot = torch.empty_like(rank).scatter_(0, order, rank)
    count = value_R.new_zeros(value_R.shape).index_add(0, slot, kept_R.to(value_R.dtype))
    total = torch.zeros_like(value_R).index_add(0, slot, value_R)
    return (total / count.clamp(min=1))[slot]


def _policy_term(
    logp_R: Tensor, log_ratio_R: Tensor, advantage_R: Tensor, config: GRPOLossConfig
) -> tuple[Tensor, Tensor]:
    """The policy term (to be minimised) and where the ratio was clipped."""
    ratio_R = log_ratio_R.detach().exp()
    high = config.clip_high
    if config.policy == "cispo":  # arXiv:2506.13585
        term_R = -ratio_R.clamp(max=high) * advantage_R * logp_R
        return term_R, (ratio_R > high) & (advantage_R > 0)
    if config.policy == "sapo":  # arXiv:2511.20347
        cold_R = torch.full_like(ratio_R, config.sapo_temperature_neg)
        temperature_R = torch.where(advantage_R > 0, config.sapo_temperature_pos, cold_R)
        coef_R = _live_ratio(log_ratio_R, ratio_R.minimum(1 + _SAPO_SATURATED / temperature_R))
        gate_R = torch.sigmoid(temperature_R * (coef_R - 1)) * 4 / temperature_R
        return -advantage_R * gate_R, torch.zeros_like(ratio_R, dtype=torch.bool)
    # Clipped PPO; delta bounds the side that the clip leaves open (arXiv:2505.07291).
    low_R = ratio_R.clamp(1 - config.epsilon, 1 + high)
    open_R = ratio_R if config.delta is None else ratio_R.clamp(max=config.delta)
    # A zero advantage compares as NaN when its ratio overflows; False then takes the bounded side.
    chosen_R = torch.where(open_R * advantage_R <= low_R * advantage_R, open_R, low_R)
    clipped_R = ((ratio_R < 1 - config.epsilon) & (advantage_R < 0)) | (
        (ratio_R > 1 + high) & (advantage_R > 0)
    )
    return -_live_ratio(log_ratio_R, chosen_R) * advantage_R, clipped_R


def _live_ratio(log_ratio_R: Tensor, chosen_R: Tensor) -> Tensor:
    """`chosen` as a value; the ratio's gradient where it is the ratio, zero where a bound replaced it.

    exp is not evaluated where a bound holds: its derivative may be inf there, and 0 * inf is NaN.
    """
    ratio_R = log_ratio_R.detach().exp()
    held_R = (chosen_R < ratio_R) | (chosen_R > ratio_R)  # not !=: a NaN ratio must give a NaN gradient
    return torch.where(held_R, chosen_R, torch.where(held_R, 0.0, log_ratio_R).exp())


def _kl(d_R: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) from d = ref_logp - logp, nats (http://joschu.net/blog/kl-approx.html)."""
    if estimator == "k1":
        return -d_R
    if estimator == "k2":
        return d_R.square() / 2
    return torch.expm1(d_R) - d_R


class ChunkWalk:
    """Walks chunks of rows through the vocabulary in one scratch: statistics first, then their gradients."""

    def __init__(
        self,
        hidden_RC: Tensor,
        lm_head_VC: Tensor,
        target_R: Tensor,
        temperature: float,
        scratch_bytes: int,
        *,
        needs_hidden: bool = False,
        needs_head: bool = False,
    ) -> None:
        self.hidden_RC, self.lm_head_VC, self.target_R = hidden_RC, lm_head_VC, target_R
        self.temperature = temperature
        (num_rows, hidden_size), vocab_size = hidden_RC.shape, lm_head_VC.shape[0]
        dtype, wide = hidden_RC.dtype, torch.promote_types(hidden_RC.dtype, torch.float32)
        self.narrow = dtype != wide
        # Two wide buffers and, where products run in a narrower dtype, one for them; a block of the head's
        # gradient then needs one too, an eighth of the scratch.
        block_bytes = scratch_bytes // 8 if self.narrow and needs_head else 0
        row_bytes = vocab_size * (2 * wide.itemsize + (dtype.itemsize if self.narrow else 0))
        self.num_chunk_rows = max(1, min(num_rows, (scratch_bytes - block_bytes) // row_bytes))
        shape = (self.num_chunk_rows, vocab_size)
        self.exp_rV = hidden_RC.new_empty(shape, dtype=wide)
        self.logit_rV = hidden_RC.new_empty(shape, dtype=wide)
        self.product_rV = hidden_RC.new_empty(shape) if self.narrow else self.logit_rV
        self.d_hidden_RC = hidden_RC.new_empty(hidden_RC.shape) if needs_hidden else None
        self.d_head_VC = lm_head_VC.new_zeros(lm_head_VC.shape, dtype=wide) if needs_head else None
        if block_bytes:
            num_block_rows = max(1, min(vocab_size, block_bytes // (hidden_size * dtype.itemsize)))
            self.block_vC = hidden_RC.new_empty(num_block_rows, hidden_size)

    def chunks(self) -> Iterator[slice]:
        """Slices of rows; one, empty, where there are no rows."""
        num_rows = self.hidden_RC.shape[0]
        for start in range(0, max(num_rows, 1), self.num_chunk_rows):
            yield slice(start, min(start + self.num_chunk_rows, num_rows))

    def statistics(self, rows: slice) -> tuple[Tensor, Tensor]:
        """logp and entropy of a chunk; leaves what `gradients` needs in the scratch."""
        num_rows = rows.stop - rows.start
        logit_rV, exp_rV = self.logit_rV[:num_rows], self.exp_rV[:num_rows]
        product_rV = self.product_rV[:num_rows] if self.narrow else logit_rV
        torch.mm(self.hidden_RC[rows], self.lm_head_VC.t(), out=product_rV)
        if self.narrow:
            logit_rV.copy_(product_rV)
        if self.temperature != 1:
            logit_rV.div_(self.temperature)
        logit_rV.sub_(logit_rV.amax(-1, keepdim=True))
        drawn_r = logit_rV.gather(1, self.target_R[rows, None]).squeeze(1)
        torch.exp(logit_rV, out=exp_rV)
        self.sum_r = exp_rV.sum(-1)
        # From here the logits' buffer holds exp(z) z: the entropy's sum, and all its gradient needs of z.
        mean_r = logit_rV.mul_(exp_rV).sum(-1) / self.sum_r
        self.lse_r = self.sum_r.log()
        self.entropy_r = self.lse_r - mean_r
        return drawn_r - self.lse_r, self.entropy_r.clone()

    def gradients(self, rows: slice, d_logp_r: Tensor | None, d_entropy_r: Tensor | None) -> None:
        """Add a chunk's part of both gradients, right after its `statistics`, whose scratch it uses up."""
        num_rows = rows.stop - rows.start
        d_logit_rV = self.exp_rV[:num_rows]  # exp(z) = p sum becomes dlogits, in place
        if d_logp_r is None:
            d_logp_r = torch.zeros_like(self.sum_r)
        d_logp_r = d_logp_r / self.temperature
        coef_r = -d_logp_r
        if d_entropy_r is not None:  # -dH p (log p + H) = -dH / sum (exp(z) z + exp(z) (H - lse))
            d_entropy_r = d_entropy_r / self.temperature
            coef_r = coef_r - d_entropy_r * (self.entropy_r - self.lse_r)
        d_logit_rV.mul_((coef_r / self.sum_r)[:, None])
        if d_entropy_r is not None:
            d_logit_rV.addcmul_(self.logit_rV[:num_rows], (-d_entropy_r / self.sum_r)[:, None])
        d_logit_rV.scatter_add_(1, self.target_R[rows, None], d_logp_r[:, None])
        if self.narrow:
            d_logit_rV = self.product_rV[:num_rows].copy_(d_logit_rV)
        if self.d_hidden_RC is not None:
            torch.mm(d_logit_rV, self.lm_head_VC, out=self.d_hidden_RC[rows])
        if self.d_head_VC is None:
            return
        if not self.narrow:
            self.d_head_VC.addmm_(d_logit_rV.t(), self.hidden_RC[rows])
            return
        for start in range(0, self.d_head_VC.shape[0], self.block_vC.shape[0]):
            head_vC = self.d_head_VC[start : start + self.block_vC.shape[0]]
            block_vC = self.block_vC[: head_vC.shape[0]]
            torch.mm(d_logit_rV[:, start : start + head_vC.shape[0]].t(), self.hidden_RC[rows], out=block_vC)
            head_vC.add_(block_vC)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients in the inputs' dtype, None where not asked for."""
        d_head_VC = None if self.d_head_VC is None else self.d_head_VC.to(self.lm_head_VC.dtype)
        return self.d_hidden_RC, d_head_VC
