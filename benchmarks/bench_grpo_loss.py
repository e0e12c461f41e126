"""The GRPO loss on full logits, forward and backward, and the work of the linear losses on a chunk's rows.

Bytes: the logits read once and their gradient written once; the floor is a copy of the logits, which moves as
many. Errors are measured on the loss and the gradient, over all rows.

Rows alone call the kernels directly: loss and gradient in one launch, into a buffer or, as in the linear
losses, over the logits; and the statistics. Overwritten logits are restored before each repetition, untimed:
a gradient of a gradient soon overflows, and its bits are unlike those of logits. Statistics read the logits
once and write almost nothing; their share, too, is of the copy's bandwidth, since no ceiling is measured for
reads alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    loss_case,
    loss_inputs,
    truth,
)
from benchmarks.measure import DTYPE, ON_GPU, Case, Provider, Tensors, floor, nothing, our_names, why_missing
from geo_r1.kernels import available_impls, grpo_loss
from geo_r1.kernels.loss.reference import LossRows
from geo_r1.kernels.loss.rows import row_kernels

HIDDEN = 64  # logits are made from hidden states, whose size does not matter here
if ON_GPU:
    SIZES = [LossSize(4096, HIDDEN, 152064), LossSize(1024, HIDDEN, 151936)]
    ROW_SIZES = [LossSize(4096, HIDDEN, 152064), LossSize(4096, HIDDEN, 151936)]
else:
    SIZES = ROW_SIZES = [LossSize(128, HIDDEN, 20011)]
PEERS = ["copy of the logits", "eager torch", "compiled torch", "Liger Triton GRPO"]
ROW_IMPLS = tuple(impl for impl in available_impls()["grpo_loss"] if impl != "reference")
PLACES = ("out of place", "in place")


def label(size: LossSize) -> str:
    return size.of_logits


def make_logits(inputs: LossInputs) -> Tensor:
    return inputs.hidden_RC.detach() @ inputs.head_VC.detach().T


def nbytes(logits_RV: Tensor) -> float:
    return float(logits_RV.numel() * logits_RV.element_size())


def liger(logits_RV: Tensor, inputs: LossInputs, size: LossSize) -> Callable[[], Tensors]:
    """Liger takes [B, L + 1, V] and drops the last; not in place, so that logits can be reused."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = logits_RV.detach().view(size.sequences, -1, size.vocab)
    logits = torch.cat([logits, logits[:, -1:]], 1).requires_grad_()
    target, old, ref, mask, advantage = inputs.per_sequence(size)
    options = {"temperature": 1.0, "beta": CONFIG.beta, "inplace": False, "loss_type": "bnpo", "reduce": True}
    clip = {"eps_low": CONFIG.epsilon, "eps_high": CONFIG.clip_high}
    return lambda: gradients(logits)(
        triton_grpo_loss(logits, old, ref, target, advantage, mask, **options, **clip)[0]
    )


def grpo_case(size: LossSize, device: torch.device) -> Case:
    inputs = loss_inputs(size, DTYPE, device)
    logits_RV = make_logits(inputs).requires_grad_()
    peers = {
        "copy of the logits": floor(lambda: (logits_RV.detach().clone(),)),
        "Liger Triton GRPO": Provider(
            lambda: liger(logits_RV, inputs, size),
            missing=why_missing("liger_kernel"),
            unpack=lambda results: (results[0], results[1][:, :-1].reshape(logits_RV.shape)),
        ),
    }
    return loss_case(
        "grpo_loss",
        size,
        inputs,
        inputs.token_loss,
        (logits_RV,),
        lambda impl: grpo_loss(logits_RV, **inputs.rows(), config=CONFIG, impl=impl).loss,
        peers,
        bytes=2 * nbytes(logits_RV),
    )


