"""Sampling completions from the policy."""

from geo_r1.rollout.native import Completion, SamplingConfig, generate
from geo_r1.rollout.scoring import score_groups

__all__ = ["Completion", "SamplingConfig", "generate", "score_groups"]
