"""Fused kernels and a lean trainer for reinforcement learning of vision-language models."""
