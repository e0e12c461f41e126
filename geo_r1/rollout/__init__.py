"""Sampling completions from the policy."""

from geo_r1.rollout.native.generation import generate
from geo_r1.rollout.sampling import Completion, SamplingConfig

__all__ = ["Completion", "SamplingConfig", "generate"]