def loss_rows(size: LossSize, dtype: torch.dtype, impls: Sequence[str], device: torch.device) -> Case:
    """Loss and gradient of rows, with each module of row kernels, in place and out of place."""
    inputs = loss_inputs(size, dtype, device)
    logits_RV = make_logits(inputs)
    out_RV = torch.empty_like(logits_RV)  # made here, so that no provider's memory or results include it
    given = inputs.rows()
    target_R = given.pop("target_R")
    rows_R = LossRows(**given, importance_weight_R=None, sequence_R=None)

    def put_back() -> Tensors:
        out_RV.copy_(logits_RV)
        return ()

    def provider(impl: str, place: str) -> Provider:
        source_RV, prepare = (out_RV, put_back) if place == "in place" else (logits_RV, nothing)

        def build() -> Callable[[], Tensors]:
            kernels = row_kernels(impl)
            return lambda: kernels.grpo_row_loss(source_RV, target_R, rows_R, CONFIG, out_RV)[0]

        return Provider(build, "ours", unpack=lambda terms: (terms[0].sum(), out_RV), prepare=prepare)

    return Case(
        "grpo_loss rows",
        size.of_logits,
        dtype,
        TOLERANCE[dtype],
        {f"geo_r1 {impl}, {place}": provider(impl, place) for impl in impls for place in PLACES}
        | {"copy of the logits": floor(put_back)},
        truth=lambda: truth(inputs, inputs.token_loss, (logits_RV,)),
        bytes=2 * nbytes(logits_RV),
    )


def row_statistics(size: LossSize, dtype: torch.dtype, impls: Sequence[str], device: torch.device) -> Case:
    """Log-probabilities and entropies of rows."""
    inputs = loss_inputs(size, dtype, device)
    logits_RV, target_R = make_logits(inputs), inputs.target_R

    def plain(logits_RV: Tensor, target_R: Tensor) -> Tensors:
        logp_RV = logits_RV.log_softmax(-1)
        return logp_RV.gather(1, target_R[:, None]).squeeze(1), -(logp_RV.exp() * logp_RV).sum(-1)

    def provider(impl: str) -> Provider:
        def build() -> Callable[[], Tensors]:
            kernels = row_kernels(impl)
            return lambda: kernels.row_statistics(logits_RV, target_R, CONFIG.temperature)

        return Provider(build, "ours", unpack=lambda rows: rows[:2])

    def statistics_truth() -> Tensors:
        parts = chunks(*logits_RV.shape)
        pairs = [plain(logits_RV[rows].double(), target_R[rows]) for rows in parts]
        logp, entropy = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        return logp, entropy

    return Case(
        "row statistics",
        size.of_logits,
        dtype,
        TOLERANCE[dtype],
        {f"geo_r1 {impl}": provider(impl) for impl in impls}
        | {"eager torch": Provider(lambda: lambda: plain(logits_RV.float(), target_R))},
        statistics_truth,
        bytes=nbytes(logits_RV),
    )


@pytest.mark.parametrize("provider", [*our_names("grpo_loss"), *PEERS])
@pytest.mark.parametrize("size", SIZES, ids=label)
def test_grpo_loss(measure, size, provider):
    measure(grpo_case, size)


kernels_only = pytest.mark.skipif(
    not ON_GPU, reason="only kernels work on rows alone, and kernels are timed on a GPU"
)
ROW_PROVIDERS = [f"geo_r1 {impl}, {place}" for impl in ROW_IMPLS for place in PLACES]


@kernels_only
@pytest.mark.parametrize("provider", [*ROW_PROVIDERS, "copy of the logits"])
@pytest.mark.parametrize("size", ROW_SIZES, ids=label)
def test_grpo_loss_rows(measure, size, provider):
    measure(loss_rows, size, DTYPE, ROW_IMPLS)


@kernels_only
@pytest.mark.parametrize("provider", [*(f"geo_r1 {impl}" for impl in ROW_IMPLS), "eager torch"])
@pytest.mark.parametrize("size", ROW_SIZES, ids=label)
def test_row_statistics(measure, size, provider):
    measure(row_statistics, size, DTYPE, ROW_IMPLS)
