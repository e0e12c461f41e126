"""packed_attention's kernels as a torch op: compiled, traced, captured, under autocast; what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from test_attention import CASES, dense, run
from test_attention_triton import DEVICE, LONG, inputs, triton
from torch.fx.experimental.proxy_tensor import make_fx

from geo_r1.kernels import PackedLayout, available_impls, packed_attention


def test_second_derivatives_are_an_error():
    layout, qkv, grad, *_ = inputs(CASES["ragged"], dtype=torch.float32)
    leaves = [x.requires_grad_() for x in qkv]
    (dq,) = torch.autograd.grad(triton(layout)(*leaves), leaves[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@pytest.mark.parametrize("case", [((3,), ((2, 1),)), ((), ())], ids=["group", "empty"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
def test_opcheck(heads, case):
    from geo_r1.kernels import attention_triton as module

    layout, qkv, grad, *_ = inputs(case, *heads, dtype=torch.float32)
    tiles, short = module._tiles(qkv[0], layout)
    leaves = [x.clone().requires_grad_() for x in qkv]
    torch.library.opcheck(module._packed_attention, (*leaves, *tiles, short, True, 0.25))
    out, lse = module._packed_attention(*qkv, *tiles, short, True, 0.25)
    saved = (grad, *qkv, out, lse, *tiles[1:], short, True, 0.25)
    torch.library.opcheck(module._packed_attention_backward, saved)


@pytest.mark.parametrize("how", ["closure", "argument"])
def test_compiles_as_one_graph(how):
    cases = [CASES["ragged"], CASES["twins"]]
    by_argument = torch.compile(
        lambda q, k, v, layout: packed_attention(q, k, v, layout, impl="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for case in cases:
        layout, qkv, grad, *_ = inputs(case, 2, 1, dtype=torch.float32)
        expected = run(triton(layout), qkv, grad)
        fresh = PackedLayout.from_lengths(*case, device=DEVICE)  # never used, so its tiles are not there yet
        if how == "closure":
            op = torch.compile(triton(fresh), fullgraph=True, backend="aot_eager")
        else:
            op = lambda q, k, v, layout=fresh: by_argument(q, k, v, layout)  # noqa: E731
        for _ in range(2):
            actual = run(op, qkv, grad)
            assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_autocast_casts_as_torch_attention_does():
    layout, (q, k, v), *_ = inputs(CASES["ragged"], dtype=torch.float32)
    expected = packed_attention(q.half(), k.half(), v.half(), layout, impl="triton")
    with torch.autocast(DEVICE.type, torch.float16):
        out = packed_attention(q, k.half(), v, layout, impl="triton")
        plain = F.scaled_dot_product_attention(q, q, q)
    assert out.dtype == plain.dtype == torch.float16 and out.equal(expected)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float64, 16, "impl='triton' does not take torch.float64 inputs; use None"),
        (
            torch.float32,
            48,
            "impl='triton' does not take head size 48, only 16, 32, 64, 80, 96, 128; use None",
        ),
    ],
)
def test_inputs_that_triton_does_not_take(dtype, head_dim, message):
    assert "triton" in available_impls()["packed_attention"]
    layout, qkv, grad, seen, _ = inputs(CASES["ragged"], head_dim=head_dim, dtype=dtype)
    with pytest.raises(ValueError) as error:
        packed_attention(*qkv, layout, impl="triton")
    assert message in str(error.value)
    default = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    expected = run(lambda *x: dense(*x, seen), qkv, grad)
    for a, e in zip(default, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_a_layout_first_used_in_inference_mode_can_be_trained_with():
    layout, qkv, grad, _, _ = inputs(CASES["ragged"], dtype=torch.float32)
    with torch.inference_mode():
        expected = triton(layout)(*qkv)
    out, *grads = run(triton(layout), qkv, grad)
    assert torch.equal(out, expected) and all(x.isfinite().all() for x in grads)


def test_a_layout_does_not_keep_what_a_tracer_made():
    layout, qkv, grad, _, _ = inputs(CASES["ragged"], dtype=torch.float32)
    make_fx(triton(layout), tracing_mode="fake", _allow_non_fake_inputs=True)(*qkv)
    out, *grads = run(triton(layout), qkv, grad)
    assert {type(x) for x in (out, *grads)} == {torch.Tensor}


def test_flash_is_never_taken_unasked():
    layout, qkv, _, _, _ = inputs(CASES["ragged"], head_dim=72, dtype=torch.float16)
    expected = packed_attention(*qkv, layout, impl="reference")
    assert torch.equal(packed_attention(*qkv, layout), expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_forward_and_backward():
    layout, qkv, grad, _, _ = inputs(LONG, 4, 2, 64, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = run(triton(layout), qkv, grad)  # makes the layout's tiles, and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(triton(layout), qkv, grad)
    graph.replay()
    torch.cuda.synchronize()
    for got, right in zip(captured, expected, strict=True):
        assert torch.equal(got, right)
