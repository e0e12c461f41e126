"""Putting tensors in the place of a model's own: on another device, with rank 0's values, or without any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from geo_r1.train.parallel.ranks import Ranks


def hand_out(module: nn.Module, ranks: Ranks) -> None:
    """Bring a module to every rank's device with the values of rank 0, which alone need hold any.

    What is sharded already stays as it is.
    """

    def place(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        tensor = torch.empty_like(tensor, device=ranks.device) if tensor.is_meta else tensor.to(ranks.device)
        ranks.broadcast(tensor)
        return tensor

    replace_all(module, place)


def replace_all(module: nn.Module, place: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of all weights and buffers; tied ones stay tied."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old one, kept so that the id stays its own
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for name, old in list(slots.items()):
                if old is None:
                    continue
                if id(old) not in placed:
                    new = place(old.detach())
                    if isinstance(new, DTensor):
                        new = old
                    elif isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    placed[id(old)] = old, new
                slots[name] = placed[id(old)][1]  # type: ignore[assignment]
