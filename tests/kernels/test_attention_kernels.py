"""packed_attention's own kernels: on the GPU where there is one, else interpreted or emulated."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from emulator import build
from memory import poison_fresh_memory
from test_attention import CASES, assert_rounds, dense, make_inputs, run, visible

from geo_r1.kernels import PackedLayout, packed_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bfloat16 wrongly. Its NumPy remarks on NaN, and on rows of keys past the end
# of a tile, which may overflow and are not stored: tests with such values filter that.
DTYPES = {
    "triton": [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available(),
    "cuda": [torch.float16, torch.bfloat16],
}
WIDEST = {impl: dtypes[0] for impl, dtypes in DTYPES.items()}
# Segments around and over a tile of 128, and around its two halves.
LONG = ((150, 3), ((0, 1, 63, 64, 65, 130), (7,)))
# Vision windows: full ones, some cut at the image's edge, an empty one.
WINDOWS = ((64, 64, 48, 0, 64, 16, 1), None)


def inputs(case, *args, **kwargs):
    """`make_inputs` on the device that kernels run on."""
    lengths = (case[0], case[1] or [()] * len(case[0]))
    _, qkv, grad = make_inputs(lengths, *args, **kwargs)
    layout = PackedLayout.from_lengths(*lengths, device=DEVICE)
    return layout, [x.to(DEVICE) for x in qkv], grad.to(DEVICE), visible(*lengths).to(DEVICE), lengths


def plain_torch(q, k, v, seen, scale):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def kernel(impl, layout, **options):
    return lambda *qkv: packed_attention(*qkv, layout, impl=impl, **options)


def check(impl, case, dtype, heads=(1, 1), head_dim=16, causal=True, scale=None):
    """Output and gradients against float64, beside plain torch in the same dtype."""
    layout, qkv, grad, _, lengths = inputs(case, *heads, head_dim, dtype=dtype)
    seen = visible(*lengths, causal).to(DEVICE)
    actual = run(kernel(impl, layout, causal=causal, scale=scale), qkv, grad)
    plain = run(lambda *x: plain_torch(*x, seen, scale), qkv, grad)
    truth = run(lambda *x: dense(*x, seen, scale), [x.double() for x in qkv], grad.double())
    # With one visible key the scores have no gradient, and plain torch no error: hence the floor.
    assert_rounds(actual, plain, truth, torch.finfo(dtype).eps)


with_dtypes = pytest.mark.parametrize(
    ("impl", "dtype"), [(impl, dtype) for impl, dtypes in DTYPES.items() for dtype in dtypes]
)


@pytest.mark.parametrize("causal", [True, False])
@with_dtypes
@pytest.mark.parametrize("name", CASES)
def test_small_groups(name, impl, dtype, causal):
    check(impl, CASES[name], dtype, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@with_dtypes
def test_head_sizes(impl, dtype, head_dim, causal):
    check(impl, ((20, 3), ((0, 35), (2,))), dtype, head_dim=head_dim, causal=causal)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_heads_that_share_keys(impl, heads):
    check(impl, CASES["twins"], torch.float16, heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_segments_longer_than_a_tile(impl, head_dim, causal):
    check(impl, LONG, torch.float16, (2, 1) if head_dim == 16 else (1, 1), head_dim, causal)


def test_segments_longer_than_a_narrow_tile(impl):
    check(impl, ((40, 3), ((0, 1, 31, 33), (5,))), WIDEST[impl])


@with_dtypes
def test_windows(impl, dtype):
    check(impl, WINDOWS, dtype, (2, 2), 80 if dtype == torch.float16 else 16, causal=False)


@pytest.mark.parametrize(
    ("head_dim", "heads", "causal"),
    [(16, (4, 1), False), (32, (1, 1), True), (80, (2, 1), True), (96, (1, 1), False), (128, (2, 2), True)],
)
def test_windows_of_other_shapes(head_dim, heads, causal, impl):
    check(impl, WINDOWS, torch.float16, heads, head_dim, causal, scale=0.2)


@pytest.mark.parametrize(
    ("case", "dtype", "together"),
    [
        (WINDOWS, torch.float16, True),
        (WINDOWS, torch.float32, False),  # it would not fit
        (((4, 3), ((), (1,))), torch.float16, False),  # a completion sees its prompt
        (((65,), None), torch.float16, False),
    ],
)
@pytest.mark.parametrize("impl", ["triton"])
def test_one_kernel_makes_all_gradients_of_a_window(case, dtype, together, impl, monkeypatch):
    from geo_r1.kernels.attention import triton_backward

    launched = []
    for name in ("_d_window_kernel", "_d_query_kernel", "_d_key_kernel"):
        kernel = getattr(triton_backward, name)
        monkeypatch.setattr(triton_backward, name, Spy(kernel, partial(launched.append, name)))
    check(impl, case, dtype)
    assert launched == (["_d_window_kernel"] if together else ["_d_query_kernel", "_d_key_kernel"])


class Spy:
    """A kernel that reports its launches."""

    def __init__(self, kernel, report):
        self.kernel, self.report = kernel, report

    def __getitem__(self, grid):
        self.report()
        return self.kernel[grid]


@pytest.mark.parametrize("scale", [0.03, 3.0])
def test_scale(impl, scale):
    check(impl, CASES["ragged"], WIDEST[impl], scale=scale)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_large_scores_stay_finite(impl):
    # Scores of several hundreds, some of their rows all far below zero: exp alone would overflow or vanish.
    layout, (q, k, v), grad, seen, _ = inputs(CASES["ragged"], 2, 1, dtype=WIDEST[impl])
    q, k = 10 * q, 10 * k.abs()
    q[::2] = -q[::2].abs()
    actual = run(kernel(impl, layout, scale=1.0), (q, k, v), grad)
    truth = run(lambda *x: dense(*x, seen, 1.0), [x.double() for x in (q, k, v)], grad.double())
    for a, t in zip(actual, truth, strict=True):
        assert a.isfinite().all()
        tolerance = 1e-3 if a.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a.double(), t, rtol=tolerance, atol=tolerance * t.abs().max().item())


def test_non_contiguous_inputs(impl):
    layout, (q, k, v), grad, _, _ = inputs(CASES["twins"], 2, 2, dtype=WIDEST[impl])
    fused = torch.cat([q, k], 2)  # one projection cut in two: rows far apart, heads side by side
    strided = (
        fused[..., :16],
        k.transpose(0, 1).contiguous().transpose(0, 1),  # heads before tokens
        v.transpose(1, 2).contiguous().transpose(1, 2),  # a head's numbers apart: copied
    )
    assert not any(x.is_contiguous() for x in strided)
    actual = run(kernel(impl, layout), strided, grad.transpose(0, 1).contiguous().transpose(0, 1))
    expected = run(kernel(impl, layout), (q, k, v), grad)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))
    expanded = run(
        kernel(impl, layout), (q, k[:, :1].expand(-1, 2, -1), v), torch.ones(()).to(q).expand_as(grad)
    )
    written = run(kernel(impl, layout), (q, k[:, :1].repeat(1, 2, 1), v), torch.ones_like(grad))
    assert all(a.equal(e) for a, e in zip(expanded, written, strict=True))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
@pytest.mark.parametrize("case", [CASES["zero lengths"], LONG], ids=["short", "long"])
def test_every_element_is_written(impl, case, heads, monkeypatch):
    layout, qkv, grad, *_ = inputs(case, *heads, dtype=torch.float16)
    expected = run(kernel(impl, layout), qkv, grad)
    poison_fresh_memory(monkeypatch)
    actual = run(kernel(impl, layout), qkv, grad)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad"])
def test_nan_stays_in_its_group(impl, poisoned):
    layout, qkv, grad, *_ = inputs(((4, 4, 4), ((3, 3), (3, 3), (3, 3))), 2, 1, dtype=WIDEST[impl])
    clean = run(kernel(impl, layout), qkv, grad)
    tensors = dict(zip(("q", "k", "v", "grad"), (*qkv, grad), strict=True))
    tensors[poisoned][10:20] = torch.nan
    poison = run(kernel(impl, layout), qkv, grad)
    others = torch.tensor([*range(10), *range(20, 30)], device=DEVICE)
    assert all(p[others].equal(c[others]) for p, c in zip(poison, clean, strict=True))
    assert any(p[10:20].isnan().any() for p in poison)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_in_a_completion_stays_out_of_its_siblings(impl):
    layout, (q, k, v), *_ = inputs(((4,), ((3, 3),)), dtype=WIDEST[impl])
    clean = packed_attention(q, k, v, layout, impl=impl)
    k[4:7] = v[4:7] = torch.nan
    out = packed_attention(q, k, v, layout, impl=impl)
    others = torch.tensor([0, 1, 2, 3, 7, 8, 9], device=DEVICE)
    assert out[4:7].isnan().all() and out[others].equal(clean[others])


def test_the_same_gradients_every_time(impl):
    layout, qkv, grad, *_ = inputs(LONG, 2, 1, dtype=torch.float16)
    first, second = (run(kernel(impl, layout), qkv, grad) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU chooses its order itself")
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 1), 128), ((1, 1), 80)])
@pytest.mark.parametrize("case", [LONG, WINDOWS], ids=["long", "windows"])
@pytest.mark.parametrize("impl", ["cuda"])
def test_the_order_of_threads_copies_and_products_is_of_no_matter(impl, case, heads, head_dim):
    layout, qkv, grad, *_ = inputs(case, *heads, head_dim, dtype=torch.bfloat16)
    results = []
    for late in (True, False):
        for order in ("forward", "backward", "shuffled"):
            build.adversary(late, order, seed=1)
            results.append(run(kernel(impl, layout), qkv, grad))
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, True, True)])
def test_gradients_of_some_inputs(impl, wanted):
    layout, qkv, grad, *_ = inputs(CASES["twins"], 2, 1, dtype=WIDEST[impl])
    expected = run(kernel(impl, layout), qkv, grad)[1:]
    leaves = [x.clone().requires_grad_(w) for x, w in zip(qkv, wanted, strict=True)]
    kernel(impl, layout)(*leaves).backward(grad)
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad.equal(e) if leaf.requires_grad else leaf.grad is None


@pytest.mark.parametrize("case", [((), ()), ((0, 0), ((0,), ()))], ids=["no groups", "empty groups"])
def test_empty_batch(impl, case):
    layout, qkv, grad, *_ = inputs(case, dtype=WIDEST[impl])
    shapes = [list(x.shape) for x in run(kernel(impl, layout), qkv, grad)]
    assert shapes == [[0, 4, 16], [0, 4, 16], [0, 2, 16], [0, 2, 16]]
