"""The reward functions that a recipe names, called on the groups of a run."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import partial

from geo_r1.data import Sample
from geo_r1.errors import UserError, say
from geo_r1.files import write_text
from geo_r1.rewards import (
    REWARDS,
    Caller,
    RewardError,
    RewardFunction,
    RewardTable,
    load_reward,
    score_groups,
)
from geo_r1.rollout import Completion
from geo_r1.train.context import RunContext
from geo_r1.train.recipe.run_sections import RewardConfig


def load_rewards(config: RewardConfig) -> dict[str, RewardFunction]:
    """The recipe's reward functions by name.

    Raises:
        UserError: a function or an option is unknown, options and weights name a function not in use, or no
            weight differs from 0.
    """
    for table, names in (("options", config.options), ("weights", config.weights)):
        for name in names:
            if name not in config.functions:
                raise UserError(
                    f"rewards.{table} names {name}, but rewards.functions has {', '.join(config.functions)}"
                )
    if not any(config.weights.get(name, 1.0) for name in config.functions):
        raise UserError("rewards.weights are 0 for every function: nothing would be rewarded")
    return {name: load_reward(name, **config.options.get(name, {})) for name in config.functions}


class Scorer:
    """Scores completions with the recipe's reward functions. Close it, or use `contextlib.closing`.

    Args:
        has_answers: False if no sample of the data set has an answer: rewards that need none then score all.
    """

    def __init__(self, context: RunContext, has_answers: bool = True) -> None:
        self.context, config = context, context.recipe.rewards
        self.functions = load_rewards(config)
        if not has_answers:
            own = {name: _without_answers(f) for name, f in self.functions.items() if name in REWARDS}
            self.functions |= own
        rank = context.ranks.rank
        tell = context.log.say if context.ranks.is_main else partial(_say_of_rank, rank)
        self.caller = Caller(config.timeout, tell)

    def close(self) -> None:
        self.caller.close()

    def score(
        self,
        samples: Sequence[Sample],
        groups: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> RewardTable:
        """The rewards of every completion, group after group.

        Raises:
            RewardError: as `rewards.score`; the traceback of a function's error is in a file of the run.
        """
        weights = self.context.recipe.rewards.weights
        try:
            return score_groups(self.functions, weights, samples, groups, texts, self.caller)
        except RewardError as error:
            if error.__cause__ is None or isinstance(error.__cause__, UserError):
                raise
            file = self.context.run_dir / "bad" / f"reward-rank{self.context.ranks.rank}.txt"
            file.parent.mkdir(exist_ok=True)
            write_text(file, "".join(traceback.format_exception(error.__cause__)))
            raise RewardError(f"{error}; its traceback is in {file}") from error


def _without_answers(function: RewardFunction) -> RewardFunction:
    return lambda *, answer, **arguments: function(**arguments)


def _say_of_rank(rank: int, message: str) -> None:
    say(f"rank {rank}: {message}")
