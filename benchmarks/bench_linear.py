"""The losses and log-probabilities through the language head, forward and backward.

Operations: 2 R C V a matrix product, three of them with gradients (logits, hidden states, head). The floor is
the bare products, by torch, in the same rounds. Errors are of the loss and both gradients, of all rows.
"""

import pytest
import torch

from benchmarks.losses import (
    CONFIG,
    TOLERANCE,
    LossInputs,
    LossSize,
    chunks,
    linear_products,
    linear_truth,
    logp_of,
    loss_inputs,
)
from benchmarks.measure import Case, Provider
from benchmarks.peers import our_names, ours, why_missing, why_not_compiled
from geo_r1.kernels import linear_cross_entropy, linear_grpo_loss, linear_logprob

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
if ON_GPU:  # heads of Qwen2.5-VL-7B and 3B
    GRPO_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 2048, 151936)]
    LOGPROB_SIZES = [LossSize(8192, 3584, 152064)]
    CROSS_ENTROPY_SIZES = [LossSize(8192, 3584, 152064), LossSize(4096, 4096, 128256)]
else:
    GRPO_SIZES = [LossSize(384, 128, 50021)]
    LOGPROB_SIZES = CROSS_ENTROPY_SIZES = [LossSize(128, 128, 20011)]

LIGER, CCE = why_missing("liger_kernel"), why_missing("cut_cross_entropy")


def names(op: str, *peers: str) -> list[str]:
    return [*our_names(op), "bare products", "eager torch", "compiled torch", *peers]


def the_case(op: str, size: LossSize, products: int) -> Case:
    item = torch.finfo(DTYPE).bits // 8
    matrices = size.rows * size.hidden + size.vocab * size.hidden
    return Case(
        op,
        str(size),
        DTYPE,
        TOLERANCE[DTYPE],
        flops=products * 2.0 * size.rows * size.hidden * size.vocab,
        bytes=(1 if products == 1 else 2) * item * matrices,
    )


def gradients(loss: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, (inputs.hidden_RC, inputs.head_VC)))


def full_logits(inputs: LossInputs, token_loss):
    """Plain torch, all logits at once."""

    def loss(hidden_RC, head_VC):
        return token_loss(logp_of(hidden_RC @ head_VC.T, inputs.target_R)).sum()

    return loss


def torch_providers(inputs: LossInputs, token_loss) -> list[Provider]:
    loss = full_logits(inputs, token_loss)

    def build(function):
        return lambda: gradients(function(inputs.hidden_RC, inputs.head_VC), inputs)

    return [
        Provider("bare products", lambda: linear_products(inputs, 3), kind="floor"),
        Provider("eager torch", lambda: build(loss)),
        Provider(
            "compiled torch", lambda: build(torch.compile(loss, dynamic=False)), missing=why_not_compiled()
        ),
    ]


