"""Advantages of a step's groups. Tiny work: what counts is the time to get it done at all.

Bytes: rewards read once and advantages written once. Groups are of equal size, since that is what plain
torch, as in TRL, takes; the floor is a copy of the rewards.
"""

from dataclasses import dataclass

import pytest
import torch

from benchmarks.measure import Case, Provider
from benchmarks.peers import our_names, ours, why_not_compiled
from geo_r1.kernels import group_advantage

EPS = 1e-4


@dataclass(frozen=True)
class GroupSize:
    groups: int
    members: int

    def __str__(self) -> str:
        return f"G={self.groups} M={self.members}"


SIZES = [GroupSize(8, 8), GroupSize(1024, 16), GroupSize(65536, 8)]
PEERS = ["copy of the rewards", "eager torch", "compiled torch"]


@pytest.mark.parametrize("provider", [*our_names("group_advantage"), *PEERS])
@pytest.mark.parametrize("size", SIZES if torch.cuda.is_available() else SIZES[:2], ids=str)
def test_group_advantage(report, device, size, provider):
    def make():
        g = torch.Generator(device).manual_seed(0)
        reward_GM = torch.rand(size.groups, size.members, generator=g, device=device)
        reward_N = reward_GM.flatten()
        cu_group = torch.arange(
            0, size.groups * size.members + 1, size.members, dtype=torch.int32, device=device
        )

        def build(impl):
            return lambda: (group_advantage(reward_N, cu_group, eps=EPS, impl=impl),)

        def plain(reward_N):
            reward_GM = reward_N.view(size.groups, size.members)
            centred_GM = reward_GM - reward_GM.mean(1, keepdim=True)
            return (centred_GM / (reward_GM.std(1, keepdim=True) + EPS)).flatten()

        def compiled():
            function = torch.compile(plain, dynamic=False)
            return lambda: (function(reward_N),)

        return (
            Case("group_advantage", str(size), torch.float32, 1e-4, bytes=8.0 * reward_N.numel()),
            [
                *ours("group_advantage", build),
                Provider("copy of the rewards", lambda: lambda: (reward_N.clone(),), kind="floor"),
                Provider("eager torch", lambda: lambda: (plain(reward_N),)),
                Provider("compiled torch", compiled, missing=why_not_compiled()),
            ],
            lambda: (plain(reward_N.double()),),
        )

    report(make)
