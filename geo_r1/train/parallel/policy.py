"""The policy on this rank: a model spread over the ranks by a strategy, used the same way with each.

    strategy    on each rank                                            by
    ddp         everything                                              DistributedDataParallel
    fsdp2       shards of weights, gradients and optimiser              fully_shard, a layer at a time
    deepspeed   shards of gradients and optimiser, and of weights (3)   ZeRO

Each strategy acts where a module's forward begins and ends. A fused loss reads the language head's weight
outside of any layer, so a whole micro-batch, loss included, runs as the forward of one module around the
model. All strategies average gradients over the ranks; losses are multiplied by the number of ranks, so
gradients are sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from geo_r1.models import PackedVLM
from geo_r1.models.lora import merged_state
from geo_r1.train.parallel.optim import load_optimizer_state, optimizer_state
from geo_r1.train.parallel.ranks import Ranks

# Runs inside the root's forward: takes the model and further arguments, returns tensors, the loss first.
Function = Callable[..., Any]


class Runner(nn.Module):
    """Runs functions of a model as its own forward, so a wrapper sees every use of a weight."""

    def __init__(self, vlm: PackedVLM) -> None:
        super().__init__()
        self.model = vlm.model
        self.vlm = vlm

    def forward(self, function: Function, *args: Any) -> Any:
        return function(self.vlm, *args)


class Policy:
    """A whole model on every rank: one rank, or `ddp`. The other strategies override the differences.

    Attributes:
        vlm: the model; its weights may be used within `run` and `learn` only.
        alpha: of its adapters (see `geo_r1.models.lora`); None where it has none.
        everyone: True if all ranks must take part in every micro-batch, with every trained weight.
        sharded: True if no rank holds all the weights.
        copied: True if the model itself cannot be exported: this strategy does not keep it whole and plain.
    """

    sharded = False
    copied = False

    def __init__(self, vlm: PackedVLM, ranks: Ranks, trained: bool, alpha: float | None) -> None:
        self.vlm, self.ranks, self.alpha = vlm, ranks, alpha
        self.everyone = ranks.size > 1
        hand_out(vlm.model, ranks)
        self.root: nn.Module = Runner(vlm)
        if ranks.size > 1 and trained:
            self.root = DistributedDataParallel(self.root, gradient_as_bucket_view=True, init_sync=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, as this rank holds them."""
        return [p for p in self.vlm.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def run(self, function: Function, *args: Any) -> Any:
        """`function(vlm, *args)` without gradients, on all ranks together."""
        return function(self.vlm, *args)

    def learn(self, function: Function, *args: Any, last: bool) -> tuple[Tensor, ...]:
        """Add the gradient of one micro-batch, on all ranks together.

        Args:
            function: returns a tuple of tensors, the loss first.
            last: True for the step's last micro-batch.

        Returns:
            The function's tensors, without gradient.
        """
        waits = isinstance(self.root, DistributedDataParallel) and not last
        with self.root.no_sync() if waits else nullcontext():  # type: ignore[operator, union-attr]
            loss, *rest = self.root(function, *args)
            (loss * self.ranks.size).backward()
        return loss.detach(), *(x.detach() for x in rest)

    def attach(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        """Take charge of an optimiser over `parameters`; returns the one whose rates the caller sets."""
        return optimizer

    def close(self) -> None:
        """Release what the strategy holds; the policy cannot be used any more."""

    def update(self, optimizer: Optimizer, max_grad_norm: float, wanted: bool) -> float:
        """Clip the gradient and take an optimiser's step; clears the gradient.

        Args:
            wanted: False only clears, and so does a gradient that is not finite.

        Returns:
            The norm of the whole gradient before clipping.
        """
        for parameter in self.parameters:  # unused: zero, so that Adam's averages decay all the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        total = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        if wanted and math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, max_grad_norm, total)
            optimizer.step()
        optimizer.zero_grad()
        return norm

    @contextmanager
    def whole(self) -> Iterator[PackedVLM]:
        """The model with whole weights on this rank's device, gathered in `compute_dtype` if in shards."""
        replica = self.replica(self.vlm.compute_dtype, self.ranks.device) if self.sharded else self.vlm
        assert replica is not None
        yield replica

    @contextmanager
    def exported(self, dtype: torch.dtype) -> Iterator[PreTrainedModel | None]:
        """On rank 0 a plain transformers model with these weights, adapters merged; None on the others.

        Args:
            dtype: of its weights; narrower ones stay as they are.
        """
        own = self.vlm.model.dtype
        if not self.copied and own.itemsize < dtype.itemsize:
            dtype = own
        if not self.copied and self.alpha is None and dtype == own:
            yield self.vlm.model if self.ranks.is_main else None
        else:
            replica = self.replica(dtype, "cpu", self.ranks.is_main)
            yield replica.model if replica is not None else None

    def state(self, optimizer: Optimizer | None) -> dict[str, dict[str, Any]]:
        """Tensors of a checkpoint by name: weights (of LoRA the adapters alone), the optimiser's state."""
        adapters_only = self.alpha is not None and optimizer is not None
        model = {
            name: parameter.detach()
            for name, parameter in self.vlm.model.named_parameters()
            if parameter.requires_grad or not adapters_only
        }
        return {"model": model, "optim": optimizer_state(self.vlm.model, optimizer) if optimizer else {}}

    def load_state(self, optimizer: Optimizer | None, state: dict[str, dict[str, Any]]) -> None:
        """Take over a state that `state` returned and a checkpoint has filled in place.

        Its weights are the model's own tensors.
        """
        if optimizer is not None:
            load_optimizer_state(self.vlm.model, optimizer, state["optim"])

    def full_tensors(
        self, dtype: torch.dtype | None = None, ends: tuple[str, ...] = ("",)
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every weight, one after another, on every rank; a tied one once.

        Args:
            dtype: of the tensors; None keeps the weights' own.
            ends: gather only weights whose names end with one of these.
        """
        for name, parameter in self.vlm.model.named_parameters():
            if name.endswith(ends):
                yield name, self.full(parameter, dtype)

    def full(self, parameter: nn.Parameter, dtype: torch.dtype | None) -> Tensor:
        """A whole weight on this rank's device, gathered by all ranks together."""
        tensor = parameter.detach().to(self.ranks.device, dtype)  # narrower before it travels
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def move_towards(self, other: Policy, share: float) -> None:
        """weights = share * other's + (1 - share) * own, on all ranks together."""
        own = dict(self.vlm.model.named_parameters())
        for name, tensor in other.full_tensors():
            mine = own[name].detach()
            if isinstance(mine, DTensor):
                tensor = distribute_tensor(tensor, mine.device_mesh, mine.placements, src_data_rank=None)
                mine, tensor = mine.to_local(), tensor.to_local()
            mine.lerp_(tensor.to(mine), share)

    def replica(self, dtype: torch.dtype, device: torch.device | str, fill: bool = True) -> PackedVLM | None:
        """A plain model with these weights, whole, adapters merged; not trained.

        Args:
            fill: False on a rank that only takes part in gathering, and gets None.
        """
        copy = self.blank(dtype, device) if fill else self.vlm.skeleton(dtype=dtype, device=device)
        slots = dict(copy.model.named_parameters())
        if self.alpha is None:
            tensors = self.full_tensors(dtype)
        else:  # merged in their own dtype, then rounded once
            tensors = merged_state(self.full_tensors(), self.alpha)
        with torch.no_grad():
            for name, tensor in tensors:
                if fill:
                    slots[name].copy_(tensor)
        return copy if fill else None

    def blank(self, dtype: torch.dtype, device: torch.device | str) -> PackedVLM:
        """A plain model of this one's shape on this rank, not trained, with its weights uninitialised."""
        copy = self.vlm.skeleton(dtype=dtype, device=device)
        replace_all(copy.model, lambda tensor: torch.empty_like(tensor, device=device))
        own = dict(self.vlm.model.named_buffers())
        for name, buffer in copy.model.named_buffers():
            buffer.copy_(own[name])
        copy.model.requires_grad_(False).eval()
        return copy


def hand_out(module: nn.Module, ranks: Ranks) -> None:
    """Bring a module to every rank's device with rank 0's values; tensors in shards already stay as they are.

    The other ranks may have it on the meta device.
    """

    def place(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        tensor = torch.empty_like(tensor, device=ranks.device) if tensor.is_meta else tensor.to(ranks.device)
        ranks.broadcast(tensor)
        return tensor

    replace_all(module, place)


def replace_all(module: nn.Module, place: Callable[[Tensor], Tensor]) -> None:
    """Replace all weights and buffers by `place` of them; tied ones stay tied."""
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
