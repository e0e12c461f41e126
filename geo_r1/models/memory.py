"""Memory of a forward pass: what selective checkpointing keeps for backward, and tensors in host memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Checkpointing = Literal["none", "selective", "full"]

ATTENTION_OPS = ("geo_r1::packed_attention", "geo_r1::flash_attention", "aten::_scaled_dot_product")
PRODUCTS = ("aten::mm", "aten::addmm")


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Keep the attention's output, and of the products after it every second: the first, the third, ...

    In a text layer of Qwen these are `o_proj` and `up_proj`. The products before the attention are small, and
    liger-kernel's rotary embedding overwrites their outputs, so they cannot be kept. Nor can those of
    compiled layers, whose memory is reused: `aten::mm.out`.
    """
    counted: dict[bool, int] = {}  # older torch asks again during recomputation

    def policy(context, op, *args, **options) -> CheckpointPolicy:
        name = op.name()
        if name.startswith(ATTENTION_OPS):
            counted[context.is_recompute] = 0
            return CheckpointPolicy.MUST_SAVE
        if name in PRODUCTS and context.is_recompute in counted:
            counted[context.is_recompute] += 1
            if counted[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class HostMemory:
    """Holds a forward's saved tensors until backward needs them.

    The weights of the model stay where they are, and so do tensors under `smallest` bytes. Copies are made on
    the computing stream, from and to pinned memory.

    Attributes:
        smallest: bytes.
        num_packed, num_unpacked: tensors that have gone to the host and come back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.smallest = 1 << 20
        self.num_packed = self.num_unpacked = 0
        self._entered: nn.Module | None = None
        # A sharded layer has its whole weights only while it runs: they are looked up in the running module.
        self._handles = [
            module.register_forward_pre_hook(self._enter)
            for module in model.modules()
            if next(module.parameters(recurse=False), None) is not None
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def saving(self) -> saved_tensors_hooks:
        """A context in which tensors that are saved for backward go to the host."""
        self._entered = None
        return saved_tensors_hooks(self._pack, self._unpack)

    def _enter(self, module: nn.Module, _: object) -> None:
        if not torch.compiler.is_compiling():
            self._entered = module

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.numel() * tensor.itemsize < self.smallest or self._is_weight(tensor):
            return tensor
        self.num_packed += 1
        on_gpu = tensor.device.type == "cuda"
        # Only its own elements: it may be a view of a larger tensor.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        host.copy_(tensor, non_blocking=on_gpu)
        return tensor.device, host

    def _unpack(self, packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.num_unpacked += 1
        device, host = packed
        return host.to(device, non_blocking=True)

    def _is_weight(self, tensor: Tensor) -> bool:
        """A saved weight comes detached and often transposed: it is recognised by its memory.

        Autocast's copy of it is recognised by its shape; an activation of the same shape stays, too.
        """
        if self._entered is None:
            return False
        memory, shapes = tensor.untyped_storage()._cdata, (tensor.shape, tensor.shape[::-1])
        return any(
            weight.untyped_storage()._cdata == memory
            or (weight.dtype != tensor.dtype and weight.shape in shapes)
            for weight in self._entered.parameters(recurse=False)
        )
