import importlib.metadata
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from memory import replay
from test_attention import (
    CASES,
    HEADS,
    assert_equal,
    assert_rounds,
    check_against_dense,
    dense,
    make_inputs,
    random_case,
    run,
    visible,
)

from geo_r1.kernels import PackedLayout
from geo_r1.kernels.attention import flash, libraries
from geo_r1.kernels.attention.flash import FlashPlan, flash_attention

SHARED = {  # what the second call can look like
    "one group": ((5,), ((3, 0, 2),)),
    "one of three groups": ((4, 3, 0), ((), (2, 2), (3,))),
    "one query a group": ((1, 1, 1), ((1,), (1,), ())),
    "long": ((70, 0, 33), ((40, 1, 0), (6,), (9, 64))),
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the libraries' kernels need a GPU")
LIBRARIES = [
    pytest.param(
        library.kernels,
        marks=pytest.mark.skipif(
            library not in libraries.installed(), reason=f"{library.package} is not installed, or too old"
        ),
    )
    for library in libraries.LIBRARIES
]


class PlainKernels:
    """A flash library in plain torch, which checks what it is given.

    Any dtype: arithmetic is in float32 or float64, and rounded where FlashAttention-2 rounds, which is what
    enters a product and what is stored.
    """

    def __init__(self):
        self.calls = []

    def sequences(self, q, k, v, sequences, causal, scale):
        cu_q, cu_k, max_q, max_k = sequences
        self.calls.append((q, k, v))
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1] and len(cu_q) == len(cu_k) > 1
        assert max_q >= 2
        share = q.shape[1] // k.shape[1]
        q, k, v = (wide(x) for x in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)))
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            assert q1 - q0 <= max_q and k1 - k0 <= max_k
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(1) & causal
            score = torch.einsum("ihd,jhd->hij", q[q0:q1], k[k0:k1]) * scale
            yield slice(q0, q1), slice(k0, k1), k[k0:k1], v[k0:k1], score.masked_fill(hidden, -torch.inf)

    def forward(self, q, k, v, sequences, causal, scale):
        out, lse = torch.full_like(q, torch.nan), wide(q.new_full(q.shape[1::-1], torch.nan))
        for rows, _, _, values, score in self.sequences(q, k, v, sequences, causal, scale):
            lse[:, rows] = score.logsumexp(-1)
            exp = (score - score.amax(-1, keepdim=True)).exp() if score.numel() else score
            product = torch.einsum("hij,jhd->ihd", wide(exp.to(q.dtype)), values)
            out[rows] = (product / exp.sum(-1).T[..., None]).to(q.dtype)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, sequences, causal, scale):
        assert lse.is_contiguous()
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        delta = (wide(d_out) * wide(out)).sum(-1).T[..., None]
        for rows, cols, keys, values, score in self.sequences(q, k, v, sequences, causal, scale):
            p = (score - lse[:, rows, None]).exp()
            dp = torch.einsum("ihd,jhd->hij", wide(d_out[rows]), values)
            ds, p = (wide(x.to(q.dtype)) for x in (p * (dp - delta[:, rows]), p))
            dq[rows] = (torch.einsum("hij,jhd->ihd", ds, keys) * scale).to(q.dtype)
            dk_H = (torch.einsum("hij,ihd->jhd", ds, wide(q[rows])) * scale).to(q.dtype)
            dv_H = torch.einsum("hij,ihd->jhd", p, wide(d_out[rows])).to(q.dtype)
            dk[cols], dv[cols] = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk_H, dv_H))
        return dq, dk, dv


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@pytest.fixture
def plain(monkeypatch):
    kernels = PlainKernels()
    monkeypatch.setattr(flash, "_kernels", lambda q: kernels)
    monkeypatch.setattr(flash, "DTYPES", (torch.float16, torch.float32, torch.float64))
    return kernels


