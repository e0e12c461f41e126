"""Fused ops for reinforcement learning on packed batches. Imports torch, and nothing else of geo_r1."""

from geo_r1.kernels.advantage.public import group_advantage
from geo_r1.kernels.attention.public import packed_attention
from geo_r1.kernels.impls import available_impls
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.public import (
    GRPOLossOutput,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_logprob,
)
from geo_r1.kernels.loss.weights import token_weights

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
