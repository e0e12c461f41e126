"""Every op and implementation that runs here, against the reference in float64: values and gradients.

Small inputs of awkward sizes. An error may be at most twice that of the reference in the same dtype, plus
what is too little to compare: SLACK, or a tenth of the dtype's epsilon.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import ON_GPU, relative_errors
from geo_r1.kernels import (
    GRPOLossConfig,
    PackedLayout,
    available_impls,
    group_advantage,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_logprob,
    packed_attention,
)

# Triton's interpreter is wrong in bfloat16, and slow.
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
ROWS, HIDDEN, VOCABS = (130, 128, (5003, 4096)) if ON_GPU else (5, 16, (1003,))
SLACK = 5e-6
CONFIG = GRPOLossConfig(beta=0.1, entropy_coef=0.1, delta=2.0, temperature=0.9)
Check = Callable[[torch.dtype, str], list[Tensor]]  # results in a dtype with an implementation


def leaves(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers that every dtype holds, so that all start from the same values."""
    g = torch.Generator().manual_seed(seed)
    narrow = torch.bfloat16 if ON_GPU else torch.float32
    device = "cuda" if ON_GPU else "cpu"
    return [torch.randn(s, generator=g).to(narrow).to(device, dtype).requires_grad_() for s in shapes]


def with_gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Results and the gradients of a sum of them with unequal weights."""
    weights = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x) for x in results]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, inputs, weights))]


def advantages(dtype: torch.dtype, impl: str) -> list[Tensor]:
    (reward,) = leaves(1, torch.float32, (134,))
    cu_group = torch.tensor([0, 3, 3, 4, 134], dtype=torch.int32, device=reward.device)
    valid = reward > -1
    return [
        group_advantage(reward.detach().to(dtype), cu_group, valid_N=valid, scale=scale, impl=impl)
        for scale in ("group", "batch")
    ]


def loss(through_head: bool, vocab: int) -> Check:
    def check(dtype: torch.dtype, impl: str) -> list[Tensor]:
        hidden, head = leaves(2, dtype, (ROWS, HIDDEN), (vocab, HIDDEN))
        logits = (hidden.double() @ head.double().T).to(dtype).detach().requires_grad_()
        rows = torch.arange(ROWS, device=hidden.device)
        target = rows * 7 % vocab
        logp = (hidden.double() @ head.double().T / CONFIG.temperature).log_softmax(-1).detach()[rows, target]
        # Ratios on every side of the bounds, and clear of them, so that no rounding moves a row across.
        shift = torch.tensor([-0.5, -0.05, 0.05, 0.4, 1.0], device=hidden.device)[rows % 5]
        advantage, weight = (rows % 3 - 0.5).to(logp.dtype), torch.full_like(logp, 1 / ROWS)
        wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in (advantage, weight, logp - shift)]
        given = {"old_logp_R": wide[2], "ref_logp_R": wide[2], "config": CONFIG, "impl": impl}
        if through_head:
            out = linear_grpo_loss(hidden, head, target, *wide[:2], **given)
            return with_gradients([out.loss], [hidden, head])
        return with_gradients([grpo_loss(logits, target, *wide[:2], **given).loss], [logits])

    return check


def logprobs(vocab: int) -> Check:
    def check(dtype: torch.dtype, impl: str) -> list[Tensor]:
        hidden, head = leaves(5, dtype, (ROWS, HIDDEN), (vocab, HIDDEN))
        target = torch.arange(ROWS, device=hidden.device)
        return with_gradients([*linear_logprob(hidden, head, target, impl=impl)], [hidden, head])

    return check


def cross_entropy(dtype: torch.dtype, impl: str) -> list[Tensor]:
    hidden, head = leaves(6, dtype, (ROWS, HIDDEN), (VOCABS[0], HIDDEN))
    target = torch.arange(ROWS, device=hidden.device)
    weight = torch.full((ROWS,), 1 / ROWS, device=hidden.device)
    return with_gradients([linear_cross_entropy(hidden, head, target, weight, impl=impl)], [hidden, head])


def attention(lengths: tuple, heads: tuple[int, int], head_size: int, causal: bool) -> Check:
    def check(dtype: torch.dtype, impl: str) -> list[Tensor]:
        layout = PackedLayout.from_lengths(*lengths, "cuda" if ON_GPU else "cpu")
        shapes = [(layout.num_tokens, n, head_size) for n in (heads[0], heads[1], heads[1])]
        q, k, v = leaves(7, dtype, *shapes)
        return with_gradients([packed_attention(q, k, v, layout, causal=causal, impl=impl)], [q, k, v])

    return check


SHARED = ((150, 3), ((0, 1, 63, 130), (7,))) if ON_GPU else ((9, 3), ((0, 1, 5), (2,)))
CHECKS: dict[tuple[str, str], Check] = {
    ("group_advantage", "ragged"): advantages,
    **{("grpo_loss", f"V={vocab}"): loss(False, vocab) for vocab in VOCABS},
    **{("linear_grpo_loss", f"V={vocab}"): loss(True, vocab) for vocab in VOCABS},
    **{("linear_logprob", f"V={vocab}"): logprobs(vocab) for vocab in VOCABS},
    ("linear_cross_entropy", "summed"): cross_entropy,
    ("packed_attention", "shared prompt, D=128"): attention(SHARED, (4, 2), 128 if ON_GPU else 16, True),
    ("packed_attention", "windows, D=80"): attention(
        ((64, 48, 0, 16, 1) if ON_GPU else (16, 0, 3), None), (2, 2), 80, False
    ),
    ("packed_attention", "images, D=80"): attention(
        ((200, 70) if ON_GPU else (40, 7), None), (2, 2), 80, False
    ),
}


def names(op: str) -> list[str]:
    return [impl for impl in available_impls()[op] if impl != "reference"] or ["reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("op", "case", "impl"),
    [(op, case, impl) for op, case in CHECKS for impl in names(op)],
)
def test_op(op, case, impl, dtype, record_property):
    check = CHECKS[op, case]
    if op == "packed_attention" and impl in ("flash", "cuda") and dtype == torch.float32:
        pytest.skip(f"{impl} takes no float32")
    expected = [x.double() for x in check(torch.float64, "reference")]
    plain = relative_errors(check(dtype, "reference"), expected)
    errors = relative_errors(check(dtype, impl), expected)
    record_property("found", {"errors": errors, "plain torch": plain})
    allowed = [2 * error + max(SLACK, torch.finfo(dtype).eps / 10) for error in plain]
    assert all(error <= most for error, most in zip(errors, allowed, strict=True)), (errors, allowed)