def check_merge(case, heads=4, kv_heads=2, causal=True, scale=0.25):
    check_against_dense(case, heads, kv_heads, causal=causal, scale=scale, op=flash_attention, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("name", [*CASES, *SHARED])
def test_the_merge_equals_the_dense_definition(plain, name, heads, kv_heads, causal):
    check_merge({**CASES, **SHARED}[name], heads, kv_heads, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_merge_equals_the_dense_definition_on_random_groups(plain, seed, causal):
    check_merge(random_case(seed), causal=causal)


@pytest.mark.parametrize("scale", [3.0, 40.0, 1e-6])
def test_scale(plain, scale):
    check_merge(CASES["ragged"], scale=scale)


def test_merged_rows_round_once_in_half_precision(plain):
    # Both parts are exact in float16, so the result is that of float32 arithmetic rounded once.
    layout = PackedLayout.from_lengths([1], [[1]])
    q, k = torch.zeros(2, 1, 8, dtype=torch.float16), torch.zeros(2, 1, 8, dtype=torch.float16)
    v = torch.tensor([1.0, 1 + 2**-9]).half().view(2, 1, 1).expand(-1, -1, 8)
    out = flash_attention(q, k, v, layout, causal=True, scale=1.0)
    assert out.dtype == torch.float16
    assert out[:, 0, 0].tolist() == [1.0, 1 + 2**-10]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_size", [8, 72, 256])
def test_the_kernels_that_merge_and_add(head_size, dtype, gathered):
    pytest.importorskip("triton")
    from geo_r1.kernels.attention import triton_merge

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(head_size)
    out, lse = torch.randn(50, 3, head_size, generator=g), 5 * torch.randn(3, 50, generator=g)
    part, part_lse = torch.randn(3, 37, head_size, generator=g), 5 * torch.randn(3, 37, generator=g)
    part_lse[0, :2] = torch.tensor([-200.0, 200.0])
    rows = torch.randperm(50, generator=g)[:37].to(device) if gathered else slice(9, 46)
    found, plain, right = [], [], []
    for results, merging, wide in (
        (found, triton_merge, dtype),
        (plain, flash.TorchMerging, dtype),
        (right, flash.TorchMerging, torch.float64),
    ):
        whole, piece = (x.to(dtype).to(device, wide, copy=True) for x in (out, part))
        piece = piece.transpose(0, 1)  # as libraries may return it: heads first in memory
        sums = [x.to(device, torch.promote_types(wide, torch.float32), copy=True) for x in (lse, part_lse)]
        total = whole.clone()
        merging.merge(whole, sums[0], piece, sums[1], rows)
        merging.add(total, piece, rows)
        results += [whole, sums[0], total]
    for got, theirs, truth in zip(found, plain, right, strict=True):
        error, allowed = ((x.double() - truth).abs().max() for x in (got, theirs))
        assert error <= 2 * allowed + 1e-6
    outside = torch.ones(50, dtype=torch.bool, device=device)
    outside[rows] = False
    assert torch.equal(found[0][outside], plain[0][outside])


def test_calls(plain):
    def calls(case):
        plain.calls.clear()
        layout, qkv, _ = make_inputs(case)
        flash_attention(*qkv, layout, causal=True, scale=1.0)
        return qkv, plain.calls

    for name in ("no completions", "one token"):
        qkv, [own] = calls(CASES[name])
        assert all(x is y for x, y in zip(own, qkv, strict=True))
    (q, k, v), [_, shared] = calls(SHARED["one group"])
    assert [x.data_ptr() for x in shared] == [q[5:].data_ptr(), k.data_ptr(), v.data_ptr()]  # no copy
    (q, k, v), [_, shared] = calls(CASES["twins"])
    queries, keys = [*range(4, 13), *range(17, 23)], [*range(4), *range(13, 17)]
    for actual, x, rows in zip(shared, (q, k, v), (queries, keys, keys), strict=True):
        torch.testing.assert_close(actual, x[rows], rtol=0, atol=0)


def test_a_layout_is_planned_once():
    layout = PackedLayout.from_lengths(*CASES["zero lengths"])
    plan = FlashPlan.of(layout)
    assert FlashPlan.of(layout) is plan
    # Prompts of 0, 4, 0, 3; completions of none, 0, 3 + 2 and 2 + 0 + 2: one group has both.
    assert plan.cu_segment is layout.cu_segment
    assert plan.cu_completion.tolist() == [0, 0, 0, 0, 4]
    assert plan.cu_prompt.tolist() == [0, 0, 0, 0, 3]
    assert plan.rows == (slice(12, 16), slice(9, 12))
    assert plan[5:8] == (4, 4, 3)


def test_a_plan_made_in_inference_mode_serves_training(plain):
    case = CASES["twins"]
    layout, qkv, grad = make_inputs(case)
    with torch.inference_mode():
        flash_attention(*qkv, layout, causal=True, scale=0.25)
    actual = run(lambda *x: flash_attention(*x, layout, causal=True, scale=0.25), qkv, grad)
    assert_equal(actual, run(lambda *x: dense(*x, visible(*case), 0.25), qkv, grad), rtol=1e-10, atol=1e-10)


def test_inputs_that_the_libraries_cannot_load_are_copied(plain):
    case = CASES["ragged"]
    layout, (q, k, v), grad = make_inputs(case, heads=4, kv_heads=4)
    rows = len(q)
    odd = torch.zeros(rows * 64 + 1, dtype=q.dtype)[1:].view_as(q).copy_(q)  # not at 16 bytes
    strided = torch.zeros(rows, 4, 17, dtype=q.dtype)[..., :16].copy_(k)  # heads not 16 bytes apart
    across = v.transpose(1, 2).contiguous().transpose(1, 2)  # a head's values not side by side
    fused = torch.cat([q, k], 2)[..., :16]  # a view that they can load
    expected = run(lambda *x: dense(*x, visible(*case), 0.25), (q, k, v), grad)
    for inputs, copied in (((odd, strided, across), True), ((fused, k, v), False)):
        plain.calls.clear()
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = flash_attention(*inputs, layout, causal=True, scale=0.25)
        upstream = grad.transpose(1, 2).contiguous().transpose(1, 2)
        grads = torch.autograd.grad(out, inputs, upstream)
        assert_equal([out.detach(), *grads], expected, rtol=1e-10, atol=1e-10)
        assert out.is_contiguous()
        for given, seen in zip(inputs, plain.calls[0], strict=True):
            assert (given.data_ptr() != seen.data_ptr()) == copied
            assert seen.data_ptr() % 16 == 0 and seen.stride(2) == 1 and seen.stride(1) % 2 == 0


@pytest.mark.parametrize("case", [((), ()), ((0, 0), ((0,), ()))], ids=["no groups", "empty groups"])
def test_empty_batch(plain, case):
    layout, qkv, grad = make_inputs(case)
    actual = run(lambda *x: flash_attention(*x, layout, causal=True, scale=1.0), qkv, grad)
    assert [list(x.shape) for x in actual] == [[0, 4, 16], [0, 4, 16], [0, 2, 16], [0, 2, 16]]
    assert not plain.calls


def test_only_some_gradients(plain):
    layout, qkv, grad = make_inputs(CASES["ragged"])
    _, *full = run(lambda *x: flash_attention(*x, layout, causal=True, scale=1.0), qkv, grad)
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(qkv)]
        out = flash_attention(*leaves, layout, causal=True, scale=1.0)
        (actual,) = torch.autograd.grad(out, leaves[wanted], grad)
        torch.testing.assert_close(actual, full[wanted], rtol=0, atol=0)


def test_a_second_derivative_is_refused(plain):
    layout, qkv, _ = make_inputs(CASES["ragged"])
    leaves = [x.requires_grad_() for x in qkv]
    out = flash_attention(*leaves, layout, causal=True, scale=1.0)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"geo_r1.flash_attention_backward.* autograd"):
        torch.autograd.grad(dq.square().sum(), leaves[0])


