import math

import pytest
import torch

from geo_r1.kernels import group_advantage

LENGTHS = (3, 0, 1, 8, 2, 0)


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_loop(reward, lengths, valid, baseline, scale, eps, correction):
    """Group by group, with Python floats."""

    def std(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - correction, 1))

    reward, valid = reward.tolist(), valid.tolist()
    everything = [r for r, v in zip(reward, valid, strict=True) if v]
    out, start = [], 0
    for length in lengths:
        members = [i for i in range(start, start + length) if valid[i]]
        values = [reward[i] for i in members]
        for i in range(start, start + length):
            if i not in members or len(values) < 2 or max(values) == min(values):
                out.append(0.0)
                continue
            others = values if baseline == "mean" else [reward[j] for j in members if j != i]
            divisor = {"group": std(values) + eps, "batch": std(everything) + eps, "none": 1.0}[scale]
            out.append((reward[i] - sum(others) / len(others)) / divisor)
        start += length
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_equals_a_loop_over_groups(offset, baseline, scale, correction):
    g = torch.Generator().manual_seed(1)
    # Steps of 1/16 are exact in float32, also at 1e6.
    reward = torch.randint(0, 32, (sum(LENGTHS),), generator=g) / 16 + offset
    valid = torch.rand(len(reward), generator=g) > 0.3
    for mask in (torch.ones_like(valid), valid, torch.zeros_like(valid)):
        expected = by_loop(reward.double(), LENGTHS, mask, baseline, scale, 1e-3, correction)
        options = {
            "valid_N": mask,
            "baseline": baseline,
            "scale": scale,
            "eps": 1e-3,
            "correction": correction,
        }
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
            got = group_advantage(reward.to(dtype), boundaries(LENGTHS), **options)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_reward_spoils_its_own_group_only(bad):
    reward = torch.tensor([1.0, 2.0, bad, 3.0, 5.0, bad, 4.0, 4.0])
    valid = torch.tensor([True] * 5 + [False] + [True] * 2)
    for options in ({}, {"baseline": "leave_one_out"}, {"scale": "none"}):
        got = group_advantage(reward, boundaries((2, 2, 2, 2)), valid_N=valid, **options)
        clean = group_advantage(reward[:2], boundaries((2,)), **options)
        assert torch.equal(got[:2], clean)
        assert got[2:4].isnan().all()
        assert got[4:].tolist() == [0.0] * 4
    assert group_advantage(torch.tensor([bad] * 3), boundaries((3,))).isnan().all()


def test_low_precision_empty_batches_and_gradients():
    reward = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    got = group_advantage(reward, boundaries((2,)), eps=0.0)
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    assert group_advantage(torch.zeros(0), torch.tensor([0])).shape == (0,)
    assert group_advantage(torch.zeros(0), torch.tensor([0, 0, 0])).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_group": torch.tensor([1, 4])}, "start at 0 and end at N = 4, got 1 and 4"),
        ({"cu_group": torch.tensor([0, 3])}, "got 0 and 3"),
        ({"cu_group": torch.tensor([0, 3, 2, 4])}, "group 1 ends at 2, before its start at 3"),
        ({"cu_group": torch.tensor([0.0, 4.0])}, "int32 or int64, got .* torch.float32"),
        ({"reward_N": torch.zeros(4, dtype=torch.int64)}, r"expected \[N\] floating, got \[4\] torch.int64"),
        ({"valid_N": torch.ones(4)}, r"expected \[4\] bool"),
        ({"baseline": "median"}, "got 'median'"),
        ({"scale": "std"}, "got 'std'"),
        ({"eps": -1.0}, "got -1.0"),
        ({"correction": 2}, "expected 0 or 1, got 2"),
        ({"impl": "flash"}, r"impl='flash' cannot run here \(group_advantage has none\); available: refer"),
        ({"impl": "fast"}, "impl='fast' is not known"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"reward_N": torch.zeros(4), "cu_group": torch.tensor([0, 4])} | change
    with pytest.raises(ValueError, match=message):
        group_advantage(arguments.pop("reward_N"), arguments.pop("cu_group"), **arguments)
