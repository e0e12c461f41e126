"""Rewards of sampled groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from geo_r1.data import Sample
from geo_r1.errors import UserError
from geo_r1.rewards import RewardFunction, RewardTable, score
from geo_r1.rollout.sampling import Completion


def score_groups(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float],
    tokenizer: Any,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Completion]],
) -> RewardTable:
    """Score every completion, group after group.

    A sample's metadata, answer and prompt reach the functions by name.

    Args:
        functions, weights: as in `geo_r1.rewards.score`.
        tokenizer: decodes completions into the texts that are scored, without special tokens.
        samples: one a group.
        groups: the completions of each sample.
    """
    owners = [sample for sample, group in zip(samples, groups, strict=True) for _ in group]
    names = sorted({name for sample in samples for name in sample.metadata})
    columns: dict[str, list[Any]] = {name: [owner.metadata.get(name) for owner in owners] for name in names}
    if "prompts" in names:
        raise UserError("column 'prompts' has the name of an argument of reward functions; rename it")
    columns["answer"] = [owner.answer for owner in owners]
    columns["prompts"] = [list(owner.messages) for owner in owners]
    token_ids = [completion.token_ids for group in groups for completion in group]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in token_ids]
    completions = [[{"role": "assistant", "content": text}] for text in texts]  # as TRL passes them to chats
    return score(functions, weights, completions, token_ids, columns)
