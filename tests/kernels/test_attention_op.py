"""packed_attention's kernels as a torch op: compiled, traced, captured, under autocast; what they refuse."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from memory import replay
from test_attention import CASES, dense, run
from test_attention_kernels import DEVICE, LONG, WIDEST, inputs, kernel
from torch.fx.experimental.proxy_tensor import make_fx

from geo_r1.kernels import PackedLayout, available_impls, packed_attention
from geo_r1.kernels.attention import public


def test_second_derivatives_are_an_error(impl):
    layout, qkv, grad, *_ = inputs(CASES["ragged"], dtype=WIDEST[impl])
    leaves = [x.requires_grad_() for x in qkv]
    (dq,) = torch.autograd.grad(kernel(impl, layout)(*leaves), leaves[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


@pytest.mark.parametrize("case", [((3,), ((2, 1),)), ((), ())], ids=["group", "empty"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
def test_opcheck(impl, heads, case):
    from geo_r1.kernels.attention import op as module

    layout, qkv, grad, *_ = inputs(case, *heads, dtype=WIDEST[impl])
    tiles = module._kernels(impl).tiles(qkv[0], layout, "short")
    leaves = [x.clone().requires_grad_() for x in qkv]
    torch.library.opcheck(module._packed_attention, (*leaves, *tiles, "short", True, 0.25, impl))
    out, lse = module._packed_attention(*qkv, *tiles, "short", True, 0.25, impl)
    saved = (grad, *qkv, out, lse, *tiles[1:], "short", True, 0.25, impl)
    torch.library.opcheck(module._packed_attention_backward, saved)


@pytest.mark.parametrize("how", ["closure", "argument"])
def test_compiles_as_one_graph(impl, how):
    cases = [CASES["ragged"], CASES["twins"]]
    by_argument = torch.compile(
        lambda q, k, v, layout: packed_attention(q, k, v, layout, impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    for case in cases:
        layout, qkv, grad, *_ = inputs(case, 2, 1, dtype=WIDEST[impl])
        expected = run(kernel(impl, layout), qkv, grad)
        fresh = PackedLayout.from_lengths(*case, device=DEVICE)  # never used, so its tiles are not there yet
        if how == "closure":
            op = torch.compile(kernel(impl, fresh), fullgraph=True, backend="aot_eager")
        else:
            op = lambda q, k, v, layout=fresh: by_argument(q, k, v, layout)  # noqa: E731
        for _ in range(2):
            actual = run(op, qkv, grad)
            assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_autocast_casts_as_torch_attention_does(impl):
    layout, (q, k, v), *_ = inputs(CASES["ragged"], dtype=WIDEST[impl])
    expected = packed_attention(q.half(), k.half(), v.half(), layout, impl=impl)
    with torch.autocast(DEVICE.type, torch.float16):
        out = packed_attention(q, k.half(), v, layout, impl=impl)
        plain = F.scaled_dot_product_attention(q, q, q)
    assert out.dtype == plain.dtype == torch.float16 and out.equal(expected)


@pytest.mark.parametrize(
    ("impl", "dtype", "head_dim", "message"),
    [
        ("triton", torch.float64, 16, "torch.float64 inputs; use None"),
        ("triton", torch.float32, 48, "head size 48, only 16, 32, 64, 80, 96, 128; use None"),
        ("cuda", torch.float32, 16, "torch.float32 inputs; use None"),
        ("cuda", torch.float16, 48, "head size 48, only 16, 32, 64, 80, 96, 128; use None"),
    ],
)
def test_inputs_that_an_implementation_does_not_take(impl, dtype, head_dim, message):
    if impl not in available_impls()["packed_attention"]:
        pytest.skip(f"{impl} does not run here")
    layout, qkv, grad, seen, _ = inputs(CASES["ragged"], head_dim=head_dim, dtype=dtype)
    with pytest.raises(ValueError) as error:
        packed_attention(*qkv, layout, impl=impl)
    assert f"impl={impl!r} does not take {message}" in str(error.value)
    default = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    expected = run(lambda *x: dense(*x, seen), qkv, grad)
    tolerance = 3e-2 if dtype == torch.float16 else 1e-4
    for a, e in zip(default, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance / 10)


def test_a_layout_first_used_in_inference_mode_can_be_trained_with(impl):
    layout, qkv, grad, _, _ = inputs(CASES["ragged"], dtype=WIDEST[impl])
    with torch.inference_mode():
        expected = kernel(impl, layout)(*qkv)
    out, *grads = run(kernel(impl, layout), qkv, grad)
    assert torch.equal(out, expected) and all(x.isfinite().all() for x in grads)


def test_a_layout_does_not_keep_what_a_tracer_made(impl):
    layout, qkv, grad, _, _ = inputs(CASES["ragged"], dtype=WIDEST[impl])
    make_fx(kernel(impl, layout), tracing_mode="fake", _allow_non_fake_inputs=True)(*qkv)
    out, *grads = run(kernel(impl, layout), qkv, grad)
    assert {type(x) for x in (out, *grads)} == {torch.Tensor}


def test_it_may_be_a_threads_first_work(impl):
    layout, qkv, grad, _, _ = inputs(CASES["ragged"], dtype=WIDEST[impl])
    expected = run(kernel(impl, layout), qkv, grad)
    with ThreadPoolExecutor(1) as pool:  # a thread of autograd's, say, that has no context of the device yet
        actual = pool.submit(run, kernel(impl, layout), qkv, grad).result()
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("length", "dtype", "runs", "record", "chosen"),
    [
        (65, torch.bfloat16, ("triton", "reference", "flash"), None, "flash"),
        (64, torch.bfloat16, ("triton", "reference", "flash"), None, None),  # windows
        (65, torch.float32, ("triton", "reference", "flash"), None, None),
        (65, torch.bfloat16, ("triton", "reference"), None, None),
        (65, torch.bfloat16, ("cuda", "triton", "reference", "flash"), ("cuda", "a record"), None),
    ],
)
def test_a_library_computes_long_segments(length, dtype, runs, record, chosen, monkeypatch):
    monkeypatch.setattr(public, "runs_on", lambda op, device: runs)
    monkeypatch.setattr(public, "fastest_on", lambda op, device: record)
    layout = PackedLayout.from_lengths([length, 3])
    assert public._library_of(torch.zeros(length + 3, 2, 72, dtype=dtype), layout) == chosen


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_forward_and_backward(impl):
    layout, qkv, grad, _, _ = inputs(LONG, 4, 2, 64, dtype=torch.bfloat16)
    expected = run(kernel(impl, layout), qkv, grad)
    captured = replay(lambda: run(kernel(impl, layout), qkv, grad))
    for got, right in zip(captured, expected, strict=True):
        assert torch.equal(got, right)