@pytest.mark.parametrize("name", ["no completions", "twins", "one group"])
def test_opcheck(plain, name):
    layout, qkv, grad = make_inputs({**CASES, **SHARED}[name], dtype=torch.float32)
    fields = (True, 0.25, *FlashPlan.of(layout))
    leaves = [x.requires_grad_() for x in qkv]
    torch.library.opcheck(flash._forward, (*leaves, *fields))
    with torch.no_grad():
        saved = flash._forward(*qkv, *fields)
        torch.library.opcheck(flash._backward, (grad, *qkv, *saved, *fields))


def test_compiles_with_layouts_never_used_before(plain):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda layout, *x: flash_attention(*x, layout, causal=True, scale=0.25),
        fullgraph=True,
        backend="aot_eager",
    )
    for case in (CASES["ragged"], CASES["twins"], SHARED["one group"], CASES["no completions"]):
        expected = run(lambda *x, c=case: dense(*x, visible(*c), 0.25), *make_inputs(case)[1:])
        for _ in range(2):
            layout, qkv, grad = make_inputs(case)
            for _ in range(2):
                actual = run(lambda *x, p=layout: compiled(p, *x), qkv, grad)
                assert_equal(actual, expected, rtol=1e-10, atol=1e-10)
            eager = run(lambda *x, p=layout: flash_attention(*x, p, causal=True, scale=0.25), qkv, grad)
            assert_equal(eager, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 4, 16), torch.float32, "torch.float32 inputs, only float16 and bfloat16"),
        ((5, 4, 16), torch.float64, "torch.float64 inputs, only float16 and bfloat16"),
        ((5, 4, 20), torch.float16, "a head size of 20, only multiples of 8 up to 256"),
        ((5, 4, 264), torch.bfloat16, "a head size of 264, only multiples of 8 up to 256"),
    ],
)
def test_what_the_libraries_do_not_take_is_an_error(shape, dtype, message):
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError) as error:
        flash_attention(x, x, x, PackedLayout.from_lengths([2], [[3]]), causal=True, scale=1.0)
    assert str(error.value) == f"packed_attention: impl='flash' does not take {message}"


