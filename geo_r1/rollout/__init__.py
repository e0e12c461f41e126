"""Sampling completions from the policy."""

from geo_r1.rollout.native.generation import generate
from geo_r1.rollout.sampling import Completion, SamplingConfig
from geo_r1.rollout.scoring import score_groups

__all__ = ["Completion", "SamplingConfig", "generate", "score_groups"]
