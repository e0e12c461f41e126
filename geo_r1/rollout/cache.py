"""Keys and values while sampling: each group's prompt once, each completion's own tokens apart.

A step attends from one new token a completion to its prompt, which its siblings share, and to its own past.
Groups of equal prompt length are one product; a completion that has ended leaves the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GroupCache:
    """The cache of one batch of groups.

    Args:
        prompt_len: tokens of each group's prompt; equal lengths must stand next to each other.
        group_of_row: for each completion, its group, ascending.
    """

    def __init__(self, prompt_len: Sequence[int], group_of_row: Sequence[int]) -> None:
        self.prompt_len = list(prompt_len)
        self.group_of_row = list(group_of_row)
        self.step = 0
        self.prompts: list[list[tuple[Tensor, Tensor]]] = []  # [layer][group] -> k and v, [K, P, D]
        self.own: list[tuple[Tensor, Tensor]] = []  # [layer] -> k and v, [n, K, capacity, D]
        self.buckets: list[_Bucket] = []

    def fill(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store the prompts' keys and values of a layer; layers come in order."""
        assert layer == len(self.prompts)
        pairs = zip(k_TKD.split(self.prompt_len), v_TKD.split(self.prompt_len), strict=True)
        self.prompts.append([(k.transpose(0, 1), v.transpose(0, 1)) for k, v in pairs])
        empty = k_TKD.new_empty(len(self.group_of_row), k_TKD.shape[1], 0, k_TKD.shape[2])
        self.own.append((empty, empty))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all completions but these."""
        index = torch.tensor(rows, device=self.own[0][0].device)
        self.own = [(k[index], v[index]) for k, v in self.own]
        self.group_of_row = [self.group_of_row[row] for row in rows]
        self.buckets = []

    def advance(self) -> None:
        """The step's tokens are in the cache of every layer; the next ones come after them."""
        self.step += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One new token a completion: q [n, H, D], k and v [n, K, D]; returns [n, H, D]."""
        if not self.buckets:
            self._make_buckets()
        own_k, own_v = self._append(layer, k, v)
        q = (q * scale).unflatten(1, (k.shape[1], -1))  # [n, K, H/K, D]
        outs = []
        for bucket in self.buckets:
            prompt_k, prompt_v = bucket.prompts[layer]
            rows = slice(bucket.first_row, bucket.first_row + len(bucket.group))
            scores = torch.cat(
                [
                    bucket.to_rows(bucket.to_slots(q[rows]) @ prompt_k.mT),  # [n, K, H/K, P]
                    q[rows] @ own_k[rows].mT,  # [n, K, H/K, t]
                ],
                -1,
            )
            weight = scores.float().softmax(-1).to(q.dtype)
            on_prompt, on_own = weight.split([prompt_k.shape[2], own_k.shape[2]], -1)
            outs.append(bucket.to_rows(bucket.to_slots(on_prompt) @ prompt_v) + on_own @ own_v[rows])
        return torch.cat(outs).flatten(1, 2)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own_k, own_v = self.own[layer]
        if own_k.shape[2] == self.step:  # full: grow by half, at least 32 tokens
            room = own_k.new_empty(*own_k.shape[:2], max(32, self.step // 2), own_k.shape[3])
            own_k, own_v = torch.cat([own_k, room], 2), torch.cat([own_v, room], 2)
            self.own[layer] = own_k, own_v
        own_k[:, :, self.step], own_v[:, :, self.step] = k, v
        return own_k[:, :, : self.step + 1], own_v[:, :, : self.step + 1]

    def _make_buckets(self) -> None:
        """Group the completions by prompt length; groups whose completions have all ended drop out."""
        first = 0
        while first < len(self.group_of_row):
            length = self.prompt_len[self.group_of_row[first]]
            end = first
            while end < len(self.group_of_row) and self.prompt_len[self.group_of_row[end]] == length:
                end += 1
            members = self.group_of_row[first:end]
            groups = sorted(set(members))
            self.buckets.append(
                _Bucket(
                    first,
                    [groups.index(group) for group in members],
                    [
                        (
                            torch.stack([pairs[g][0] for g in groups]),
                            torch.stack([pairs[g][1] for g in groups]),
                        )
                        for pairs in self.prompts
                    ],
                )
            )
            first = end


class _Bucket:
    """Completions whose prompts have one length.

    Each group has as many slots as the largest group has completions: [G, K, slots * H/K, ...] products.
    """

    def __init__(self, first_row: int, group: list[int], prompts: list[tuple[Tensor, Tensor]]) -> None:
        self.first_row = first_row
        self.prompts = prompts
        device = prompts[0][0].device
        slot = [group[:row].count(g) for row, g in enumerate(group)]
        self.num_groups, self.num_slots = max(group) + 1, max(slot) + 1
        self.group = torch.tensor(group, device=device)
        self.place = self.group * self.num_slots + torch.tensor(slot, device=device)

    def to_slots(self, x: Tensor) -> Tensor:
        """[n, K, h, d] rows to [G, K, slots * h, d]."""
        slots = x.new_zeros(self.num_groups * self.num_slots, *x.shape[1:])
        slots[self.place] = x
        return slots.unflatten(0, (self.num_groups, self.num_slots)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """[G, K, slots * h, d] back to [n, K, h, d]."""
        return x.unflatten(2, (self.num_slots, -1)).transpose(1, 2).flatten(0, 1)[self.place]