def test_too_many_segments_are_an_error():
    x = torch.zeros(0, 1, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="impl='flash' does not take 65536 segments, only up to 65535"):
        flash_attention(x, x, x, PackedLayout.from_lengths([0] * 65536), causal=True, scale=1.0)


ALL = {"flash-attn-3": "3.0.0+cu130torch2.11", "flash-attn-4": "4.0.0b27", "flash-attn": "2.8.3.post1"}
NAMES = {
    "3": libraries.Flash3Kernels,
    "4": libraries.Flash4Kernels,
    "2": libraries.Flash2Kernels,
    "torch": libraries.TorchKernels,
}


@pytest.mark.parametrize(
    ("packages", "chip", "head_size", "deterministic", "expected"),
    [
        (ALL, 9, 128, False, "3"),
        (ALL, 9, 256, False, "3"),
        (ALL, 9, 256, True, "2"),
        (ALL, 9, 128, True, "3"),
        (ALL, 10, 128, False, "4"),
        (ALL, 10, 128, True, "2"),
        (ALL, 10, 192, False, "2"),
        (ALL, 8, 128, False, "2"),
        (ALL, 12, 128, False, "2"),
        ({"flash-attn-4": "4.0.0"}, 9, 128, False, "4"),
        ({"flash-attn-4": "4.0.0"}, 9, 128, True, "torch"),
        ({"flash-attn-4": "0.0.0"}, 10, 128, False, "torch"),
        ({"flash-attn": "2.10.0"}, 9, 64, False, "2"),
        ({"flash-attn": "2.6.3"}, 9, 64, False, "torch"),
        ({"flash-attn": "built here"}, 9, 64, False, "torch"),
        ({}, 9, 64, False, "torch"),
    ],
)
def test_the_first_library_that_fits_is_used(monkeypatch, packages, chip, head_size, deterministic, expected):
    def found(name):
        if name == "torch":
            return torch.__version__
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(libraries, "installed", libraries.installed.__wrapped__)
    assert libraries.library_for(chip, head_size, deterministic).kernels is NAMES[expected]


class Stub(ModuleType):
    """Stands for an installed module."""

    def __init__(self, monkeypatch, name, **members):
        super().__init__(name)
        vars(self).update(members)
        monkeypatch.setitem(sys.modules, name, self)


def call_2(monkeypatch, kernels, switched):
    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dropout_p == 0
        return *kernels.forward(q, k, v, sequences, causal, softmax_scale), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        off = (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        assert off == (0, -1, -1, 0, None)
        switched.append(deterministic)
        grads = kernels.backward(dout, q, k, v, out, softmax_lse, sequences, causal, softmax_scale)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)

    Stub(monkeypatch, "flash_attn")
    Stub(
        monkeypatch,
        "flash_attn.flash_attn_interface",
        _wrapped_flash_attn_varlen_forward=forward,
        _wrapped_flash_attn_varlen_backward=backward,
    )


# As its source declares them.
FLASH_3 = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(a!)? k_new=None, Tensor(b!)? v_new=None, Tensor? q_v=None, "
    "Tensor(c!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
    "Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def call_3(monkeypatch, kernels, switched):
    schemas = {
        name: torch._C.parse_schema(f"flash_attn_3::{name}{schema}") for name, schema in FLASH_3.items()
    }

    def bound(name, arguments, options):
        """The given arguments by name."""
        parameters = schemas[name].arguments
        given = dict(zip((p.name for p in parameters), arguments, strict=False)) | options
        assert given.keys() <= {p.name for p in parameters}
        return given

    def sequences(given):
        return tuple(given[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))

    def forward(*arguments, **options):
        given = bound("fwd", arguments, options)
        assert given["num_splits"] == 1
        qkv = (given["q"], given["k"], given["v"])
        results = kernels.forward(*qkv, sequences(given), given["is_causal"], given["softmax_scale"])
        return *results, None, None

    def backward(*arguments, **options):
        given = bound("bwd", arguments, options)
        switched.append(given["deterministic"])
        tensors = (given[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        grads = kernels.backward(*tensors, sequences(given), given["is_causal"], given["softmax_scale"])
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            assert given[name].is_contiguous()
            given[name].copy_(grad)
        return [given["softmax_lse"]] * 5

    Stub(monkeypatch, "flash_attn_interface")
    ops = SimpleNamespace(fwd=forward, bwd=backward)
    monkeypatch.setattr(torch.ops, "flash_attn_3", ops, raising=False)


def call_4(monkeypatch, kernels, switched):
    def forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
        causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
        return_lse=False,
    ):  # fmt: skip
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = kernels.forward(q, k, v, sequences, causal, softmax_scale)
        return out, lse if return_lse else None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        switched.append(deterministic)
        return kernels.backward(dout, q, k, v, out, lse, sequences, causal, softmax_scale)

    Stub(monkeypatch, "flash_attn")
    interface = Stub(
        monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=forward, _flash_attn_bwd=backward
    )
    Stub(monkeypatch, "flash_attn.cute", interface=interface)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("library", "prepare"),
    [(libraries.Flash2Kernels, call_2), (libraries.Flash3Kernels, call_3), (libraries.Flash4Kernels, call_4)],
)
def test_packages_are_called_by_their_signatures(monkeypatch, library, prepare, deterministic):
    switched = []
    prepare(monkeypatch, PlainKernels(), switched)
    monkeypatch.setattr(flash, "_kernels", lambda q: library())
    monkeypatch.setattr(flash, "DTYPES", (torch.float64,))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for causal in (True, False):
        check_merge(CASES["ragged"], causal=causal)
    assert set(switched) == {deterministic}


