"""Inputs of the loss benchmarks, the loss as TRL writes it, its float64 truth, and cases made from them.

Logits have a standard deviation of 3 and targets are drawn from them, so that distributions are as peaked as
a language model's. Old log-probabilities keep every ratio clear of the clip bounds, so that a rounding error
cannot move a row across one: that would be an error of the inputs, not of an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DTYPE, Case, Provider, Tensors, ours, torch_ways
from geo_r1.kernels import GRPOLossConfig

CONFIG = GRPOLossConfig(epsilon=0.2, beta=0.04)
LOGIT_STD = 3.0
TRUTH_BYTES = 2**30  # a float64 chunk of logits; a few of them live at once
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # logits near 10 round by 0.03 in bfloat16

# Per-token loss of some rows from their log-probabilities.
TokenLoss = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class LossSize:
    """R loss rows of `sequences` completions of equal length, hidden size C, V vocabulary."""

    rows: int
    hidden: int
    vocab: int
    sequences: int = 8

    def __str__(self) -> str:
        return f"R={self.rows} C={self.hidden} V={self.vocab}"

    @property
    def of_logits(self) -> str:
        return f"R={self.rows} V={self.vocab}"


@dataclass(frozen=True)
class LossInputs:
    """Inputs of every provider; hidden states and head are leaves."""

    hidden_RC: Tensor
    head_VC: Tensor
    target_R: Tensor
    advantage_R: Tensor
    weight_R: Tensor
    old_logp_R: Tensor
    ref_logp_R: Tensor

    def token_loss(self, logp_R: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weighted clipped loss with its k3 KL, as TRL's `_compute_loss` writes it."""
        old_R, ref_R, advantage_R = (
            row_R[rows].to(logp_R.dtype) for row_R in (self.old_logp_R, self.ref_logp_R, self.advantage_R)
        )
        ratio_R = torch.exp(logp_R - old_R)
        clipped_R = torch.clamp(ratio_R, 1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
        policy_R = -torch.min(ratio_R * advantage_R, clipped_R * advantage_R)
        kl_R = torch.exp(ref_R - logp_R) - (ref_R - logp_R) - 1
        return (policy_R + CONFIG.beta * kl_R) * self.weight_R[rows]

    def cross_entropy(self, logp_R: Tensor, rows: slice = slice(None)) -> Tensor:
        return -logp_R * self.weight_R[rows]

    def per_sequence(self, size: LossSize) -> Tensors:
        """Liger's arguments: targets, old and reference log-probabilities, mask [N, L]; advantages [N]."""
        shape = (size.sequences, -1)
        target, old, ref = (x.view(shape) for x in (self.target_R, self.old_logp_R, self.ref_logp_R))
        return target, old, ref, torch.ones_like(target), self.advantage_R.view(shape)[:, 0].contiguous()

    def rows(self) -> dict[str, Tensor]:
        """Arguments of our GRPO losses after hidden states and head, or logits."""
        return {
            "target_R": self.target_R,
            "advantage_R": self.advantage_R,
            "token_weight_R": self.weight_R,
            "old_logp_R": self.old_logp_R,
            "ref_logp_R": self.ref_logp_R,
        }


def loss_inputs(size: LossSize, dtype: torch.dtype, device: torch.device) -> LossInputs:
    """Random inputs, the same for the same arguments."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden_RC = normal(size.rows, size.hidden).to(dtype)
    head_VC = (normal(size.vocab, size.hidden) * LOGIT_STD * size.hidden**-0.5).to(dtype)
    targets, logps = [], []
    for rows in chunks(size.rows, size.vocab):
        logp_rV = (hidden_RC[rows] @ head_VC.T).float().log_softmax(-1)
        targets.append(torch.multinomial(logp_rV.exp(), 1, generator=g))
        logps.append(logp_rV.gather(1, targets[-1]))
    logp_R = torch.cat(logps).squeeze(1)
    shifts = torch.tensor([-0.5, -0.05, 0.05, 0.4], device=device)
    draw_R = torch.randint(0, 4, (size.rows,), generator=g, device=device)
    # One advantage per completion, above 0 on average: near 0 a loss's relative error would mean nothing.
    advantage_R = (normal(size.sequences) + 0.5).repeat_interleave(size.rows // size.sequences)
    return LossInputs(
        hidden_RC.requires_grad_(),
        head_VC.requires_grad_(),
        torch.cat(targets).squeeze(1),
        advantage_R,
        torch.full((size.rows,), 1 / size.rows, device=device),
        logp_R - shifts[draw_R],
        logp_R + 0.1 * normal(size.rows),
    )


def chunks(num_rows: int, vocab: int) -> list[slice]:
    step = max(1, TRUTH_BYTES // (8 * vocab))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def logp_of(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    """Per-token log-probabilities from full logits, statistics in at least float32.

    Cross-entropy is torch's fastest way (0.7 of the time of gather minus logsumexp on a CPU).
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return -F.cross_entropy(wide_RV, target_R, reduction="none")


def gradients(*leaves: Tensor) -> Callable[[Tensor], Tensors]:
    """A function that turns a loss into results: the loss and its gradients."""
    return lambda loss: (loss.detach(), *torch.autograd.grad(loss, leaves))


def logits_of(*leaves: Tensor) -> Tensor:
    """The logits themselves, or the product of hidden states and head."""
    return leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T


def truth(inputs: LossInputs, token_loss: TokenLoss, leaves: Tensors) -> Tensors:
    """Loss and gradients of the leaves over all rows, in float64, a chunk of rows at a time."""
    first, *head = (leaf.detach().double().requires_grad_() for leaf in leaves)
    loss = torch.zeros((), dtype=torch.float64, device=first.device)
    for rows in chunks(len(first), len(inputs.head_VC)):
        logp_r = logp_of(logits_of(first[rows], *head), inputs.target_R[rows])
        part = token_loss(logp_r, rows).sum()
        part.backward()
        loss += part.detach()
    return (loss, *(leaf.grad for leaf in (first, *head)))


def loss_case(
    op: str,
    size: LossSize,
    inputs: LossInputs,
    token_loss: TokenLoss,
    leaves: Tensors,
    call: Callable[[str], Tensor],
    peers: Mapping[str, Provider],
    **work: float,
) -> Case:
    """A loss and its gradients: our implementations, plain torch with all logits at once, and peers.

    Args:
        leaves: hidden states and head, or logits.
        call: our op's loss, given an implementation's name.
        work: `flops` and `bytes`.
    """
    finish = gradients(*leaves)

    def plain(*leaves: Tensor) -> Tensor:
        return token_loss(logp_of(logits_of(*leaves), inputs.target_R), slice(None)).sum()

    providers = {
        **ours(op, lambda impl: lambda: finish(call(impl))),
        **torch_ways(plain, leaves, finish),
        **peers,
    }
    return Case(
        op,
        str(size) if len(leaves) == 2 else size.of_logits,
        DTYPE,
        TOLERANCE[DTYPE],
        providers,
        lambda: truth(inputs, token_loss, leaves),
        **work,
    )
