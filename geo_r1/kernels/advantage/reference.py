"""Group-relative advantages in plain torch, any float dtype."""

import torch
from torch import Tensor


def reference_advantage(
    reward_N: Tensor,
    cu_group: Tensor,
    valid_N: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    correction: int,
) -> Tensor:
    dtype = torch.promote_types(reward_N.dtype, torch.float32)
    num_groups, num_members = cu_group.numel() - 1, reward_N.numel()
    if num_members == 0:
        return reward_N.new_zeros(0, dtype=dtype)
    valid = torch.ones_like(reward_N, dtype=torch.bool) if valid_N is None else valid_N
    reward = reward_N.to(dtype).masked_fill(~valid, 0.0)
    # The number of groups that end at or before i, which skips empty groups.
    member = torch.arange(num_members, device=reward.device, dtype=cu_group.dtype)
    group = torch.searchsorted(cu_group[1:].contiguous(), member, right=True)

    def total(value_N: Tensor) -> Tensor:
        return value_N.new_zeros(num_groups).index_add_(0, group, value_N)

    def extreme(fill: float, reduce: str) -> Tensor:
        value = torch.where(valid, reward, fill)
        return value.new_full((num_groups,), fill).scatter_reduce_(0, group, value, reduce)

    count_G = total(valid.to(dtype))
    low_G = extreme(float("inf"), "amin")
    # inf - inf is NaN, so a non-finite reward never looks like a group of equal rewards.
    spread_G = extreme(float("-inf"), "amax") - low_G

    # First pass: the mean above the group's smallest reward, so that a common offset costs no accuracy.
    # spread * 0 is NaN exactly where a reward is not finite.
    above = torch.where(valid, reward - low_G[group], 0.0)
    mean_G = total(above) / count_G.clamp(min=1) + spread_G * 0
    centred = torch.where(valid, above - mean_G[group], 0.0)
    advantage = centred
    if baseline == "leave_one_out":  # r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
        advantage = centred * (count_G / (count_G - 1).clamp(min=1))[group]
    # Second pass: the squares of the deviations.
    if scale == "group":
        variance_G = total(centred.square()) / (count_G - correction).clamp(min=1)
        advantage = advantage / (variance_G.sqrt() + eps)[group]
    elif scale == "batch":
        count = count_G.sum()
        above_all = reward - torch.where(valid, reward, float("inf")).amin()
        mean_all = torch.where(valid, above_all, 0.0).sum() / count.clamp(min=1)
        square = torch.where(valid, above_all - mean_all, 0.0).square().sum()
        advantage = advantage / ((square / (count - correction).clamp(min=1)).sqrt() + eps)
    # Rounding in the mean may leave equal rewards slightly off zero; they must be exactly zero.
    return advantage.masked_fill(~valid | (spread_G == 0)[group], 0.0)
