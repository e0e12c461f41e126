"""CUDA kernels touch nothing behind the last element of any tensor given to them: the emulator would fail."""

import pytest
import torch
from emulator.fenced import fenced
from losses import full_logits, loss_case
from test_attention import run
from test_attention_kernels import DEVICE, LONG, WINDOWS, inputs, kernel
from test_rows import ALL

from geo_r1.kernels import available_impls, group_advantage, grpo_loss, linear_grpo_loss
from geo_r1.kernels.advantage import cuda as advantage_cuda
from geo_r1.kernels.attention import cuda as attention_cuda
from geo_r1.kernels.loss import cuda as loss_cuda

pytestmark = pytest.mark.skipif(
    "cuda" not in available_impls()["packed_attention"] or DEVICE.type == "cuda",
    reason="needs the emulator; on a GPU compute-sanitizer asks this",
)


@pytest.fixture
def launches(monkeypatch):
    """Switches on that every tensor of a launch ends at a page that faults; gives the launchers' names."""
    names, launch = [], attention_cuda.launch

    def fenced_launch(name, like, **arguments):
        names.append(name)
        places = {}
        for key, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.numel():
                span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                flat = x.detach().as_strided((span,), (1,))
                copy = places.setdefault(x.data_ptr(), (flat, fenced(flat)))[1]
                arguments[key] = copy
        launch(name, like, **arguments)
        for flat, copy in places.values():
            flat.copy_(copy)

    def switch():
        for module in (advantage_cuda, attention_cuda, loss_cuda):
            monkeypatch.setattr(module, "launch", fenced_launch)
        return names

    return switch


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("case", [LONG, WINDOWS], ids=["long", "windows"])
def test_attention(case, head_dim, launches):
    layout, qkv, grad, *_ = inputs(case, 2, 1, head_dim, dtype=torch.bfloat16)
    expected = run(kernel("cuda", layout), qkv, grad)
    names = launches()
    assert all(a.equal(e) for a, e in zip(run(kernel("cuda", layout), qkv, grad), expected, strict=True))
    assert names == ["packed_attention_forward", "packed_attention_backward"]


@pytest.mark.parametrize("vocab", [7, 1000, 1009])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows(dtype, vocab, launches):
    case = loss_case(5, vocab).leaves()
    case.token_weight_R[3] = 0
    logits = full_logits(case).detach().to(dtype).requires_grad_()
    rows = {
        name: x.float() if x is not None and x.is_floating_point() else x for name, x in case.rows().items()
    }

    def results():
        out = grpo_loss(logits, **rows, config=ALL, impl="cuda")
        head = [x.detach().to(dtype).requires_grad_() for x in (case.hidden_RC, case.lm_head_VC)]
        linear = linear_grpo_loss(*head, **rows, config=ALL, impl="cuda")
        return (out.logp_R, *torch.autograd.grad(out.loss, logits), *torch.autograd.grad(linear.loss, head))

    expected = results()
    names = launches()
    assert all(a.equal(e) for a, e in zip(results(), expected, strict=True))
    assert names == ["grpo_row_loss", "grpo_row_loss", "logit_gradient"]


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_group_advantage(scale, launches):
    reward, valid = torch.arange(11.0).half(), torch.arange(11) % 4 > 0
    cu_group, cu_completion = torch.tensor([0, 3, 3, 11]), torch.arange(0, 36, 3, dtype=torch.int32)
    options = {
        "valid_N": valid,
        "cu_completion": cu_completion,
        "num_rows": 33,
        "scale": scale,
        "impl": "cuda",
    }
    expected = group_advantage(reward, cu_group, **options)
    names = launches()
    assert group_advantage(reward, cu_group, **options).equal(expected)
    assert names == ["group_advantage"]
