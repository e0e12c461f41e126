"""Samples, the files they come from, how they reach the model, and the procedural world."""

from geo_r1.data.loader import PromptLoader
from geo_r1.data.prompt import OverlongPrompt, PromptEncoder
from geo_r1.data.sample import Sample, load_image, read_samples
from geo_r1.data.world import World

__all__ = ["OverlongPrompt", "PromptEncoder", "PromptLoader", "Sample", "World", "load_image", "read_samples"]
