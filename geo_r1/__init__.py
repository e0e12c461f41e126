"""Fused kernels and a lean trainer for reinforcement learning of vision-language models."""

__version__ = "0.2.0"
