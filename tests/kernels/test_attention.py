import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geo_r1.kernels import PackedLayout, available_impls, packed_attention

# Prompt lengths and, for each prompt, those of its completions.
CASES = {
    "ragged": ((5, 1, 3), ((3, 0, 2), (4,), (1, 1, 6))),
    "zero lengths": ((0, 4, 0, 3), ((), (0, 0), (3, 2), (2, 0, 2))),
    "groups of one": ((6, 2), ((3,), (5,))),
    "no completions": ((7, 1, 7), ((), (), ())),
    "twins": ((4, 4), ((3, 3, 3), (3, 3))),
    "one token": ((1,), ((),)),
}
HEADS = [(4, 2), (3, 3), (4, 1)]


def random_case(seed):
    rng = random.Random(seed)
    prompts = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))]
    return prompts, [[rng.randint(0, 7) for _ in range(rng.randint(0, 4))] for _ in prompts]


def visible(prompts, completions, causal=True):
    """[T, T] bool: j <= i, both in the same group, j in the prompt or in i's own completion."""
    where = [
        (group, member)
        for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True))
        for member, length in enumerate((prompt, *lengths))
        for _ in range(length)
    ]
    group, member = torch.tensor(where).view(-1, 2).T
    seen = (group[:, None] == group) & ((member == 0) | (member[:, None] == member))
    return seen.tril() if causal else seen


def dense(q, k, v, seen, scale=None):
    """The definition with every score written down."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", score.masked_fill(~seen, -torch.inf).softmax(-1), v)


def torch_dense(q, k, v, seen):
    """Plain torch in one call, for its rounding."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1)


