"""The weights of a stage, trained or frozen, by name and shape, from a config alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from geo_r1.errors import UserError
from geo_r1.models import PackedVLM
from geo_r1.models.qwen_vl import VISION
from geo_r1.models.skeleton import empty_model
from geo_r1.train.recipe.run_sections import LoraConfig


@dataclass(frozen=True)
class Weight:
    """A weight; tied weights are one. `layer` is its text layer or vision block, "" outside of them."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    layer: str = ""

    def shard(self, ranks: int) -> int:
        """Entries on rank 0, the most of any, where rows are divided among the ranks."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


def entries(weights: Iterable[Weight], ranks: int = 1) -> int:
    """Entries on rank 0, where so many ranks share the weights."""
    return sum(weight.shard(ranks) for weight in weights)


def weights_of(config: PreTrainedConfig, freeze: Collection[str], lora: LoraConfig) -> list[Weight]:
    """The weights of a model with a recipe's frozen parts and adapters.

    Raises:
        UserError: nothing is left to train.
    """
    weights = list(_weights(config.model_type, config.to_json_string(use_diff=False), frozenset(freeze)))
    adapters = []
    for weight in weights if lora.rank else ():
        path = weight.name.removesuffix(".weight")
        adapted = lora.vision if path.startswith(VISION) else path.split(".")[-1] in lora.targets
        if adapted and weight.layer and len(weight.shape) == 2:
            outputs, inputs = weight.shape
            for name, shape in {"lora_A": (lora.rank, inputs), "lora_B": (outputs, lora.rank)}.items():
                adapters.append(Weight(f"{path}.{name}.default.weight", shape, True, weight.layer))
    if lora.rank:
        weights = [replace(weight, trained=False) for weight in weights] + adapters
    if not any(weight.trained for weight in weights):
        raise UserError(f"freeze = {list(freeze)} leaves nothing to train")
    return weights


@lru_cache(maxsize=16)
def _weights(family: str, config: str, freeze: frozenset[str]) -> tuple[Weight, ...]:
    model = empty_model(CONFIG_MAPPING[family].from_dict(json.loads(config)), torch.float32)
    PackedVLM(model, liger=False).freeze(freeze)
    return tuple(
        Weight(
            name, tuple(p.shape), p.requires_grad, "".join(re.findall(r"^.*\.(?:layers|blocks)\.\d+\.", name))
        )
        for name, p in model.named_parameters()
    )
