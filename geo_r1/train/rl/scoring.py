"""The reward functions that a recipe names."""

from __future__ import annotations

from geo_r1.errors import UserError
from geo_r1.rewards import RewardFunction, load_reward
from geo_r1.train.recipe.run_sections import RewardConfig


def load_rewards(config: RewardConfig) -> dict[str, RewardFunction]:
    """The recipe's reward functions by name.

    Raises:
        UserError: a function or an option is unknown, or options and weights name a function not in use.
    """
    for table, names in (("options", config.options), ("weights", config.weights)):
        for name in names:
            if name not in config.functions:
                raise UserError(
                    f"rewards.{table} names {name}, but rewards.functions has {', '.join(config.functions)}"
                )
    return {name: load_reward(name, **config.options.get(name, {})) for name in config.functions}
