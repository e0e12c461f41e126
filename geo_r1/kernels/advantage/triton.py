"""Group-relative advantages in one launch, one program per group.

    advantage[i] = (reward[i] - baseline_i) / scale_i

Source: GRPO, arXiv:2402.03300; `public.py` states the formula. A program reads its group's rewards four times
(smallest and largest, mean, squares, result), the last three times from cache, and writes one value per
member or token. With scale="batch" each program also reads all N rewards three times, O(G * N) in all. For
the thousands of rewards of a training step that is still one short launch.

Everything is computed in float64: there are few rewards, so it costs nothing, and no option needs its own
rounding.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from geo_r1.kernels.launch import Launch

# Rows by what a program loops over. One warp, so sums need no barrier; with more, ptxas spills a few bytes
# around the float64 divisions to fit more programs on an SM (seen on both chips with 2, 4 and 8 warps). Not
# measured.
_GROUP = Launch("a group, of 8 to 64 members in practice", num_warps=1, BLOCK=64)
_WIDE = Launch("the batch, or hundreds of tokens per member", num_warps=1, BLOCK=256)
LAUNCHES: tuple[Launch, ...] = (_GROUP, _WIDE)


@triton.jit
def _members(reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, o_member, stop):
    """Rewards of some members, 0 for invalid ones, and the mask of valid ones."""
    m_valid = o_member < stop
    b_reward = tl.load(reward_ptr + o_member * stride_reward_n, mask=m_valid, other=0.0).to(tl.float64)
    if valid_ptr is not None:
        m_valid = m_valid & tl.load(valid_ptr + o_member * stride_valid_n, mask=m_valid, other=0).to(tl.int1)
    return tl.where(m_valid, b_reward, 0.0), m_valid


@triton.jit
def _statistics(reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, start, stop, BLOCK: tl.constexpr):
    """Number of valid members, smallest and largest reward, mean above the smallest, squares about it."""
    o_block = tl.arange(0, BLOCK)
    # [BLOCK], partial results over each lane's members
    b_count = tl.zeros([BLOCK], tl.float64)
    b_bad = tl.zeros([BLOCK], tl.int32)
    b_low = tl.full([BLOCK], float("inf"), tl.float64)
    b_high = tl.full([BLOCK], float("-inf"), tl.float64)
    for i_member in range(start, stop, BLOCK):
        b_reward, m_valid = _members(
            reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, i_member + o_block, stop
        )
        b_count += tl.where(m_valid, 1.0, 0.0)
        b_bad += tl.where(tl.abs(b_reward) < float("inf"), 0, 1)  # a NaN compares as False
        b_low = tl.minimum(b_low, tl.where(m_valid, b_reward, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_valid, b_reward, float("-inf")))
    count, high = tl.sum(b_count, 0), tl.max(b_high, 0)
    low = tl.where(count > 0, tl.min(b_low, 0), 0.0)
    # A NaN here spoils everything that follows, and is not equal to the largest reward.
    low = tl.where(tl.sum(b_bad, 0) > 0, float("nan"), low)

    # Measured from the smallest reward, so that a common offset costs no accuracy.
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i_member in range(start, stop, BLOCK):
        b_reward, m_valid = _members(
            reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, i_member + o_block, stop
        )
        b_sum += tl.where(m_valid, b_reward - low, 0.0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1.0)

    b_square = tl.zeros([BLOCK], tl.float64)
    for i_member in range(start, stop, BLOCK):
        b_reward, m_valid = _members(
            reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, i_member + o_block, stop
        )
        b_centred = tl.where(m_valid, b_reward - low - mean, 0.0)
        b_square += b_centred * b_centred
    return count, low, high, mean, tl.sum(b_square, 0)


@triton.jit
def _group_advantage_kernel(
    out_ptr,
    reward_ptr,
    valid_ptr,
    cu_group_ptr,
    cu_completion_ptr,
    num_members,
    num_rows,
    stride_reward_n,
    stride_valid_n,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,  # a run-time float would arrive as float32
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_group = tl.program_id(0)
    # The host has not read boundaries on a GPU: wrong ones must not lead outside the tensors.
    start = tl.maximum(tl.load(cu_group_ptr + i_group).to(tl.int64), 0)
    stop = tl.minimum(tl.load(cu_group_ptr + i_group + 1).to(tl.int64), num_members)
    count, low, high, mean, squares = _statistics(
        reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, start, stop, BLOCK
    )
    factor = tl.full((), 1.0, tl.float64)
    if LEAVE_ONE_OUT:  # r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
        factor = count / tl.maximum(count - 1, 1.0)
    divisor = tl.full((), 1.0, tl.float64)
    if SCALE == "group":
        divisor = tl.sqrt(squares / tl.maximum(count - CORRECTION, 1.0)) + EPS
    elif SCALE == "batch":
        first = tl.maximum(tl.load(cu_group_ptr).to(tl.int64), 0)
        last = tl.minimum(tl.load(cu_group_ptr + tl.num_programs(0)).to(tl.int64), num_members)
        count_all, _, _, _, squares_all = _statistics(
            reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, first, last, BLOCK
        )
        divisor = tl.sqrt(squares_all / tl.maximum(count_all - CORRECTION, 1.0)) + EPS
    # If all members are equal they get exactly zero, even if the divisor is 0 or NaN.
    gain = factor / tl.where(low == high, 1.0, divisor)

    o_block = tl.arange(0, BLOCK)
    if cu_completion_ptr is None:
        for i_member in range(start, stop, BLOCK):
            # [BLOCK]
            o_member = i_member + o_block
            b_reward, m_valid = _members(
                reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, o_member, stop
            )
            b_advantage = tl.where(m_valid, (b_reward - low - mean) * gain, 0.0)
            tl.store(out_ptr + o_member, b_advantage.to(out_ptr.dtype.element_ty), mask=o_member < stop)
    else:
        for i_member in range(start, stop):
            reward, valid = _members(reward_ptr, valid_ptr, stride_reward_n, stride_valid_n, i_member, stop)
            advantage = tl.where(valid, (reward - low - mean) * gain, 0.0)
            first_row = tl.maximum(tl.load(cu_completion_ptr + i_member).to(tl.int64), 0)
            last_row = tl.minimum(tl.load(cu_completion_ptr + i_member + 1).to(tl.int64), num_rows)
            for i_row in range(first_row, last_row, BLOCK):
                # [BLOCK]
                o_row = i_row + o_block
                tl.store(out_ptr + o_row, advantage.to(out_ptr.dtype.element_ty), mask=o_row < last_row)


def group_advantage(out, reward_N, cu_group, valid_N, cu_completion, baseline, scale, eps, correction):
    """Fill `out` [R], not empty, from checked inputs."""
    row = _GROUP if scale != "batch" and cu_completion is None else _WIDE
    with torch.cuda.device_of(reward_N):  # Triton launches on the current device
        _group_advantage_kernel[(cu_group.numel() - 1,)](
            out_ptr=out,
            reward_ptr=reward_N,
            valid_ptr=valid_N,
            cu_group_ptr=cu_group,
            cu_completion_ptr=cu_completion,
            num_members=reward_N.numel(),
            num_rows=out.numel(),
            stride_reward_n=reward_N.stride(0),
            stride_valid_n=0 if valid_N is None else valid_N.stride(0),
            LEAVE_ONE_OUT=baseline == "leave_one_out",
            SCALE=scale,
            EPS=eps,
            CORRECTION=correction,
            **row.options,
        )


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every option that changes the code, over small inputs: `make aot` compiles them for each chip."""
    reward_N, valid_N = torch.zeros(16), torch.ones(16, dtype=torch.bool)
    cu_group, cu_completion = torch.tensor([0, 8, 16], dtype=torch.int32), torch.arange(17)
    for scale in ("group", "batch", "none"):
        members = (reward_N.bfloat16(), cu_group, valid_N, None, "leave_one_out", scale, 1e-4, 1)
        yield f"{scale}, members", partial(group_advantage, reward_N, *members)
        tokens = (reward_N, cu_group, None, cu_completion, "mean", scale, 1e-4, 1)
        yield f"{scale}, tokens", partial(group_advantage, reward_N, *tokens)
