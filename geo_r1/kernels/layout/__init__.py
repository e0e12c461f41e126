"""Packed batches: where each segment stands, the tiles that kernels walk, and how batches are planned."""

from geo_r1.kernels.layout.packed import PackedLayout
from geo_r1.kernels.layout.plan import PackedPlan, plan_batches

__all__ = ["PackedLayout", "PackedPlan", "plan_batches"]
