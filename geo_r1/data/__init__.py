"""Samples, the files they come from, how they reach the model, and the procedural world."""

from geo_r1.data.prompt import PromptEncoder
from geo_r1.data.sample import Sample, load_image, read_samples
from geo_r1.data.world import World

__all__ = ["PromptEncoder", "Sample", "World", "load_image", "read_samples"]
