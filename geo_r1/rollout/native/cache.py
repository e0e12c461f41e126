"""Keys and values while sampling: each prompt once, in a lane; each completion's own tokens in a row.

Lanes and rows are allocated once. Those in use stand first, so that a step's products take views of them:
when one ends, the last one moves into its place. In a step one new token a row attends to the lane of its
prompt, which its siblings share, and to the row's own past. Each part is a softmax; their largest scores and
sums merge them:

    out = (exp(m_lane - m) o_lane + exp(m_own - m) o_own) / (exp(m_lane - m) s_lane + exp(m_own - m) s_own)
    o = sum_j exp(scale q k_j - m_part) v_j,   s = sum_j exp(scale q k_j - m_part),   m = max(m_lane, m_own)

The rows of a lane sit on its seats, so the product with a lane reads its keys once for all of them.

Source: shared-prefix attention as in Hydragen, arXiv:2402.05099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geo_r1.models.packed import to_device


@dataclass(frozen=True)
class CacheSize:
    """The size of a cache.

    Attributes:
        rows: completions.
        row_len: tokens of each.
        lanes: prompts.
        lane_len: tokens of the longest.
        seats: completions of one prompt at a time, at most.
        layers: text layers.
        heads: key and value heads of each.
    """

    rows: int
    row_len: int
    lanes: int
    lane_len: int
    seats: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Extent:
    """The part of a cache that a step reads.

    Attributes:
        rows, lanes: the first ones.
        seats: of each lane.
        width: tokens of each lane; `ragged` if some of these lanes are shorter.
        own: tokens of each row, the new one included; `uneven` if some of these rows are shorter.
    """

    rows: int
    lanes: int
    seats: int
    width: int
    ragged: bool
    own: int
    uneven: bool


class GroupCache:
    """The cache of one run of the sampler.

    Args:
        fixed: a step reads all rows and lanes, or half of them, a quarter and so on, at full length behind
            masks: few shapes, but empty places are read. Otherwise it reads exactly the part in use.
    """

    def __init__(self, size: CacheSize, device: torch.device, fixed: bool = False) -> None:
        self.size, self.device, self.fixed = size, device, fixed
        self.lanes: Tensor | None = None  # [layers, k and v, lanes, K, lane_len, D]
        self.own: Tensor  # [layers, k and v, rows, K, row_len, D]
        # A lane that was never filled has one token of zeros: fixed shapes read it, too.
        self.lane_len = torch.ones(size.lanes, dtype=torch.int64, device=device)
        self.lens: list[int] = []  # of the lanes in use
        self.seat_of_row = torch.zeros(size.rows, dtype=torch.int64, device=device)
        self.row_of_seat = torch.zeros(size.lanes * size.seats, dtype=torch.int64, device=device)
        self.row = torch.arange(size.rows, device=device)
        self._num_seats = 0

    def open(self, lengths: Sequence[int]) -> None:
        """Take the next lanes for prompts of these lengths; `fill` follows, layer by layer."""
        first, length = len(self.lens), torch.tensor(lengths)
        lane = torch.arange(first, first + len(lengths)).repeat_interleave(length)
        token = torch.cat([torch.arange(n) for n in lengths])
        head = torch.arange(self.size.heads)
        places = (lane[:, None] * self.size.heads + head) * self.size.lane_len + token[:, None]
        self._places = to_device(places.flatten(), self.device)
        self.lane_len[first : first + len(lengths)] = to_device(length, self.device)
        self.lens += lengths

    def fill(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store a layer's keys and values of the prompts that were opened last."""
        size, dim = self.size, k_TKD.shape[2]
        if self.lanes is None:  # zeros: values behind a mask must be finite
            self.lanes = k_TKD.new_zeros(size.layers, 2, size.lanes, size.heads, size.lane_len, dim)
            self.own = k_TKD.new_zeros(size.layers, 2, size.rows, size.heads, size.row_len, dim)
        for stored, new in zip(self.lanes[layer], (k_TKD, v_TKD), strict=True):
            stored.view(-1, dim).index_copy_(0, self._places, new.reshape(-1, dim))

    def move_rows(self, source: Tensor, target: Tensor, own: int) -> None:
        """Move rows, of at most `own` tokens, to other places."""
        self.own[:, :, target, :, :own] = self.own[:, :, source, :, :own]

    def close(self, moves: Sequence[tuple[int, int]], num_kept: int) -> None:
        """Move lanes to other places, (from, to) of each, then keep the first ones."""
        assert self.lanes is not None
        for old, new in moves:
            self.lanes[:, :, new] = self.lanes[:, :, old]
            self.lane_len[new] = self.lane_len[old]
            self.lens[new] = self.lens[old]
        del self.lens[num_kept:]

    def seat(self, lane_of_row: Sequence[int]) -> None:
        """Set the lane of each row in use; call it when one changed."""
        taken = [0] * len(self.lens)
        seats = []
        for lane in lane_of_row:
            seats.append(taken[lane])
            taken[lane] += 1
        self._num_seats = self.size.seats if self.fixed else max(taken)
        places = [lane * self._num_seats + seat for lane, seat in zip(lane_of_row, seats, strict=True)]
        occupants = [0] * len(self.row_of_seat)  # row 0 sits on free seats: their results are not read
        for row, place in enumerate(places):
            occupants[place] = row
        places += [0] * (self.size.rows - len(places))
        self.seat_of_row.copy_(to_device(torch.tensor(places), self.device))
        self.row_of_seat.copy_(to_device(torch.tensor(occupants), self.device))

    def rows_read(self, num_rows: int) -> int:
        """The number of rows that a step reads for these."""
        return _halved(num_rows, self.size.rows) if self.fixed else num_rows

    def extent(self, said: Sequence[int]) -> Extent:
        """The part that the next step reads, if rows have these numbers of tokens, the new one included."""
        if self.fixed:
            rows, lanes = self.rows_read(len(said)), _halved(len(self.lens), self.size.lanes)
            return Extent(rows, lanes, self._num_seats, self.size.lane_len, True, self.size.row_len, True)
        uneven, ragged = min(said) < max(said), min(self.lens) < max(self.lens)
        return Extent(len(said), len(self.lens), self._num_seats, max(self.lens), ragged, max(said), uneven)

    def begin(self, extent: Extent, step: Tensor) -> None:
        """Prepare a step; its new tokens have these places in their rows, [rows] int64."""
        self._extent, self._step = extent, step
        self._lane_hidden = self._own_hidden = None
        if extent.ragged:
            token = torch.arange(extent.width, device=self.device)
            self._lane_hidden = (token >= self.lane_len[: extent.lanes, None])[:, None, None]
        if extent.uneven:
            token = torch.arange(extent.own, device=self.device)
            self._own_hidden = (token > step[:, None])[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend from one new token a row: q [n, H, D], k and v [n, K, D]; returns [n, H, D]."""
        assert self.lanes is not None
        now = self._extent
        own_k, own_v = self.own[layer, :, : now.rows]
        row = self.row[: now.rows]
        own_k[row, :, self._step], own_v[row, :, self._step] = k, v
        lane_k, lane_v = self.lanes[layer, :, : now.lanes, :, : now.width]
        q = q.unflatten(1, (k.shape[1], -1))  # [n, K, H/K, D]
        on_lane = _part(self._to_seats(q), lane_k, lane_v, scale, self._lane_hidden)
        out, total, most = (self._to_rows(x) for x in on_lane)
        own_out, own_total, own_most = _part(
            q, own_k[:, :, : now.own], own_v[:, :, : now.own], scale, self._own_hidden
        )
        largest = torch.maximum(most, own_most)
        share, own_share = (most - largest).exp_(), (own_most - largest).exp_()
        out = (out * share + own_out * own_share) / (total * share + own_total * own_share)
        return out.to(v.dtype).flatten(1, 2)

    def _to_seats(self, x: Tensor) -> Tensor:
        """[n, K, h, d] rows to [lanes, K, seats * h, d]."""
        now = self._extent
        seats = x.index_select(0, self.row_of_seat[: now.lanes * now.seats])
        return seats.unflatten(0, (now.lanes, now.seats)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: Tensor) -> Tensor:
        """[lanes, K, seats * h, d] back to [n, K, h, d]."""
        seats = x.unflatten(2, (self._extent.seats, -1)).transpose(1, 2).flatten(0, 1)
        return seats.index_select(0, self.seat_of_row[: self._extent.rows])


def _part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A part's o, s and m, [.., queries, D or 1], float32 at least; `hidden` masks keys."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weight = scores.sub_(most).mul_(scale).exp_()
    return (weight.to(v.dtype) @ v).to(weight.dtype), weight.sum(-1, keepdim=True), most * scale


def _halved(count: int, limit: int) -> int:
    """The smallest of limit, limit / 2, limit / 4 and so on, rounded up, that is at least `count`."""
    while limit > 1 and (half := -(-limit // 2)) >= count:
        limit = half
    return limit


def compact(items: list[Any], gone: Sequence[int]) -> list[tuple[int, int]]:
    """Remove the items at these places and move the last ones there; returns (from, to) of each move."""
    left_out, num_kept = set(gone), len(items) - len(gone)
    source = [i for i in range(num_kept, len(items)) if i not in left_out]
    moves = list(zip(source, sorted(i for i in left_out if i < num_kept), strict=True))
    for old, new in moves:
        items[new] = items[old]
    del items[num_kept:]
    return moves