def liger_grpo(inputs: LossInputs, size: LossSize):
    """Liger's fused-linear GRPO, one completion a chunk (its default), its loss math compiled (likewise)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_fn = LigerFusedLinearGRPOLoss(
        beta=CONFIG.beta, epsilon_low=CONFIG.epsilon, epsilon_high=CONFIG.clip_high, loss_type="bnpo"
    )
    shape = (size.sequences, -1)
    target, old, ref = (x.view(shape) for x in (inputs.target_R, inputs.old_logp_R, inputs.ref_logp_R))
    mask = torch.ones_like(target)
    advantage = inputs.advantage_R.view(shape)[:, 0].contiguous()

    def run():
        hidden = inputs.hidden_RC.view(size.sequences, -1, size.hidden)
        loss, _ = loss_fn(
            hidden, inputs.head_VC, target, mask, advantage, ref_per_token_logps=ref, old_per_token_logps=old
        )
        return gradients(loss, inputs)

    return run


@pytest.mark.parametrize("provider", names("linear_grpo_loss", "Liger fused-linear GRPO"))
@pytest.mark.parametrize("size", GRPO_SIZES, ids=str)
def test_linear_grpo_loss(report, device, size, provider):
    def make():
        inputs = loss_inputs(size, DTYPE, device)

        def build(impl):
            def run():
                out = linear_grpo_loss(
                    inputs.hidden_RC, inputs.head_VC, **inputs.rows(), config=CONFIG, impl=impl
                )
                return gradients(out.loss, inputs)

            return run

        return (
            the_case("linear_grpo_loss", size, 3),
            [
                *ours("linear_grpo_loss", build),
                *torch_providers(inputs, inputs.token_loss),
                Provider("Liger fused-linear GRPO", lambda: liger_grpo(inputs, size), missing=LIGER),
            ],
            lambda: linear_truth(inputs, inputs.token_loss),
        )

    report(make)


@pytest.mark.parametrize("provider", names("linear_logprob", "Cut Cross-Entropy"))
@pytest.mark.parametrize("size", LOGPROB_SIZES, ids=str)
def test_linear_logprob(report, device, size, provider):
    """No gradient; log-probabilities are compared, which ours give with the entropy."""

    def make():
        inputs = loss_inputs(size, DTYPE, device)
        hidden_RC, head_VC = inputs.hidden_RC.detach(), inputs.head_VC.detach()

        def build(impl):
            return lambda: linear_logprob(hidden_RC, head_VC, inputs.target_R, impl=impl)

        def plain(hidden_RC, head_VC):
            return logp_of(hidden_RC @ head_VC.T, inputs.target_R)

        def torch_way(function):
            return lambda: (function(hidden_RC, head_VC),)

        def cce():
            from cut_cross_entropy import linear_cross_entropy as cce_loss

            return lambda: (-cce_loss(hidden_RC, head_VC, inputs.target_R, reduction="none"),)

        def truth():
            wide_VC = head_VC.double()
            parts = chunks(size.rows, size.vocab)
            return (
                torch.cat([logp_of(hidden_RC[r].double() @ wide_VC.T, inputs.target_R[r]) for r in parts]),
            )

        return (
            the_case("linear_logprob", size, 1),
            [
                *ours("linear_logprob", build),
                Provider("bare products", lambda: linear_products(inputs, 1), kind="floor"),
                Provider("eager torch", lambda: torch_way(plain)),
                Provider(
                    "compiled torch",
                    lambda: torch_way(torch.compile(plain, dynamic=False)),
                    missing=why_not_compiled(),
                ),
                Provider("Cut Cross-Entropy", cce, missing=CCE),
            ],
            truth,
        )

    report(make)


@pytest.mark.parametrize("provider", names("linear_cross_entropy", "Liger fused-linear", "Cut Cross-Entropy"))
@pytest.mark.parametrize("size", CROSS_ENTROPY_SIZES, ids=str)
def test_linear_cross_entropy(report, device, size, provider):
    def make():
        inputs = loss_inputs(size, DTYPE, device)
        hidden_RC, head_VC, target_R = inputs.hidden_RC, inputs.head_VC, inputs.target_R

        def build(impl):
            def run():
                loss = linear_cross_entropy(hidden_RC, head_VC, target_R, inputs.weight_R, impl=impl)
                return gradients(loss, inputs)

            return run

        def liger():
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss_fn = LigerFusedLinearCrossEntropyLoss()
            return lambda: gradients(loss_fn(head_VC, hidden_RC, target_R), inputs)

        def cce():
            from cut_cross_entropy import linear_cross_entropy as cce_loss

            return lambda: gradients(cce_loss(hidden_RC, head_VC, target_R), inputs)

        return (
            the_case("linear_cross_entropy", size, 3),
            [
                *ours("linear_cross_entropy", build),
                *torch_providers(inputs, inputs.cross_entropy),
                Provider("Liger fused-linear", liger, missing=LIGER),
                Provider("Cut Cross-Entropy", cce, missing=CCE),
            ],
            lambda: linear_truth(inputs, inputs.cross_entropy),
        )

    report(make)
