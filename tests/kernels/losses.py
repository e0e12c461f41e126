"""Inputs for the loss tests, and the loss written again, with loops, straight from the papers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from geo_r1.kernels import GRPOLossConfig


@dataclass
class LossCase:
    hidden_RC: Tensor
    lm_head_VC: Tensor
    target_R: Tensor
    advantage_R: Tensor
    token_weight_R: Tensor
    old_logp_R: Tensor | None
    ref_logp_R: Tensor | None
    importance_weight_R: Tensor | None
    sequence_R: Tensor
    entropy_weight_R: Tensor | None = None

    def leaves(self) -> "LossCase":
        """The same values, hidden states and head as fresh leaves that want gradients."""
        hidden_RC, lm_head_VC = (
            x.detach().clone().requires_grad_() for x in (self.hidden_RC, self.lm_head_VC)
        )
        return replace(self, hidden_RC=hidden_RC, lm_head_VC=lm_head_VC)

    def rows(self) -> dict[str, Tensor | None]:
        """Everything but hidden states and head, by argument name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}


def loss_case(
    num_rows: int, vocab: int, hidden: int = 8, *, dtype=torch.float64, seed: int = 0, scale: float = 1.0
) -> LossCase:
    """Rows of four interleaved sequences, some of no advantage or no weight, ratios on both sides of 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden_RC, lm_head_VC = (scale * normal(num_rows, hidden)).to(dtype), normal(vocab, hidden).to(dtype)
    target_R = torch.randint(0, vocab, (num_rows,), generator=g)
    logp_R = (
        (hidden_RC.double() @ lm_head_VC.double().T).log_softmax(-1).gather(1, target_R[:, None]).squeeze(1)
    )
    advantage_R, token_weight_R = normal(num_rows), torch.rand(num_rows, generator=g, dtype=torch.float64)
    advantage_R[3::7] = 0
    token_weight_R[2::5] = 0
    sequence_R = torch.tensor([40, -3, 7, 12])[torch.randint(0, 4, (num_rows,), generator=g)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (
        advantage_R,
        token_weight_R,
        logp_R + 0.5 * normal(num_rows),
        logp_R + 0.5 * normal(num_rows),
        torch.rand(num_rows, generator=g, dtype=torch.float64) * 2,
    )
    return LossCase(hidden_RC, lm_head_VC, target_R, *(row.to(wide) for row in rows), sequence_R)


def full_logits(case: LossCase) -> Tensor:
    return case.hidden_RC @ case.lm_head_VC.T


def written_out(
    logits_RV: Tensor, case: LossCase, config: GRPOLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its reports, row by row. Weightless rows are never looked at."""
    logp_RV = (logits_RV / config.temperature).log_softmax(-1)
    kept = [r for r in range(len(logits_RV)) if case.token_weight_R[r] != 0]
    logp = {r: logp_RV[r, case.target_R[r]] for r in kept}
    log_ratio = {
        r: logp[r] - (logp[r].detach() if case.old_logp_R is None else case.old_logp_R[r]) for r in kept
    }
    entropy = {r: -(logp_RV[r].exp() * logp_RV[r]).sum() for r in kept}
    members = {r: [s for s in kept if case.sequence_R[s] == case.sequence_R[r]] for r in kept}
    A_of = case.advantage_R

    def sequence_mean(values):
        return {r: torch.stack([values[s] for s in members[r]]).mean() for r in kept}

    in_policy = {r: True for r in kept}
    entropies = torch.tensor([entropy[r].item() for r in kept], dtype=logits_RV.dtype)
    high = {r: True for r in kept}
    if config.top_entropy_quantile < 1 and kept:
        threshold = torch.quantile(entropies, 1 - config.top_entropy_quantile)
        high = in_policy = {r: bool(entropy[r] >= threshold) for r in kept}
    if config.off_policy_mask_threshold is not None:
        drift = sequence_mean({r: -log_ratio[r].detach() for r in kept})
        near = {r: A_of[r] >= 0 or drift[r] <= config.off_policy_mask_threshold for r in kept}
        in_policy = {r: in_policy[r] and bool(near[r]) for r in kept}
    token_log_ratio = log_ratio
    epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    moved = {}
    if config.policy == "geo_mean":
        sign = {r: A_of[r].sign() for r in kept}
        clamped = {r: log_ratio[r].clamp(-config.epsilon, epsilon_high) for r in kept}
        log_ratio = {r: sign[r] * torch.min(sign[r] * log_ratio[r], sign[r] * clamped[r]) for r in kept}
        moved = {r: bool(log_ratio[r] != token_log_ratio[r] and A_of[r] != 0) for r in kept}
    if config.importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio)
    if config.importance_sampling_level == "sequence_token":
        held = sequence_mean({r: log_ratio[r].detach() for r in kept})
        log_ratio = {r: held[r] + logp[r] - logp[r].detach() for r in kept}
    one = torch.ones((), dtype=logits_RV.dtype)
    loss = logits_RV.sum() * 0
    report = {name: torch.zeros(len(logits_RV), dtype=logits_RV.dtype) for name in ("logp", "entropy", "kl")}
    report["ratio"] = torch.ones(len(logits_RV), dtype=logits_RV.dtype)
    report["clipped"] = torch.zeros(len(logits_RV), dtype=torch.bool)
    for r in kept:
        ratio, A = log_ratio[r].exp(), case.advantage_R[r]
        clipped = False
        if config.policy == "clip":
            bounded = ratio if config.delta is None else torch.min(ratio, config.delta * one)
            clamped = torch.clamp(ratio, 1 - config.epsilon, 1 + epsilon_high)
            term = -torch.min(bounded * A, clamped * A)
            clipped = (ratio < 1 - config.epsilon and A < 0) or (ratio > 1 + epsilon_high and A > 0)
        elif config.policy == "cispo":
            low = 0.0 if config.cispo_low is None else config.cispo_low
            term = -torch.clamp(ratio, low, epsilon_high).detach() * A * logp[r]
            clipped = (ratio > epsilon_high and A > 0) or (ratio < low and A < 0)
        elif config.policy == "geo_mean":
            term, clipped = -ratio * A, moved[r]
        elif config.policy == "vespo":
            log_w = sum(token_log_ratio[s].detach().clamp(-20, 20) for s in members[r])
            if case.importance_weight_R is not None:
                log_w = log_w + sum(case.importance_weight_R[s].log() for s in members[r])
            log_w = torch.as_tensor(log_w).clamp(math.log(1e-8), 20)
            k, rate = (
                (config.vespo_k_pos, config.vespo_lambda_pos)
                if A >= 0
                else (config.vespo_k_neg, config.vespo_lambda_neg)
            )
            phi = math.exp(rate) * log_w.exp() ** k * torch.exp(-rate * log_w.exp())
            term = -phi * A * logp[r]
        else:
            tau = config.sapo_temperature_pos if A > 0 else config.sapo_temperature_neg
            term = -4 / tau * A / (1 + torch.exp(-tau * (ratio - 1)))
        if case.importance_weight_R is not None and config.policy != "vespo":
            term = term * case.importance_weight_R[r]
        if not in_policy[r]:
            term = 0 * one
        kl = 0 * one
        if case.ref_logp_R is not None:
            d = case.ref_logp_R[r] - logp[r]
            k2, k3 = d**2 / 2, d.exp() - d - 1
            through = k2 - k2.detach()
            kl = {
                "k1": -d,
                "k2": k2,
                "k3": k3,
                "abs": d.abs(),
                "k1+": -d.detach() + through,
                "k3+": k3.detach() + through,
                "low_var_kl": k3.clamp(max=10),
            }[config.kl_estimator]
            if config.use_bias_correction_kl:
                kl = kl * ratio
        loss = loss + case.token_weight_R[r] * (term + config.beta * kl)
        share = (case.token_weight_R if case.entropy_weight_R is None else case.entropy_weight_R)[r]
        loss = loss - config.entropy_coef * share * high[r] * entropy[r]
        values = {"logp": logp[r], "entropy": entropy[r], "kl": kl, "ratio": ratio, "clipped": clipped}
        for name, value in values.items():
            report[name][r] = value.detach() if isinstance(value, Tensor) else value
    return loss, report


@dataclass
class Recorded:
    """Records of the allocator and the dispatcher, within custom ops too."""

    peak_bytes: int  # above what lived before
    largest_bytes: int
    products: int


def recorded(run: Callable[[], object]) -> Recorded:
    """Run once, and record every allocation and matrix product on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    live = peak = largest = products = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak, largest = max(peak, live), max(largest, event.nbytes())
        products += event.name() in ("aten::mm", "aten::addmm_")
    del result  # what it returned counts
    return Recorded(peak, largest, products)
