"""Samples: how they are read from files, encoded for the model, and made by the procedural world."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geo_r1.data.decoding import load_image
from geo_r1.data.rows import read_samples
from geo_r1.data.sample import Sample
from geo_r1.data.world import World

if TYPE_CHECKING:
    from geo_r1.data.loader import PromptLoader
    from geo_r1.data.prompt import OverlongPromptError, PromptEncoder

_WITH_TORCH = {"PromptLoader": "loader", "PromptEncoder": "prompt", "OverlongPromptError": "prompt"}

__all__ = ["OverlongPromptError", "PromptEncoder", "PromptLoader"]
__all__ += ["Sample", "World", "load_image", "read_samples"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only to encode prompts; the command line needs neither."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
