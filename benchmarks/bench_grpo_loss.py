"""The GRPO loss on full logits, forward and backward, and what the linear losses do with a chunk's rows.

Bytes: the logits read once and their gradient written once; the floor is a copy of the logits, which moves as
many. Errors are of the loss and the gradient, of all rows.

Rows alone, by the kernels themselves: loss and gradient in one launch, into a buffer and over the logits, as
the linear losses want it; and the statistics. Logits that were written over are put back before each
repetition, untimed: a gradient of a gradient soon overflows, and its bits are not those of logits. Statistics
move the logits once, with nothing to write; their share is of the copy's bandwidth too, for lack of a ceiling
of reading alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.losses import CONFIG, TOLERANCE, LossInputs, LossSize, chunks, logp_of, loss_inputs
from benchmarks.measure import Case, Provider
from benchmarks.meters import Tensors, nothing
from benchmarks.peers import our_names, ours, why_missing, why_not_compiled
from geo_r1.kernels import available_impls, grpo_loss
from geo_r1.kernels.loss.reference import LossRows
from geo_r1.kernels.loss.rows import row_kernels

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HIDDEN = 64  # logits are made from hidden states, whose size is of no matter here
SIZES = (
    [LossSize(4096, HIDDEN, 152064), LossSize(1024, HIDDEN, 151936)]
    if ON_GPU
    else [LossSize(128, HIDDEN, 20011)]
)
PEERS = ["copy of the logits", "eager torch", "compiled torch", "Liger Triton GRPO"]
ROW_SIZES = [LossSize(4096, HIDDEN, 152064), LossSize(4096, HIDDEN, 151936)] if ON_GPU else SIZES
ROW_IMPLS = [impl for impl in available_impls()["grpo_loss"] if impl != "reference"]
PLACES = ("out of place", "in place")

# Case, providers, and what makes the truth, as `compare` takes them.
Comparison = tuple[Case, list[Provider], Callable[[], Sequence[Tensor]]]


def label(size: LossSize) -> str:
    return f"R={size.rows} V={size.vocab}"


def logits_of(inputs: LossInputs) -> Tensor:
    return inputs.hidden_RC.detach() @ inputs.head_VC.detach().T


def truth(logits_RV: Tensor, inputs: LossInputs):
    """In float64, a chunk of rows at a time; the gradient is kept in float32."""
    loss = torch.zeros((), dtype=torch.float64, device=logits_RV.device)
    d_logits_RV = torch.empty(logits_RV.shape, dtype=torch.float32, device=logits_RV.device)
    for rows in chunks(*logits_RV.shape):
        logits_rV = logits_RV[rows].detach().double().requires_grad_()
        part = inputs.token_loss(logp_of(logits_rV, inputs.target_R[rows]), rows).sum()
        d_logits_RV[rows] = torch.autograd.grad(part, logits_rV)[0].float()
        loss += part.detach()
    return loss, d_logits_RV


def liger(logits_RV: Tensor, inputs: LossInputs, size: LossSize):
    """Liger takes [B, L + 1, V] and drops the last; not in place, so that logits can be used again."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (size.sequences, -1)
    logits = logits_RV.detach().view(*shape, size.vocab)
    logits = torch.cat([logits, logits[:, -1:]], 1).requires_grad_()
    old, ref, target = (x.view(shape) for x in (inputs.old_logp_R, inputs.ref_logp_R, inputs.target_R))
    advantage = inputs.advantage_R.view(shape)[:, 0].contiguous()
    mask = torch.ones_like(target)

    def run():
        loss, _ = triton_grpo_loss(
            logits,
            old,
            ref,
            target,
            advantage,
            mask,
            temperature=1.0,
            beta=CONFIG.beta,
            eps_low=CONFIG.epsilon,
            eps_high=CONFIG.clip_high,
            inplace=False,
            loss_type="bnpo",
            reduce=True,
        )
        return (loss.detach(), *torch.autograd.grad(loss, logits))

    return run


@pytest.mark.parametrize("provider", [*our_names("grpo_loss"), *PEERS])
@pytest.mark.parametrize("size", SIZES, ids=label)
def test_grpo_loss(report, device, size, provider):
    def make():
        inputs = loss_inputs(size, DTYPE, device)
        logits_RV = logits_of(inputs).requires_grad_()

        def gradient(loss):
            return (loss.detach(), *torch.autograd.grad(loss, logits_RV))

        def build(impl):
            return lambda: gradient(grpo_loss(logits_RV, **inputs.rows(), config=CONFIG, impl=impl).loss)

        def plain(logits_RV):
            return inputs.token_loss(logp_of(logits_RV, inputs.target_R)).sum()

        def compiled():
            function = torch.compile(plain, dynamic=False)
            return lambda: gradient(function(logits_RV))

        nbytes = 2 * logits_RV.numel() * logits_RV.element_size()
        case = Case("grpo_loss", label(size), DTYPE, TOLERANCE[DTYPE], bytes=float(nbytes))
        return (
            case,
            [
                *ours("grpo_loss", build),
                Provider("copy of the logits", lambda: lambda: (logits_RV.detach().clone(),), kind="floor"),
                Provider("eager torch", lambda: lambda: gradient(plain(logits_RV))),
                Provider("compiled torch", compiled, missing=why_not_compiled()),
                Provider(
                    "Liger Triton GRPO",
                    lambda: liger(logits_RV, inputs, size),
                    missing=why_missing("liger_kernel"),
                    unpack=lambda results: (results[0], results[1][:, :-1].reshape(logits_RV.shape)),
                ),
            ],
            lambda: truth(logits_RV, inputs),
        )

    report(make)


