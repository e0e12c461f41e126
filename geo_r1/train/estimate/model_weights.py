"""The weights that a stage trains or only holds, by name and shape, from a config alone."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from geo_r1.models import PackedVLM
from geo_r1.models.qwen_vl import VISION
from geo_r1.models.skeleton import empty_model
from geo_r1.train.recipe.sections import LoraConfig


@dataclass(frozen=True)
class Weight:
    """One weight; a tied one stands once.

    Attributes:
        layer: prefix of its text layer or vision block, None outside of them.
        product: whether a linear layer or a convolution has it, which autocast narrows.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    layer: str | None
    product: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def row_shard(self, ranks: int) -> int:
        """Entries on rank 0, and with padding on each, where rows are dealt to ranks."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


def entries(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def model_weights(config: PreTrainedConfig, freeze: Collection[str], lora: LoraConfig) -> list[Weight]:
    """The weights of a model with a recipe's frozen parts and adapters.

    Raises:
        ValueError: nothing is left to train.
    """
    weights = list(_weights(config.to_json_string(use_diff=False), frozenset(freeze)))
    if lora.rank:
        adapters = [part for weight in weights for part in _adapter(weight, lora)]
        weights = [replace(weight, trained=False) for weight in weights] + adapters
    if not any(weight.trained for weight in weights):
        raise ValueError(f"freeze = {list(freeze)} leaves nothing to train")
    return weights


def _adapter(weight: Weight, lora: LoraConfig) -> list[Weight]:
    path, _, kind = weight.name.rpartition(".")
    targeted = path.startswith("model.language_model.") and path.rsplit(".", 1)[-1] in lora.targets
    tower = lora.vision and path.startswith(VISION)
    if weight.layer is None or not weight.product or kind != "weight" or not (targeted or tower):
        return []
    outputs, inputs = weight.shape
    shapes = {"lora_A": (lora.rank, inputs), "lora_B": (outputs, lora.rank)}
    return [
        Weight(f"{path}.{name}.default.weight", shape, True, weight.layer, True)
        for name, shape in shapes.items()
    ]


@lru_cache(maxsize=16)
def _weights(config: str, freeze: frozenset[str]) -> tuple[Weight, ...]:
    values = json.loads(config)
    model = empty_model(CONFIG_MAPPING[values["model_type"]].from_dict(values), torch.float32)
    vlm = PackedVLM(model, liger=False)
    vlm.freeze(freeze)
    layers = set(map(id, vlm.layers))
    prefixes = [f"{name}." for name, module in model.named_modules() if id(module) in layers]
    layer_of = {prefix.count("."): set[str]() for prefix in prefixes}
    for prefix in prefixes:
        layer_of[prefix.count(".")].add(prefix)
    products = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv3d)}
    found = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = None
        for depth, known in layer_of.items():
            prefix = ".".join(parts[:depth]) + "."
            layer = prefix if prefix in known else layer
        product = name.rpartition(".")[0] in products and name != "lm_head.weight"  # the losses take that one
        found.append(Weight(name, tuple(parameter.shape), parameter.requires_grad, layer, product))
    return tuple(found)
