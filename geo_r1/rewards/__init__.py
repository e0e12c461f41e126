"""Rewards for completions: Geo-R1's and users' own. Standard library only.

A reward function has TRL's signature: it takes completions and each dataset column as a keyword list, and
returns one value per completion.
"""

from geo_r1.rewards.builtin import (
    REWARDS,
    accuracy,
    format_reward,
    length,
    length_published,
    overlong,
    repetition,
)
from geo_r1.rewards.calling import Caller, RewardError
from geo_r1.rewards.scoring import (
    RewardFunction,
    RewardTable,
    load_reward,
    score,
    score_groups,
)

__all__ = [
    "REWARDS",
    "Caller",
    "RewardError",
    "RewardFunction",
    "RewardTable",
    "load_reward",
    "score",
    "score_groups",
]
__all__ += ["accuracy", "format_reward", "length", "length_published", "overlong", "repetition"]