def make_inputs(case, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64, seed=0):
    """Layout, (q, k, v) and a gradient of the output."""
    layout = PackedLayout.from_lengths(*case)
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(layout.num_tokens, n, head_dim, generator=g, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return layout, (q, k, v), grad


def run(op, qkv, grad):
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equal(actual, expected, **tolerance):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_rounds(actual, plain, truth, floor=0.0):
    """Errors against float64 are at most twice plain torch's in the same dtype, and a floor."""
    for name, a, p, t in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert a.dtype == p.dtype and a.shape == t.shape
        error, allowed = ((x.double() - t).norm() for x in (a, p))
        assert error <= 2 * allowed + floor * t.numel() ** 0.5, f"{name}: {error:.2e}, torch {allowed:.2e}"
        assert floor or error > 0


def reference(*qkv, **options):
    return packed_attention(*qkv, **options, impl="reference")


def check_against_dense(
    case, heads=4, kv_heads=2, head_dim=16, causal=True, scale=None, op=reference, atol=1e-12
):
    layout, qkv, grad = make_inputs(case, heads, kv_heads, head_dim)
    actual = run(lambda *x: op(*x, layout=layout, causal=causal, scale=scale), qkv, grad)
    expected = run(lambda *x: dense(*x, visible(*case, causal), scale), qkv, grad)
    assert_equal(actual, expected, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_definition(name, heads, kv_heads, head_dim, causal):
    check_against_dense(CASES[name], heads, kv_heads, head_dim, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_equals_the_dense_definition_on_random_groups(seed, causal):
    check_against_dense(random_case(seed), causal=causal)


@pytest.mark.parametrize("scale", [0.5, 3, 1e-6])
def test_scale(scale):
    check_against_dense(CASES["ragged"], scale=scale)


def test_a_token_sees_the_mean_of_what_is_visible():
    # Equal scores: the output is the mean of the visible values, by hand for prompt 2, completions 1 and 2.
    layout = PackedLayout.from_lengths([2], [[1, 2]])
    v = torch.tensor([1.0, 3.0, 8.0, 20.0, 40.0]).view(5, 1, 1)
    zero = torch.zeros(5, 1, 1)
    causal, whole = (
        packed_attention(zero, zero, v, layout, causal=c).flatten().tolist() for c in (True, False)
    )
    assert causal == pytest.approx([1, 2, 4, 8, 16])
    assert whole == pytest.approx([2, 2, 4, 16, 16])


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    case = ((2, 1), ((2, 0), (1,)))
    layout, qkv, _ = make_inputs(case, heads=2, kv_heads=1, head_dim=3)
    leaves = [x.requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, layout, causal=causal), leaves)


def test_non_contiguous_inputs():
    case = CASES["ragged"]
    layout, (q, k, _), grad = make_inputs(case, heads=4, kv_heads=4)
    # One projection cut in three, heads before tokens, one head read four times.
    fused = torch.cat([q, k], 2)
    inputs = (
        fused[..., :16],
        k.transpose(0, 1).contiguous().transpose(0, 1),
        fused[:, :1, 16:].expand(-1, 4, -1),
    )
    assert not any(x.is_contiguous() for x in inputs)
    upstream = grad.transpose(0, 1).contiguous().transpose(0, 1)
    actual = run(lambda *x: packed_attention(*x, layout), inputs, upstream)
    expected = run(lambda *x: dense(*x, visible(*case)), [x.contiguous() for x in inputs], grad)
    assert_equal(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_plain_torch(dtype, heads):
    case = ((96, 33, 64), ((20,) * 8, (7, 0, 31), ()))
    layout, qkv, grad = make_inputs(case, *heads, dtype=dtype)
    seen = visible(*case)
    actual = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    plain = run(lambda *x: torch_dense(*x, seen), qkv, grad)
    truth = run(lambda *x: dense(*x, seen), [x.double() for x in qkv], grad.double())
    assert all(x.dtype == dtype for x in actual)
    assert_rounds(actual, plain, truth)


@pytest.mark.parametrize("name", CASES)
def test_shared_prompt_equals_each_completion_alone(name):
    prompts, completions = CASES[name]
    layout, qkv, grad = make_inputs(CASES[name])
    expected = [torch.zeros_like(x) for x in (qkv[0], *qkv)]
    start = 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        prompt_row, end = torch.arange(start, start + prompt), start + prompt
        for index, length in enumerate(lengths or (0,)):
            row = torch.cat([prompt_row, torch.arange(end, end + length)])
            upstream = grad[row].clone()
            if index:  # the prompt's own output counts once
                upstream[:prompt] = 0
            causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            out, *grads = run(lambda *x, seen=causal: dense(*x, seen), [x[row] for x in qkv], upstream)
            expected[0][row] = out
            for total, part in zip(expected[1:], grads, strict=True):
                total[row] += part
            end += length
        start = end
    actual = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    assert_equal(actual, expected, rtol=1e-10, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


def test_no_tensor_of_all_pairs():
    case = ((32,) * 24, ((8,) * 4,) * 24)
    layout, qkv, grad = make_inputs(case, dtype=torch.float32)
    with LargestTensor() as largest:
        actual = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    # Scores of a prompt with itself and of a completion with its prompt and itself, every head.
    scores = 4 * max(24 * 32 * 32, 96 * 8 * 40)
    values = 4 * 16 * 96 * 40  # heads, head size, rows gathered for the completions
    assert layout.num_tokens == 1536
    assert grad.numel() <= largest.numel <= max(scores, values) < layout.num_tokens**2 / 8
    assert_equal(actual, run(lambda *x: torch_dense(*x, visible(*case)), qkv, grad), rtol=1e-4, atol=1e-5)


def test_the_recorder_sees_a_tensor_of_all_pairs():
    case = CASES["ragged"]
    layout, qkv, grad = make_inputs(case)
    with LargestTensor() as largest:
        run(lambda *x: dense(*x, visible(*case)), qkv, grad)
    assert largest.numel >= 4 * layout.num_tokens**2


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad"])
def test_nan_stays_in_its_group(poisoned):
    case = ((4, 4, 4), ((3, 3), (3, 3), (3, 3)))  # one shape: the three groups run in one call
    layout, qkv, grad = make_inputs(case)
    clean = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    tensors = dict(zip(("q", "k", "v", "grad"), (*qkv, grad), strict=True))
    tensors[poisoned][10:20] = torch.nan
    poison = run(lambda *x: packed_attention(*x, layout), qkv, grad)
    others = torch.tensor([*range(10), *range(20, 30)])
    assert_equal([x[others] for x in poison], [x[others] for x in clean], rtol=0, atol=0)
    assert any(x[10:20].isnan().any() for x in poison)


@pytest.mark.parametrize("case", [((), ()), ((0, 0), ((0,), ()))], ids=["no groups", "empty groups"])
def test_empty_batch(case):
    layout, qkv, grad = make_inputs(case)
    assert layout.num_tokens == 0
    for causal in (True, False):
        actual = run(lambda *x, c=causal: packed_attention(*x, layout, causal=c), qkv, grad)
        assert [list(x.shape) for x in actual] == [[0, 4, 16], [0, 4, 16], [0, 2, 16], [0, 2, 16]]
        assert {x.dtype for x in actual} == {torch.float64}


def test_default_is_the_first_available_implementation():
    default, *_ = available_impls()["packed_attention"]
    layout, qkv, _ = make_inputs(CASES["ragged"])
    named = packed_attention(*qkv, layout, impl=default)
    torch.testing.assert_close(packed_attention(*qkv, layout), named, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("flash", r"packed_attention: impl='flash' cannot run here \(device cpu\); available: .*reference"),
        ("fast", r"packed_attention: impl='fast' is not known \(device cpu\); available: .*reference"),
    ],
)
def test_an_implementation_that_cannot_run_is_an_error(impl, message):
    layout, qkv, _ = make_inputs(CASES["ragged"])
    with pytest.raises(ValueError, match=message):
        packed_attention(*qkv, layout, impl=impl)


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            ones(4, 4, 8),
            *[ones(5, 2, 8)] * 2,
            "q must be [5, heads, head size] for this layout, got [4, 4, 8]",
        ),
        (ones(5, 32), *[ones(5, 2, 8)] * 2, "q must be [5, heads, head size] for this layout, got [5, 32]"),
        (
            ones(5, 4, 0),
            *[ones(5, 2, 0)] * 2,
            "q must be [5, heads, head size] for this layout, got [5, 4, 0]",
        ),
        (ones(5, 4, 8), *[ones(4, 2, 8)] * 2, "must both be [5, key heads, 8], got [4, 2, 8] and [4, 2, 8]"),
        (ones(5, 4, 8), *[ones(5, 2, 4)] * 2, "must both be [5, key heads, 8], got [5, 2, 4] and [5, 2, 4]"),
        (ones(5, 4, 8), *[ones(5, 16)] * 2, "must both be [5, key heads, 8], got [5, 16] and [5, 16]"),
        (ones(5, 4, 8), ones(5, 2, 8), ones(5, 1, 8), "8], got [5, 2, 8] and [5, 1, 8]"),
        (ones(5, 4, 8), *[ones(5, 3, 8)] * 2, "4 query heads cannot be shared among 3 key heads"),
        (ones(5, 2, 8), *[ones(5, 4, 8)] * 2, "2 query heads cannot be shared among 4 key heads"),
        (ones(5, 4, 8), *[ones(5, 0, 8)] * 2, "4 query heads cannot be shared among 0 key heads"),
        (
            ones(5, 4, 8),
            ones(5, 2, 8, dtype=torch.float64),
            ones(5, 2, 8),
            "q, k and v must share a float dtype, got torch.float32, torch.float64, torch.float32",
        ),
        (
            *[ones(5, 4, 8, dtype=torch.int64)] * 3,
            "q, k and v must share a float dtype, got torch.int64, torch.int64, torch.int64",
        ),
        (
            ones(5, 4, 8),
            ones(5, 2, 8),
            ones(5, 2, 8, device="meta"),
            "q, k, v and the layout must share a device, got cpu, cpu, meta, cpu",
        ),
        (
            *[ones(5, 4, 8, device="meta")] * 3,
            "q, k, v and the layout must share a device, got meta, meta, meta, cpu",
        ),
    ],
)
def test_inputs_that_do_not_fit_say_what_was_given(q, k, v, message):
    with pytest.raises(ValueError) as error:
        packed_attention(q, k, v, PackedLayout.from_lengths([2], [[3]]))
    assert message in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -0.3, float("nan"), float("inf")])
def test_scale_is_finite_and_above_zero(scale):
    layout, qkv, _ = make_inputs(CASES["ragged"])
    with pytest.raises(ValueError, match=f"scale must be finite and above 0, got {scale}"):
        packed_attention(*qkv, layout, scale=scale)
