"""The losses and log-probabilities through the language head, forward and backward.

Operations: 2 R C V a matrix product, three of them with gradients (logits, hidden states, head). The floor is
the bare products, by torch, in the same run. Errors are of the loss and both gradients, of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from benchmarks.losses import (
    CONFIG,
    DTYPE,
    TOLERANCE,
    LossInputs,
    LossSize,
    TokenLoss,
    chunks,
    gradients,
    linear_products,
    linear_truth,
    logp_of,
    loss_inputs,
)
from benchmarks.measure import Case, Provider, Tensors, floor, our_names, ours, torch_ways, why_missing
from geo_r1.kernels import linear_cross_entropy, linear_grpo_loss, linear_logprob

if torch.cuda.is_available():  # heads of Qwen2.5-VL-7B and 3B
    GRPO_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 2048, 151936)]
    LOGPROB_SIZES = [LossSize(8192, 3584, 152064)]
    CROSS_ENTROPY_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 4096, 128256)]
else:
    GRPO_SIZES = [LossSize(384, 128, 50021)]
    LOGPROB_SIZES = CROSS_ENTROPY_SIZES = [LossSize(128, 128, 20011)]


def cases_of(op: str, sizes: list[LossSize], *peers: str):
    """Parametrise a test with sizes, and for each with our implementations, torch and further peers."""
    names = [*our_names(op), "bare products", "eager torch", "compiled torch", *peers]

    def parametrise(test):
        test = pytest.mark.parametrize("size", sizes, ids=str)(test)
        return pytest.mark.parametrize("provider", names)(test)

    return parametrise


def linear_case(
    op: str, size: LossSize, products: int, providers: Mapping[str, Provider], truth: Callable[[], Tensors]
) -> Case:
    item = torch.finfo(DTYPE).bits // 8
    matrices = size.rows * size.hidden + size.vocab * size.hidden
    return Case(
        op,
        str(size),
        DTYPE,
        TOLERANCE[DTYPE],
        providers,
        truth,
        flops=products * 2.0 * size.rows * size.hidden * size.vocab,
        bytes=(1 if products == 1 else 2) * item * matrices,
    )


def torch_providers(inputs: LossInputs, token_loss: TokenLoss) -> dict[str, Provider]:
    """The bare products, and plain torch with all logits at once."""
    leaves = inputs.hidden_RC, inputs.head_VC

    def loss(hidden_RC: Tensor, head_VC: Tensor) -> Tensor:
        return token_loss(logp_of(hidden_RC @ head_VC.T, inputs.target_R), slice(None)).sum()

    return {
        "bare products": floor(linear_products(inputs, 3)),
        **torch_ways(loss, leaves, gradients(*leaves)),
    }


def liger_grpo(inputs: LossInputs, size: LossSize) -> Callable[[], Tensors]:
    """Liger's fused-linear GRPO, one completion a chunk (its default), its loss math compiled (likewise)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_fn = LigerFusedLinearGRPOLoss(
        beta=CONFIG.beta, epsilon_low=CONFIG.epsilon, epsilon_high=CONFIG.clip_high, loss_type="bnpo"
    )
    shape = (size.sequences, -1)
    target, old, ref = (x.view(shape) for x in (inputs.target_R, inputs.old_logp_R, inputs.ref_logp_R))
    mask = torch.ones_like(target)
    advantage = inputs.advantage_R.view(shape)[:, 0].contiguous()

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

    def build(impl: str) -> Callable[[], Tensors]:
        options = {**inputs.rows(), "config": CONFIG, "impl": impl}
        return lambda: gradients(*leaves)(linear_grpo_loss(*leaves, **options).loss)

    providers = {
        **ours("linear_grpo_loss", build),
        **torch_providers(inputs, inputs.token_loss),
        "Liger fused-linear GRPO": Provider(
            lambda: liger_grpo(inputs, size), missing=why_missing("liger_kernel")
        ),
    }
    return linear_case(
        "linear_grpo_loss", size, 3, providers, lambda: linear_truth(inputs, inputs.token_loss)
    )


def logprob_case(size: LossSize, device: torch.device) -> Case:
    """No gradient; log-probabilities are compared, which ours give with the entropy."""
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
        "bare products": floor(linear_products(inputs, 1)),
        **torch_ways(plain, (hidden_RC, head_VC), lambda logp_R: (logp_R,)),
        "Cut Cross-Entropy": Provider(cce, missing=why_missing("cut_cross_entropy")),
    }
    return linear_case("linear_logprob", size, 1, providers, truth)


def cross_entropy_case(size: LossSize, device: torch.device) -> Case:
    inputs = loss_inputs(size, DTYPE, device)
    leaves, target_R = (inputs.hidden_RC, inputs.head_VC), inputs.target_R
    finish = gradients(*leaves)

    def build(impl: str) -> Callable[[], Tensors]:
        return lambda: finish(linear_cross_entropy(*leaves, target_R, inputs.weight_R, impl=impl))

    def liger() -> Callable[[], Tensors]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss_fn = LigerFusedLinearCrossEntropyLoss()
        return lambda: finish(loss_fn(inputs.head_VC, inputs.hidden_RC, target_R))

    def cce() -> Callable[[], Tensors]:
        from cut_cross_entropy import linear_cross_entropy as cce_loss

        return lambda: finish(cce_loss(*leaves, target_R))

    providers = {
        **ours("linear_cross_entropy", build),
        **torch_providers(inputs, inputs.cross_entropy),
        "Liger fused-linear": Provider(liger, missing=why_missing("liger_kernel")),
        "Cut Cross-Entropy": Provider(cce, missing=why_missing("cut_cross_entropy")),
    }
    return linear_case(
        "linear_cross_entropy", size, 3, providers, lambda: linear_truth(inputs, inputs.cross_entropy)
    )


@cases_of("linear_grpo_loss", GRPO_SIZES, "Liger fused-linear GRPO")
def test_linear_grpo_loss(measure, size, provider):
    measure(grpo_case, size)


@cases_of("linear_logprob", LOGPROB_SIZES, "Cut Cross-Entropy")
def test_linear_logprob(measure, size, provider):
    measure(logprob_case, size)


@cases_of("linear_cross_entropy", CROSS_ENTROPY_SIZES, "Liger fused-linear", "Cut Cross-Entropy")
def test_linear_cross_entropy(measure, size, provider):
    measure(cross_entropy_case, size)
