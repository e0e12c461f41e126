"""Low-rank adapters on a Qwen-VL's frozen linear layers, by peft.

    y = W x + (alpha / rank) B A dropout(x)      A [rank, in] drawn, B [out, rank] zero at first

The layers are replaced in place: the model keeps its class, and every other module its path. The language
head and the embeddings never get an adapter: the losses take the head's own weight.

Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geo_r1.errors import UserError
from geo_r1.models.qwen_vl import VISION

ADAPTER = "default"  # peft's name of the only adapter
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
TEXT_LAYERS, VISION_BLOCKS = "model.language_model.layers.", f"{VISION}blocks."


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    vision: bool = False,
    *,
    seed: int = 0,
) -> None:
    """Freeze a model and give its linear layers adapters to train, in place; its outputs stay as they are.

    Args:
        model: a Qwen-VL without adapters. They take their layer's dtype and device, `meta` included.
        rank, alpha, dropout: see the formula above.
        targets: names of linear layers of the text model, such as "q_proj".
        vision: adapters on all linear layers of the vision tower's blocks, too.
        seed: of A, the same on every machine.

    Raises:
        UserError: peft is not installed, or a target is no linear layer of the text layers.
    """
    if find_spec("peft") is None:
        raise UserError("adapters (lora.rank > 0) need peft: pip install '.[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    assert not lora_layers(model), "the model has adapters already"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    text = [name for name in linear if name.startswith(TEXT_LAYERS)]
    known = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in text))
    if unknown := [target for target in targets if target not in known]:
        raise UserError(
            f"lora.targets names {', '.join(unknown)}; the text layers' linear layers are {', '.join(known)}"
        )
    chosen = [name for name in text if name.rsplit(".", 1)[1] in targets]
    chosen += [name for name in linear if vision and name.startswith(VISION_BLOCKS)]
    if not chosen:
        raise UserError("lora.targets names no layer and lora.vision is false: nothing would be trained")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # peft draws on the host, wherever the model is
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=model.device.type == "meta")
    layers = lora_layers(model)
    assert layers.keys() == set(chosen)
    for layer in layers.values():
        layer.to(layer.weight.dtype)  # on meta peft leaves them in float32
        layer.cast_input_dtype_enabled = False  # autocast would cast it back, and keep a second copy


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers of a model by their paths; none where it has no adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A context in which the base model computes without its adapters.

    It only sets a flag of each layer, so it works on sharded models, too.
    """
    layers = list(lora_layers(model).values())
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:  # peft's enable_adapters also freezes weights, and by then they are sharded
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@torch.no_grad()
def merged_state(tensors: Iterable[tuple[str, Tensor]], alpha: float) -> Iterator[tuple[str, Tensor]]:
    """The state of a plain model from that of a model with adapters, one tensor after the other.

    Args:
        tensors: names and whole tensors, in any order; in the order of a state dict few are held at a time.
        alpha: as given to `add_lora`.

    Yields:
        Names and tensors as they were before `add_lora`, the adapters added to the weights.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        end = next((end for end in (f"{BASE}weight", DOWN, UP) if name.endswith(end)), None)
        if end is None:
            yield name.replace(BASE, "."), tensor  # a bias, or of another layer
            continue
        path = name.removesuffix(end)
        part = parts.setdefault(path, {})
        part[end] = tensor
        if len(part) == 3:
            del parts[path]
            yield f"{path}.weight", merged_weight(part[f"{BASE}weight"], part[DOWN], part[UP], alpha)
    assert not parts, f"{min(parts)} lacks its weight or half of its adapter"


def merged_weight(base: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """base + (alpha / rank) up @ down in base's dtype, rounded once; [out, in], [rank, in], [out, rank]."""
    wide = torch.promote_types(base.dtype, torch.float32)
    delta = (up.to(wide) @ down.to(wide)).mul_(alpha / len(down))
    return delta.add_(base).to(base.dtype)
