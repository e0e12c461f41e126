"""The GRPO loss on full logits, forward and backward.

Bytes: the logits read once and their gradient written once; the floor is a copy of the logits, which moves as
many. Errors are of the loss and the gradient, of all rows.
"""

import pytest
import torch

from benchmarks.losses import CONFIG, TOLERANCE, LossInputs, LossSize, chunks, logp_of, loss_inputs
from benchmarks.measure import Case, Provider
from benchmarks.peers import our_names, ours, why_missing, why_not_compiled
from geo_r1.kernels import grpo_loss

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HIDDEN = 64  # logits are made from hidden states, whose size is of no matter here
SIZES = (
    [LossSize(4096, HIDDEN, 152064), LossSize(1024, HIDDEN, 151936)]
    if ON_GPU
    else [LossSize(128, HIDDEN, 20011)]
)
PEERS = ["copy of the logits", "eager torch", "compiled torch", "Liger Triton GRPO"]


def truth(logits_RV: torch.Tensor, inputs: LossInputs):
    """In float64, a chunk of rows at a time; the gradient is kept in float32."""
    loss = torch.zeros((), dtype=torch.float64, device=logits_RV.device)
    d_logits_RV = torch.empty(logits_RV.shape, dtype=torch.float32, device=logits_RV.device)
    for rows in chunks(*logits_RV.shape):
        logits_rV = logits_RV[rows].detach().double().requires_grad_()
        part = inputs.token_loss(logp_of(logits_rV, inputs.target_R[rows]), rows).sum()
        d_logits_RV[rows] = torch.autograd.grad(part, logits_rV)[0].float()
        loss += part.detach()
    return loss, d_logits_RV


def liger(logits_RV: torch.Tensor, inputs: LossInputs, size: LossSize):
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
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"R={size.rows} V={size.vocab}")
def test_grpo_loss(report, device, size, provider):
    def make():
        inputs = loss_inputs(size, DTYPE, device)
        logits_RV = (inputs.hidden_RC.detach() @ inputs.head_VC.detach().T).requires_grad_()

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
        case = Case(
            "grpo_loss", f"R={size.rows} V={size.vocab}", DTYPE, TOLERANCE[DTYPE], bytes=float(nbytes)
        )
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
