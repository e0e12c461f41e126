"""Sampling completions from the policy."""

from geo_r1.rollout.native import Completion, SamplingConfig, generate

__all__ = ["Completion", "SamplingConfig", "generate"]
