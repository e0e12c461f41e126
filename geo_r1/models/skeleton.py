"""Models without weights, on the `meta` device: only names, shapes and dtypes."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a config, with tied embeddings tied, in evaluation mode as after loading."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def empty_like(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of another's config, with buffers of the other's dtypes and its generation config.

    Made from the config, not from the modules: those may hold shards or adapters by now.
    """
    empty = empty_model(type(model.config).from_dict(model.config.to_dict()), dtype)
    buffers = dict(model.named_buffers())
    for prefix, module in empty.named_modules():
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty_like(buffers[f"{prefix}.{name}"], device="meta"))
    empty.generation_config = copy.deepcopy(model.generation_config)
    return empty
