"""Puts groups into packed batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geo_r1.kernels.layout.packed import check_lengths


@dataclass(frozen=True)
class PackedPlan:
    """Groups put into batches under a token budget.

    Attributes:
        batches: for each batch, (group, indices of its completions) pairs; a group may be in several.
        num_tokens: tokens of all batches, repeated prompts included.
        repeated_tokens: prompt tokens that are computed again because a group was split.
    """

    batches: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    num_tokens: int
    repeated_tokens: int


def plan_batches(
    prompt_len: Sequence[int], completion_len: Sequence[Sequence[int]], max_tokens: int
) -> PackedPlan:
    """Put groups into few batches of at most `max_tokens` tokens, by first-fit decreasing.

    A group larger than the budget is split into sub-groups that repeat its prompt. No batch holds two of
    them; the plan counts the repeated tokens.

    Args:
        prompt_len: tokens of each prompt, B integers >= 0.
        completion_len: B sequences with the tokens of each completion.
        max_tokens: the most tokens in a batch.

    Returns:
        The plan; the same lengths always give the same plan.

    Raises:
        ValueError: as for `PackedLayout.from_lengths`; or a prompt, alone or with one of its completions,
            exceeds the budget; the message names the group.
    """
    prompts, completions = check_lengths(prompt_len, completion_len)
    pieces: list[tuple[int, tuple[int, ...]]] = []
    sizes: list[int] = []
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        if prompt + max(lengths, default=0) > max_tokens:
            longest = f" with a completion of {max(lengths)}" if lengths else ""
            raise ValueError(
                f"group {group}: a prompt of {prompt} tokens{longest} is over the budget of {max_tokens} "
                "tokens per batch"
            )
        if prompt + sum(lengths) <= max_tokens:  # the usual case
            pieces.append((group, tuple(range(len(lengths)))))
            sizes.append(prompt + sum(lengths))
            continue
        for piece in _first_fit_decreasing(lengths, max_tokens - prompt):
            pieces.append((group, piece))
            sizes.append(prompt + sum(lengths[i] for i in piece))
    batches = _first_fit_decreasing(sizes, max_tokens)
    needed = sum(prompts) + sum(map(sum, completions))
    return PackedPlan(
        tuple(tuple(pieces[i] for i in batch) for batch in batches), sum(sizes), sum(sizes) - needed
    )


def _first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Indices of `sizes` in bins, ascending in each. Any two bins together exceed the capacity."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        slot = next((i for i, room in enumerate(free) if room >= sizes[index]), len(bins))
        if slot == len(bins):
            bins.append([])
            free.append(capacity)
        bins[slot].append(index)
        free[slot] -= sizes[index]
    return [tuple(sorted(indices)) for indices in bins]
