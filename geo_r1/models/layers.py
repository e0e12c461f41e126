"""How text layers and vision blocks run: compiled, and computed again in backward.

transformers has its own checkpointing, and a module its own `compile`, but their order depends on the
release: since transformers 5.24 the checkpoint lies inside the compiled layer, where torch.compile meets the
attention, which has to stay outside of its graphs, and gives the layer up without a word. So here a layer's
`forward` is compiled first and its checkpoint put around that; hooks of the module, such as FSDP2's, stay
outside of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from geo_r1.models.memory import Checkpointing, selective_contexts

# Tensors that a selective checkpoint keeps stay on the device when `HostMemory` moves others. Since 2.15,
# torch has an option for it, and warns that its default will change.
_STAY = {"respect_saved_tensors_hooks": False}
OPTIONS: dict[Checkpointing, dict[str, Any]] = {
    "full": {},
    "selective": {
        "context_fn": selective_contexts,
        **(_STAY if _STAY.keys() <= signature(checkpoint).parameters.keys() else {}),
    },
}


def run_layers(
    layers: Iterable[nn.Module], checkpointing: Checkpointing, backend: str | Callable | None
) -> None:
    """Give each layer a `forward` of its own, or its class's again.

    Args:
        checkpointing: what backward computes again, if the layer is in training mode.
        backend: torch.compile's, for one function a class of layers; None: not compiled.
    """
    forwards: dict[type[nn.Module], Callable] = {}
    for layer in layers:
        # a model's config.json can turn transformers' own on
        vars(layer)["gradient_checkpointing"] = False
        vars(layer).pop("forward", None)
        if checkpointing == "none" and backend is None:
            continue
        if (kind := type(layer)) not in forwards:
            forward = (
                kind.forward
                if backend is None
                else torch.compile(kind.forward, dynamic=True, backend=backend)
            )
            forwards[kind] = forward if checkpointing == "none" else _again(forward, OPTIONS[checkpointing])
        layer.forward = MethodType(forwards[kind], layer)  # type: ignore[method-assign]  # a deep copy rebinds it


def _again(forward: Callable, options: dict[str, Any]) -> Callable:
    @wraps(forward)
    def run(layer: nn.Module, *args, **kwargs):
        if not (layer.training and torch.is_grad_enabled()):
            return forward(layer, *args, **kwargs)
        return checkpoint(forward, layer, *args, use_reentrant=False, **options, **kwargs)

    return run