def test_torch_has_the_kernels_as_we_call_them():
    # Shapes only: on a meta device torch runs no kernel, but checks the call and lays out the log-sum-exp.
    q, k = torch.empty(7, 4, 80, device="meta", dtype=torch.float16), torch.empty(7, 2, 80, device="meta")
    k, cu = k.half(), torch.empty(3, device="meta", dtype=torch.int32)
    kernels = libraries.TorchKernels()
    out, lse = kernels.forward(q, k, k, (cu, cu, 4, 4), True, 0.5)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 7), torch.float32)
    grads = kernels.backward(q, q, k, k, out, lse, (cu, cu, 4, 4), True, 0.5)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


ROUNDING = {
    **SHARED,
    "zero lengths": CASES["zero lengths"],
    "groups": ((250, 31, 129), ((17, 200, 0, 64), (128, 1), (90, 91, 92))),
    "windows": ([64] * 12 + [16, 1, 0], [()] * 15),
}


def check_rounding(dtype, heads, kv_heads, head_dim, causal, device):
    """Errors against float64 are at most twice those of the definition in the same dtype.

    Plain torch's own kernel is no measure here: where it takes a mask and grouped heads it computes in
    float32 and rounds once, which a kernel that feeds 16-bit probabilities to matrix units cannot.
    """
    for name, case in ROUNDING.items():
        _, qkv, grad = make_inputs(case, heads, kv_heads, head_dim, dtype)
        qkv, grad = [x.to(device) for x in qkv], grad.to(device)
        layout, seen = PackedLayout.from_lengths(*case, device), visible(*case, causal).to(device)
        options = {"causal": causal, "scale": head_dim**-0.5}
        actual = run(lambda *x, p=layout, o=options: flash_attention(*x, p, **o), qkv, grad)
        plain = run(lambda *x, m=seen: dense(*x, m), qkv, grad)
        truth = run(lambda *x, m=seen: dense(*x, m), [x.double() for x in qkv], grad.double())
        assert all(x.dtype == dtype for x in actual), name
        assert_rounds(actual, plain, truth)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(4, 2, 16), (3, 3, 80)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_merge_rounds_no_worse_than_plain_torch(plain, monkeypatch, dtype, sizes, causal):
    monkeypatch.setattr(flash, "DTYPES", (dtype,))
    check_rounding(dtype, *sizes, causal, "cpu")


@on_gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(4, 2, 128), (3, 3, 80), (4, 1, 64), (2, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_libraries_round_no_worse_than_plain_torch(monkeypatch, dtype, sizes, causal, library):
    monkeypatch.setattr(flash, "_kernels", lambda q: library())
    check_rounding(dtype, *sizes, causal, "cuda")


@on_gpu
def test_a_cuda_graph_replays_forward_and_backward():
    case = SHARED["long"]
    _, qkv, grad = make_inputs(case, head_dim=64, dtype=torch.bfloat16)
    qkv, grad, layout = [x.cuda() for x in qkv], grad.cuda(), PackedLayout.from_lengths(*case, "cuda")

    def step():
        return run(lambda *x: flash_attention(*x, layout, causal=True, scale=0.125), qkv, grad)

    def change():
        for x in qkv:
            x.copy_(x.flip(0))

    captured = replay(step, change)
    assert_equal(captured, step(), rtol=2e-2, atol=2e-2)  # dQ is added up in any order
