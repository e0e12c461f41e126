"""Advantages of a step's groups: so little work that launches and Python take most of the time.

Bytes: rewards read once and advantages written once. Groups have equal sizes, because plain torch, as in TRL,
needs that; the floor is a copy of the rewards.
"""

import pytest
import torch

from benchmarks.measure import ON_GPU, Case, floor, our_names, ours, torch_ways
from geo_r1.kernels import group_advantage

EPS = 1e-4
SIZES = [(8, 8), (1024, 16), (65536, 8)]  # groups, members
PEERS = ["copy of the rewards", "eager torch", "compiled torch"]


def label(size):
    return f"G={size[0]} M={size[1]}"


def advantage_case(size, device):
    num_groups, members = size
    g = torch.Generator(device).manual_seed(0)
    reward_N = torch.rand(size, generator=g, device=device).flatten()
    cu_group = torch.arange(0, num_groups * members + 1, members, dtype=torch.int32, device=device)

    def plain(reward_N):
        reward_GM = reward_N.view(size)
        centred_GM = reward_GM - reward_GM.mean(1, keepdim=True)
        return (centred_GM / (reward_GM.std(1, keepdim=True) + EPS)).flatten()

    providers = {
        **ours(
            "group_advantage", lambda impl: lambda: (group_advantage(reward_N, cu_group, eps=EPS, impl=impl),)
        ),
        "copy of the rewards": floor(lambda: (reward_N.clone(),)),
        **torch_ways(plain, (reward_N,), lambda advantage_N: (advantage_N,)),
    }
    return Case(
        "group_advantage",
        label(size),
        torch.float32,
        1e-4,
        providers,
        truth=lambda: (plain(reward_N.double()),),
        bytes=8.0 * reward_N.numel(),
    )


@pytest.mark.parametrize("provider", [*our_names("group_advantage"), *PEERS])
@pytest.mark.parametrize("size", SIZES if ON_GPU else SIZES[:2], ids=label)
def test_group_advantage(measure, size, provider):
    measure(advantage_case, size)