def loss_rows(size: LossSize, dtype: torch.dtype, device: torch.device, impls: Sequence[str]) -> Comparison:
    """Loss and gradient of rows, by each module of row kernels and in each place."""
    inputs = loss_inputs(size, dtype, device)
    logits_RV = logits_of(inputs)
    out_RV = torch.empty_like(logits_RV)  # made here: no provider's memory, and no result of its own
    given = inputs.rows()
    target_R = given.pop("target_R")
    rows_R = LossRows(**given, importance_weight_R=None, sequence_R=None)

    def put_back() -> Tensor:
        return out_RV.copy_(logits_RV)

    def copy() -> Tensors:
        put_back()
        return ()

    def build(impl: str, source_RV: Tensor) -> Callable[[], Tensors]:
        kernels = row_kernels(impl)
        return lambda: kernels.grpo_row_loss(source_RV, target_R, rows_R, CONFIG, out_RV)[0]

    def provider(impl: str, place: str) -> Provider:
        source_RV, prepare = (out_RV, put_back) if place == "in place" else (logits_RV, nothing)
        return Provider(
            f"geo_r1 {impl}, {place}",
            lambda: build(impl, source_RV),
            kind="ours",
            unpack=lambda terms: (terms[0].sum(), out_RV),
            prepare=prepare,
        )

    nbytes = 2.0 * logits_RV.numel() * logits_RV.element_size()
    return (
        Case("grpo_loss rows", label(size), dtype, TOLERANCE[dtype], bytes=nbytes),
        [
            *(provider(impl, place) for impl in impls for place in PLACES),
            Provider("copy of the logits", lambda: copy, kind="floor"),
        ],
        lambda: truth(logits_RV, inputs),
    )


def row_statistics(
    size: LossSize, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Comparison:
    """Log-probabilities and entropies of rows."""
    inputs = loss_inputs(size, dtype, device)
    logits_RV, target_R = logits_of(inputs), inputs.target_R

    def plain(logits_RV: Tensor, target_R: Tensor) -> Tensors:
        logp_RV = logits_RV.log_softmax(-1)
        return logp_RV.gather(1, target_R[:, None]).squeeze(1), -(logp_RV.exp() * logp_RV).sum(-1)

    def build(impl: str) -> Callable[[], Tensors]:
        kernels = row_kernels(impl)
        return lambda: kernels.row_statistics(logits_RV, target_R, CONFIG.temperature)

    def statistics_truth() -> Tensors:
        parts = chunks(*logits_RV.shape)
        pairs = [plain(logits_RV[rows].double(), target_R[rows]) for rows in parts]
        logp, entropy = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        return logp, entropy

    nbytes = float(logits_RV.numel() * logits_RV.element_size())
    return (
        Case("row statistics", label(size), dtype, TOLERANCE[dtype], bytes=nbytes),
        [
            *(
                Provider(
                    f"geo_r1 {impl}", lambda impl=impl: build(impl), kind="ours", unpack=lambda rows: rows[:2]
                )
                for impl in impls
            ),
            Provider("eager torch", lambda: lambda: plain(logits_RV.float(), target_R)),
        ],
        statistics_truth,
    )


kernels_only = pytest.mark.skipif(
    not ON_GPU, reason="only kernels work on rows alone, and kernels are timed on a GPU"
)


@kernels_only
@pytest.mark.parametrize(
    "provider",
    [*(f"geo_r1 {impl}, {place}" for impl in ROW_IMPLS for place in PLACES), "copy of the logits"],
)
@pytest.mark.parametrize("size", ROW_SIZES, ids=label)
def test_grpo_loss_rows(report, device, size, provider):
    report(lambda: loss_rows(size, DTYPE, device, ROW_IMPLS))


@kernels_only
@pytest.mark.parametrize("provider", [*(f"geo_r1 {impl}" for impl in ROW_IMPLS), "eager torch"])
@pytest.mark.parametrize("size", ROW_SIZES, ids=label)
def test_row_statistics(report, device, size, provider):
    report(lambda: row_statistics(size, DTYPE, device, ROW_IMPLS))
