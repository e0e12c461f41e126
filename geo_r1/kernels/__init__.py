"""Fused ops for reinforcement learning on packed batches. Imports torch, and nothing else of geo_r1."""

from geo_r1.kernels.advantage import group_advantage
from geo_r1.kernels.attention import packed_attention
from geo_r1.kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput, grpo_loss, token_weights
from geo_r1.kernels.impls import available_impls
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.linear import linear_cross_entropy, linear_grpo_loss, linear_logprob

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "PackedLayout",
    "available_impls",
    "group_advantage",
    "grpo_loss",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprob",
    "packed_attention",
    "token_weights",
]
