"""Divides a step among the ranks: groups of all ranks become micro-batches, the same number on every rank.

Every rank computes the same plan from the lengths of all groups. A plan minimises, in this order:

1. The number of micro-batches: in each one every rank gathers the weights.
2. Waiting: in each micro-batch all ranks wait for the slowest.
3. Groups that leave home, the rank that encoded their prompt: moving one sends its images.

Groups are spread over as many batches as the ranks will have, of about equal cost. A rank's own groups go
into its own batches as long as those do not grow heavy. Then either each rank keeps its batches, or all are
sorted by cost and dealt in rows, one for each rank, which waits least for given batches; swaps within a row
bring groups home. Of the plans that take about as long as the shortest, the one that moves the fewest tokens
wins. If the budget is so tight that spreading finds no place for a group, batches come from `plan_batches`
and are evened out by swaps.

Longest first, each to the lightest, is Graham's rule (Bounds on multiprocessing timing anomalies, 1969).
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from geo_r1.kernels.layout import plan_batches

# (group, indices of its completions); a group over the budget becomes several pieces.
Piece = tuple[int, tuple[int, ...]]
Batch = tuple[Piece, ...]

# Groups leave home only if staying makes the step longer by more than this.
HOME_TOLERANCE = 1.03
# How heavy groups of its own rank may make a batch, over the mean batch.
HOME_LIMITS = (1.0, 1.03, 1.1, 1.2, math.inf)
# With 24 batches of 8 ranks, waiting falls from 1.136 to 1.038 in 4 passes, to 1.020 in 8.
EVEN_PASSES = 8
# The lightest batches to look for a swap in; all would take seconds for hundreds of ranks.
EVEN_PARTNERS = 32


@dataclass(frozen=True)
class StepPlan:
    """Micro-batches of a step.

    Attributes:
        batches: [rank][micro-batch] of (group, indices of its completions) pairs; every rank has the same
            number, in descending order of cost; an empty one is idle.
        cost: [rank][micro-batch] operations.
        num_tokens: tokens over all ranks, repeated prompts included.
        repeated_tokens: prompt tokens computed again because a group was split.
        moved: (group, home, owner) of groups computed away from home; a split one may have several owners.
    """

    batches: tuple[tuple[Batch, ...], ...]
    cost: tuple[tuple[float, ...], ...]
    num_tokens: int
    repeated_tokens: int
    moved: tuple[tuple[int, int, int], ...]

    @property
    def num_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.batches[0])

    @property
    def waiting(self) -> float:
        """The slowest batches' cost, one of each micro-batch, over the mean rank's; 1 is even."""
        total = sum(map(sum, self.cost))
        return sum(map(max, zip(*self.cost, strict=True))) * len(self.cost) / total if total else 1.0


def plan_step(
    prompt_len: Sequence[int],
    completion_len: Sequence[Sequence[int]],
    cost_of: Callable[[int, Sequence[int], int], float],
    home: Sequence[int],
    num_ranks: int,
    max_tokens: int,
) -> StepPlan:
    """Put the groups of a step into micro-batches and assign these to ranks.

    Args:
        prompt_len: tokens of each group's prompt, G of them over all ranks.
        completion_len: G sequences with the tokens of each completion.
        cost_of: operations of (prompt length, completion lengths, group): a pure function, >= 0.
        home: [G] the rank that holds each group's prompt.
        num_ranks: ranks, at least 1.
        max_tokens: the most tokens a micro-batch may hold.

    Returns:
        The same plan for the same arguments. On one rank its batches are those of `plan_batches`, in
        descending order of cost.

    Raises:
        ValueError: as `plan_batches`, naming the group by its number here; or a home is not a rank.
    """
    for group, rank in enumerate(home):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"group {group}: its home is rank {rank}, but there are {num_ranks} ranks")
    assert len(prompt_len) == len(home) and min(num_ranks, max_tokens) > 0
    whole = plan_batches(prompt_len, completion_len, max_tokens)  # also checks every length
    pieces = sorted((piece for batch in whole.batches for piece in batch), key=lambda piece: piece[0])
    groups = [group for group, _ in pieces]
    prompts = [prompt_len[group] for group in groups]
    own = [[completion_len[group][i] for i in members] for group, members in pieces]
    size = [prompt + sum(lengths) for prompt, lengths in zip(prompts, own, strict=True)]
    cost = [cost_of(*piece) for piece in zip(prompts, own, groups, strict=True)]
    work = _Work(prompts, own, size, cost, [home[group] for group in groups], num_ranks, max_tokens)
    ranks = work.best()
    at_rank = [(rank, i) for rank, batches in enumerate(ranks) for batch in batches for i in batch]
    moved = {(groups[i], work.home[i], rank) for rank, i in at_rank if work.home[i] != rank}
    return StepPlan(
        batches=tuple(tuple(tuple(pieces[i] for i in batch) for batch in batches) for batches in ranks),
        cost=tuple(tuple(map(work.cost_of, batches)) for batches in ranks),
        num_tokens=whole.num_tokens,
        repeated_tokens=whole.repeated_tokens,
        moved=tuple(sorted(moved)),
    )


@dataclass(frozen=True)
class _Work:
    """All pieces of a step. The lists are by piece; batches are lists of pieces' indices."""

    prompt_len: list[int]
    completion_len: list[list[int]]
    size: list[int]
    cost: list[float]
    home: list[int]
    num_ranks: int
    max_tokens: int

    def best(self) -> list[list[list[int]]]:
        """[rank][micro-batch]: the fewest rows, then about the shortest, then the fewest tokens moved."""
        found = [(len(rows), self.time(rows), rows) for rows in self.plans()]
        fewest, shortest, _ = min(found)
        _, _, rows = min(
            (self.moved_tokens(rows), time, rows)
            for count, time, rows in found
            if count == fewest and time <= HOME_TOLERANCE * shortest
        )
        return [[row[rank] for row in rows] for rank in range(self.num_ranks)]

    def plans(self) -> list[list[list[list[int]]]]:
        """Ways to do the step, each [row][rank] batches."""
        packed = plan_batches(self.prompt_len, self.completion_len, self.max_tokens)
        fitted = [[i for i, _ in batch] for batch in packed.batches]
        if self.num_ranks == 1:
            return [self.deal(fitted)]
        fewest = -(-sum(self.size) // (self.num_ranks * self.max_tokens))
        enough = -(-len(fitted) // self.num_ranks)
        for num_rows in range(fewest, enough + 1):
            found = [self.spread_over(num_rows, limit) for limit in HOME_LIMITS]
            if spread := [batches for batches in found if batches is not None]:
                return [rows for batches in spread for rows in (self.keep(batches), self.deal(batches))]
        return [self.deal(self.even_out(fitted))]

    def spread_over(self, num_rows: int, limit: float) -> list[list[int]] | None:
        """All pieces in `num_rows` batches a rank, about equal in cost; None if one finds no place.

        The most costly piece comes first. It goes to the lightest of its home's own batches with room, if
        that stays below `limit` times the mean batch; else to the lightest of all. Two pieces of one group
        never share a batch: together they are over the budget.
        """
        num_batches = num_rows * self.num_ranks
        most = limit * sum(self.cost) / max(num_batches, 1)
        batches: list[list[int]] = [[] for _ in range(num_batches)]
        free = [self.max_tokens] * num_batches
        load = [0.0] * num_batches
        ascending = [(0.0, k) for k in range(num_batches)]
        for i in sorted(range(len(self.cost)), key=lambda i: -self.cost[i]):
            own = range(self.home[i], num_batches, self.num_ranks)
            place = min((k for k in own if free[k] >= self.size[i]), key=lambda k: (load[k], k), default=None)
            if place is None or load[place] + self.cost[i] > most:
                place = next((k for _, k in ascending if free[k] >= self.size[i]), None)
                if place is None:
                    return None
            batches[place].append(i)
            free[place] -= self.size[i]
            del ascending[bisect.bisect_left(ascending, (load[place], place))]
            load[place] += self.cost[i]
            bisect.insort(ascending, (load[place], place))
        return [sorted(batch) for batch in batches]

    def even_out(self, batches: list[list[int]]) -> list[list[int]]:
        """Tight batches made more equal: from the most costly on, swap a piece with a lighter batch."""
        batches = [list(batch) for batch in batches]
        load = [self.cost_of(batch) for batch in batches]
        free = [self.max_tokens - sum(self.size[i] for i in batch) for batch in batches]
        for heavy in sorted(range(len(batches)), key=lambda k: (-load[k], k)) * EVEN_PASSES:
            swaps = (
                (abs(load[heavy] - load[light] - 2 * (self.cost[i] - self.cost[j])), light, i, j)
                for light in heapq.nsmallest(EVEN_PARTNERS, range(len(batches)), load.__getitem__)
                if load[light] < load[heavy]
                for i in batches[heavy]
                for j in batches[light]
                if 0 < self.cost[i] - self.cost[j] < load[heavy] - load[light]
                and -free[heavy] <= self.size[i] - self.size[j] <= free[light]
            )
            if (best := min(swaps, default=None)) is None:
                continue
            _, light, i, j = best
            for k, gone, come in ((heavy, i, j), (light, j, i)):
                batches[k][batches[k].index(gone)] = come
                load[k] += self.cost[come] - self.cost[gone]
                free[k] -= self.size[come] - self.size[gone]
        return [sorted(batch) for batch in batches]

    def keep(self, batches: list[list[int]]) -> list[list[list[int]]]:
        """[row][rank] batches of `spread_over`, each on its own rank."""
        own = (batches[rank :: self.num_ranks] for rank in range(self.num_ranks))
        ordered = [sorted(mine, key=lambda batch: (-self.cost_of(batch), batch)) for mine in own]
        return [list(row) for row in zip(*ordered, strict=True)]

    def deal(self, batches: list[list[int]]) -> list[list[list[int]]]:
        """[row][rank] batches: the most costly in the first row, one for each rank."""
        ordered = sorted(filter(None, batches), key=lambda batch: (-self.cost_of(batch), batch))
        load = [0.0] * self.num_ranks
        rows = []
        for start in range(0, len(ordered), self.num_ranks):
            row: list[list[int]] = [[] for _ in load]
            lightest = sorted(range(self.num_ranks), key=lambda rank: (load[rank], rank))
            for batch, rank in zip(ordered[start : start + self.num_ranks], lightest, strict=False):
                row[rank] = batch
                load[rank] += self.cost_of(batch)
            rows.append(row)
        self.bring_home(rows, load)
        return rows

    def bring_home(self, rows: list[list[list[int]]], load: list[float]) -> None:
        """Swap batches within their rows while more tokens come home and no rank grows much heavier."""
        most = HOME_TOLERANCE * max(load)
        swapped = True
        while swapped:  # each swap brings tokens home, so this ends
            swapped = False
            for row in rows:
                cost = [self.cost_of(batch) for batch in row]
                at_home = [self.at_home(batch) for batch in row]
                for a in range(self.num_ranks):
                    for b in tuple(at_home[a]):
                        here = at_home[a][a] + at_home[b][b]
                        there = at_home[a][b] + at_home[b][a]
                        more = cost[a] - cost[b]  # added to b by the swap
                        if there <= here or max(load[b] + more, load[a] - more) > most:
                            continue
                        row[a], row[b] = row[b], row[a]
                        cost[a], cost[b] = cost[b], cost[a]
                        at_home[a], at_home[b] = at_home[b], at_home[a]
                        load[a], load[b] = load[a] - more, load[b] + more
                        swapped = True

    def time(self, rows: list[list[list[int]]]) -> float:
        return sum(max(map(self.cost_of, row)) for row in rows)

    def moved_tokens(self, rows: list[list[list[int]]]) -> int:
        placed = ((rank, i) for row in rows for rank, batch in enumerate(row) for i in batch)
        return sum(self.prompt_len[i] for rank, i in placed if self.home[i] != rank)

    def cost_of(self, batch: list[int]) -> float:
        return sum(self.cost[i] for i in batch)

    def at_home(self, batch: list[int]) -> Counter[int]:
        """Prompt tokens by the rank that holds them."""
        tokens: Counter[int] = Counter()
        for i in batch:
            tokens[self.home[i]] += self.prompt_len[i]
        return tokens
