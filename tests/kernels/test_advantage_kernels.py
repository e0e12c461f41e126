"""Both kernels against the reference, which tests/kernels/test_advantage.py holds to the formula."""

import itertools

import pytest
import torch
from memory import poison_fresh_memory

from geo_r1.kernels import group_advantage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
LENGTHS = (3, 0, 1, 8, 2, 130, 0, 65)  # none, alone, and more than a block of 64
OPTIONS = [
    {"baseline": baseline, "scale": scale, "correction": correction}
    for baseline, scale, correction in itertools.product(
        ("mean", "leave_one_out"), ("group", "batch", "none"), (0, 1)
    )
]


def boundaries(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def draw(num, seed=0):
    """Rewards in steps of 1/16, exact in every dtype, and which are valid."""
    g = torch.Generator().manual_seed(seed)
    reward = torch.randint(-16, 16, (num,), generator=g) / 16
    return reward.to(DEVICE), (torch.rand(num, generator=g) > 0.3).to(DEVICE)


def assert_true(got, truth, plain):
    """The error against float64 is at most twice that of plain torch, plus the rounding of the result."""
    assert got.dtype == plain.dtype and got.shape == truth.shape
    ulps = 8 if got.dtype == torch.float64 else 1  # the truth is itself rounded in float64
    floor = ulps * torch.finfo(got.dtype).eps * truth.abs().amax()
    error, allowed = (got - truth).abs(), 2 * (plain - truth).abs().amax() + floor
    assert (error <= allowed).all(), f"error {error.max().item():.3g}, allowed {allowed.item():.3g}"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_reference(options, impl):
    reward, valid = draw(sum(LENGTHS))
    for dtype, index in zip(DTYPES, itertools.cycle((torch.int32, torch.int64))):
        if (dtype, impl, DEVICE) == (torch.bfloat16, "triton", "cpu"):  # the interpreter has none
            continue
        for mask in (None, valid, torch.zeros_like(valid)):
            cu_group = boundaries(LENGTHS, index)
            given = {"valid_N": mask, **options}
            truth = group_advantage(reward.double(), cu_group, **given, impl="reference")
            plain = group_advantage(reward.to(dtype), cu_group, **given, impl="reference")
            assert_true(group_advantage(reward.to(dtype), cu_group, **given, impl=impl), truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_offset_and_a_small_eps_keep_their_digits(dtype, impl):
    reward, _ = draw(sum(LENGTHS))
    reward = (reward + 1e6).to(dtype)
    for options in ({"eps": 1e-3}, {"scale": "batch", "eps": 0.1}, {"eps": 1e-9}):
        truth, plain, got = (
            group_advantage(r, boundaries(LENGTHS), **options, impl=name)
            for r, name in ((reward.double(), "reference"), (reward, "reference"), (reward, impl))
        )
        assert_true(got, truth, plain)


@pytest.mark.parametrize(
    ("scale", "lengths"), [("group", [i % 8 for i in range(300)]), ("batch", [700, 1, 700])]
)
def test_many_groups_and_a_batch_wider_than_a_block(scale, lengths, impl):
    reward, valid = draw(sum(lengths))
    got, expected = (
        group_advantage(reward.double(), boundaries(lengths), valid_N=valid, scale=scale, impl=name)
        for name in (impl, "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_equal_rewards_and_lone_members_give_exactly_zero(baseline, scale, impl):
    reward = torch.tensor([0.9] * 8 + [0.3] + [0.1, 0.7] + [5.0, 1.0], device=DEVICE)
    valid = torch.tensor([True] * 11 + [True, False], device=DEVICE)
    options = {"baseline": baseline, "scale": scale, "eps": 0.0, "impl": impl}
    got = group_advantage(reward, boundaries((8, 1, 2, 2)), valid_N=valid, **options)
    assert got[:9].tolist() == [0.0] * 9
    assert got[9] < 0 < got[10]
    assert got[11:].tolist() == [0.0, 0.0]
    assert group_advantage(reward[:8], boundaries((8,)), **options).tolist() == [0.0] * 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_reward_spoils_what_it_spoils_in_the_reference(bad, impl):
    reward = torch.tensor([1.0, 2.0, bad, 3.0, 5.0, bad, 4.0, 4.0, bad, bad, bad, 7.0], device=DEVICE)
    valid = torch.tensor([True] * 5 + [False] + [True] * 5 + [False], device=DEVICE)
    for options in OPTIONS:
        got, expected = (
            group_advantage(reward, boundaries((2, 2, 2, 2, 1, 3)), valid_N=valid, **options, impl=name)
            for name in (impl, "reference")
        )
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert got[[2, 3, 8, 9, 10]].isnan().all() and got[[4, 5, 6, 7, 11]].eq(0).all()
        assert got[:2].isnan().all() == (options["scale"] == "batch")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_spread_to_tokens(scale, index, impl):
    lengths = (3, 0, 1, 4, 2)
    reward, valid = draw(sum(lengths))
    tokens = [5, 0, 1200, 1, 0, 0, 64, 1024, 3, 0]
    cu_completion = boundaries(tokens, index)
    options = {"valid_N": valid, "scale": scale}
    one_each = group_advantage(reward, boundaries(lengths), **options, impl="reference")
    expected = torch.tensor(
        [a for a, n in zip(one_each.tolist(), tokens, strict=True) for _ in range(n)], device=DEVICE
    )
    for name in ("reference", impl):
        got = group_advantage(
            reward,
            boundaries(lengths),
            **options,
            cu_completion=cu_completion,
            num_rows=sum(tokens),
            impl=name,
        )
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_every_value_is_written(monkeypatch, impl):
    poison_fresh_memory(monkeypatch)
    reward, valid = draw(sum(LENGTHS))
    tokens = [i % 5 for i in range(len(reward))]
    spread = {"cu_completion": boundaries(tokens), "num_rows": sum(tokens)}
    for mask in (valid, torch.zeros_like(valid)):
        for more, length in (({}, len(reward)), (spread, sum(tokens))):
            got = group_advantage(reward, boundaries(LENGTHS), valid_N=mask, **more, impl=impl)
            assert got.shape == (length,) and got.isfinite().all()


def test_columns_of_a_matrix_and_nothing_at_all(impl):
    reward, valid = draw(3 * sum(LENGTHS))
    reward, valid = reward.view(-1, 3)[:, 1], valid.view(-1, 3)[:, 2]
    cu_group = boundaries(LENGTHS).repeat_interleave(2)[::2]
    assert not reward.is_contiguous() and not cu_group.is_contiguous()
    got = group_advantage(reward, cu_group, valid_N=valid, impl=impl)
    expected = group_advantage(reward.clone(), boundaries(LENGTHS), valid_N=valid.clone(), impl="reference")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for name in ("reference", impl):
        for lengths in ((), (0, 0)):
            empty = torch.zeros(0, device=DEVICE)
            assert group_advantage(empty, boundaries(lengths), impl=name).shape == (0,)
            spread = {"cu_completion": boundaries(()), "num_rows": 0}
            assert group_advantage(empty, boundaries(lengths), **spread, impl=name).shape == (0,)
        spread = {"cu_completion": boundaries((0, 0)), "num_rows": 0}
        assert group_advantage(reward[:2], boundaries((2,)), **spread, impl=name).shape == (0,)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("groups", [[-7, 4, 8], [0, 4, 99], [0, 8, 3], [5, -4, 2]])
def test_wrong_boundaries_reach_nothing_outside(groups, scale, index, impl, monkeypatch):
    """On a GPU nobody reads them before the kernel does."""
    new_empty, held = torch.Tensor.new_empty, []

    def fenced(self, *size, **options):
        held.append(new_empty(self, size[0] + 200, **options).fill_(77.0))
        return held[-1][100:-100]

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    reward = torch.full((208,), torch.nan, device=DEVICE)
    reward[100:108] = draw(8)[0]
    options = ("mean", scale, 1e-4, 1, impl)
    cu_group, spread = torch.tensor(groups, dtype=index, device=DEVICE), boundaries([2] * 8, index)
    spread[3], spread[6] = -50, 90
    for cu_completion, rows in ((None, 8), (spread, 16)):
        op = torch.ops.geo_r1.group_advantage
        got = op(reward[100:108], cu_group, None, cu_completion, rows, *options)
        assert got.isfinite().all()
        assert held[-1][:100].eq(77).all() and held[-1][-100:].eq(77).all()


def test_the_op_is_registered_right(impl):
    reward, valid = draw(sum(LENGTHS))
    cu_group, cu_completion = boundaries(LENGTHS), boundaries([2] * len(reward))
    op = torch.ops.geo_r1.group_advantage.default
    for mask, spread, rows in ((None, None, len(reward)), (valid, cu_completion, 2 * len(reward))):
        torch.library.opcheck(op, (reward, cu_group, mask, spread, rows, "mean", "group", 1e-4, 1, impl))


def test_compiles_as_one_graph(impl):
    reward, valid = draw(sum(LENGTHS))
    cu_group, cu_completion = boundaries(LENGTHS), boundaries([2] * len(reward))

    def advantage(reward, impl):
        options = {"cu_completion": cu_completion, "num_rows": 2 * len(reward), "impl": impl}
        return 2 * group_advantage(reward, cu_group, valid_N=valid, **options)

    compiled = torch.compile(advantage, fullgraph=True, backend="aot_eager")
    for name in (impl, "reference", None):
        torch.testing.assert_close(compiled(reward, name), advantage(reward, name), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_is_captured_in_a_cuda_graph(impl):
    reward, valid = draw(sum(LENGTHS))
    cu_group, cu_completion = boundaries(LENGTHS), boundaries([2] * len(reward))

    def advantage():
        options = {"cu_completion": cu_completion, "num_rows": 2 * len(reward), "impl": impl}
        return group_advantage(reward, cu_group, valid_N=valid, **options)

    advantage()  # compiles Triton's kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = advantage()
    reward.copy_(draw(len(reward), seed=1)[0])
    graph.replay()
    torch.testing.assert_close(out, advantage(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        ({"num_rows": 4}, "cu_completion: expected beside num_rows, got None"),
        ({"cu_completion": [0, 2, 4]}, "num_rows: expected beside cu_completion, got None"),
        (
            {"cu_completion": [0, 4], "num_rows": 4},
            r"cu_completion: expected \[3\] int32 or int64, got \[2\]",
        ),
        ({"cu_completion": [0.0, 2.0, 4.0], "num_rows": 4}, r"got \[3\] torch.float32"),
        ({"cu_completion": [0, 2, 4], "num_rows": -4}, "num_rows: expected at least 0, got -4"),
    ],
)
def test_mistakes_are_named(spread, message):
    if "cu_completion" in spread:
        spread = spread | {"cu_completion": torch.tensor(spread["cu_completion"], device=DEVICE)}
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.zeros(2, device=DEVICE), boundaries((2,)), **spread)


@pytest.mark.parametrize(
    ("cu_completion", "message"),
    [
        ([1, 2, 4], "cu_completion: expected to start at 0 and end at num_rows = 4, got 1 and 4"),
        ([0, 2, 3], "num_rows = 4, got 0 and 3"),
        ([0, 5, 4], "completion 1 ends at 4, before its start at 5"),
    ],
)
def test_boundaries_on_the_cpu_are_read(cu_completion, message):
    spread = {"cu_completion": torch.tensor(cu_completion), "num_rows": 4}
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.zeros(2), torch.tensor([0, 2]), **spread)


def test_other_dtypes_are_refused_by_name(impl):
    reward = torch.zeros(2, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"impl='{impl}' does not take torch.float8_e4m3fn rewards"):
        group_advantage(reward, boundaries((2,)), impl=impl)
