"""The losses and log-probabilities through the language head, forward and backward.

Operations: 2 R C V per matrix product, three of them with gradients (logits, hidden states, head). The floor
is torch's bare products in the same run. Errors are measured on the loss and both gradients, over all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.losses import (
    CONFIG,
    TOLERANCE,
    LossInputs,
    LossSize,
    chunks,
    gradients,
    logp_of,
    loss_case,
    loss_inputs,
)
from benchmarks.measure import (
    DTYPE,
    ON_GPU,
    Case,
    Provider,
    Tensors,
    floor,
    our_names,
    ours,
    torch_ways,
    why_missing,
)
from geo_r1.kernels import linear_cross_entropy, linear_grpo_loss, linear_logprob

if ON_GPU:  # heads of Qwen2.5-VL-7B and 3B
    GRPO_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 2048, 151936)]
    LOGPROB_SIZES = [LossSize(8192, 3584, 152064)]
    CROSS_ENTROPY_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 4096, 128256)]
else:
    GRPO_SIZES = [LossSize(384, 128, 50021)]
    LOGPROB_SIZES = CROSS_ENTROPY_SIZES = [LossSize(128, 128, 20011)]
TORCH = ("bare products", "eager torch", "compiled torch")


def work(size: LossSize, products: int) -> dict[str, float]:
    """Operations of the products; bytes of hidden states and head, and of their gradients if any."""
    matrices = size.rows * size.hidden + size.vocab * size.hidden
    return {
        "flops": products * 2.0 * size.rows * size.hidden * size.vocab,
        "bytes": (1.0 if products == 1 else 2.0) * torch.finfo(DTYPE).bits // 8 * matrices,
    }


def bare_products(inputs: LossInputs, count: int) -> Provider:
    """The matrix products alone: logits, and if `count` is 3 both gradients; no provider can do less."""
    hidden_RC, head_VC = inputs.hidden_RC.detach(), inputs.head_VC.detach()

    def products() -> Tensors:
        logits_RV = hidden_RC @ head_VC.T
        return (logits_RV,) if count == 1 else (logits_RV, logits_RV @ head_VC, logits_RV.T @ hidden_RC)

    return floor(products)


def liger_grpo(inputs: LossInputs, size: LossSize) -> Callable[[], Tensors]:
    """Liger's fused-linear GRPO with its defaults: one completion per chunk, and compiled loss math."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_fn = LigerFusedLinearGRPOLoss(
        beta=CONFIG.beta, epsilon_low=CONFIG.epsilon, epsilon_high=CONFIG.clip_high, loss_type="bnpo"
    )
    target, old, ref, mask, advantage = inputs.per_sequence(size)

    def run() -> Tensors:
        hidden = inputs.hidden_RC.view(size.sequences, -1, size.hidden)
        loss, _ = loss_fn(
            hidden, inputs.head_VC, target, mask, advantage, ref_per_token_logps=ref, old_per_token_logps=old
        )
        return gradients(inputs.hidden_RC, inputs.head_VC)(loss)

    return run


def grpo_case(size: LossSize, device: torch.device) -> Case:
    inputs = loss_inputs(size, DTYPE, device)
    leaves = inputs.hidden_RC, inputs.head_VC
    liger = Provider(lambda: liger_grpo(inputs, size), missing=why_missing("liger_kernel"))
    return loss_case(
        "linear_grpo_loss",
        size,
        inputs,
        inputs.token_loss,
        leaves,
        lambda impl: linear_grpo_loss(*leaves, **inputs.rows(), config=CONFIG, impl=impl).loss,
        {"bare products": bare_products(inputs, 3), "Liger fused-linear GRPO": liger},
        **work(size, 3),
    )


def cross_entropy_case(size: LossSize, device: torch.device) -> Case:
    inputs = loss_inputs(size, DTYPE, device)
    leaves, target_R = (inputs.hidden_RC, inputs.head_VC), inputs.target_R

    def liger() -> Callable[[], Tensors]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss_fn = LigerFusedLinearCrossEntropyLoss()
        return lambda: gradients(*leaves)(loss_fn(inputs.head_VC, inputs.hidden_RC, target_R))

    def cce() -> Callable[[], Tensors]:
        from cut_cross_entropy import linear_cross_entropy as cce_loss

        return lambda: gradients(*leaves)(cce_loss(*leaves, target_R))

    peers = {
        "bare products": bare_products(inputs, 3),
        "Liger fused-linear": Provider(liger, missing=why_missing("liger_kernel")),
        "Cut Cross-Entropy": Provider(cce, missing=why_missing("cut_cross_entropy")),
    }
    return loss_case(
        "linear_cross_entropy",
        size,
        inputs,
        inputs.cross_entropy,
        leaves,
        lambda impl: linear_cross_entropy(*leaves, target_R, inputs.weight_R, impl=impl),
        peers,
        **work(size, 3),
    )


def logprob_case(size: LossSize, device: torch.device) -> Case:
    """No gradient. Only log-probabilities are compared; ours also compute the entropy."""
    inputs = loss_inputs(size, DTYPE, device)
    hidden_RC, head_VC, target_R = inputs.hidden_RC.detach(), inputs.head_VC.detach(), inputs.target_R

    def plain(hidden_RC: Tensor, head_VC: Tensor) -> Tensor:
        return logp_of(hidden_RC @ head_VC.T, target_R)

    def cce() -> Callable[[], Tensors]:
        from cut_cross_entropy import linear_cross_entropy as cce_loss

        return lambda: (-cce_loss(hidden_RC, head_VC, target_R, reduction="none"),)

    def truth() -> Tensors:
        wide_VC, parts = head_VC.double(), chunks(size.rows, size.vocab)
        return (torch.cat([logp_of(hidden_RC[r].double() @ wide_VC.T, target_R[r]) for r in parts]),)

    providers = {
        **ours(
            "linear_logprob", lambda impl: lambda: linear_logprob(hidden_RC, head_VC, target_R, impl=impl)
        ),
        "bare products": bare_products(inputs, 1),
        **torch_ways(plain, (hidden_RC, head_VC), lambda logp_R: (logp_R,)),
        "Cut Cross-Entropy": Provider(cce, missing=why_missing("cut_cross_entropy")),
    }
    return Case("linear_logprob", str(size), DTYPE, TOLERANCE[DTYPE], providers, truth, **work(size, 1))


@pytest.mark.parametrize("provider", [*our_names("linear_grpo_loss"), *TORCH, "Liger fused-linear GRPO"])
@pytest.mark.parametrize("size", GRPO_SIZES, ids=str)
def test_linear_grpo_loss(measure, size, provider):
    measure(grpo_case, size)


@pytest.mark.parametrize("provider", [*our_names("linear_logprob"), *TORCH, "Cut Cross-Entropy"])
@pytest.mark.parametrize("size", LOGPROB_SIZES, ids=str)
def test_linear_logprob(measure, size, provider):
    measure(logprob_case, size)


CROSS_ENTROPIES = [*our_names("linear_cross_entropy"), *TORCH, "Liger fused-linear", "Cut Cross-Entropy"]


@pytest.mark.parametrize("provider", CROSS_ENTROPIES)
@pytest.mark.parametrize("size", CROSS_ENTROPY_SIZES, ids=str)
def test_linear_cross_entropy(measure, size, provider):
    measure(cross_entropy_case, size)
