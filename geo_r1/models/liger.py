"""Compute a Qwen-VL's RMSNorm, SwiGLU and rotary positions with liger-kernel's Triton kernels.

    rms_norm: x / sqrt(mean(x^2) + eps) * w      statistics in float32, as transformers computes them
    swiglu:   silu(gate) * up                    one pass instead of two, and silu(gate) is not kept
    rotary:   [a, b] -> [a cos - b sin, b cos + a sin]   rounded once; cos and sin come ready from the model

Each reads its inputs once and writes its outputs once; transformers takes three to eight passes.

Only the modules of the given model change: each gets a `forward` of its own. transformers' classes and
functions stay as they are. (liger-kernel's own patch replaces `apply_multimodal_rotary_pos_emb` alone, which
transformers has not called since 5.17, so it leaves rotary unfused.)

The kernels work in place: rotary overwrites the outputs of the projections, which nothing else reads; the
backward passes of swiglu and rms_norm overwrite saved gates and incoming gradients. So a graph allows one
backward pass; `retain_graph=True` gives wrong gradients.

Source: Liger-Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from types import FunctionType, MethodType

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

Forward = Callable[..., Tensor]


def fuse_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Let liger-kernel compute the layers of this model that it supports.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL in float32, bfloat16 or float16, for a GPU.

    Returns:
        The kinds of layers that it now computes, from "rms_norm", "rotary", "swiglu" and "vision_rotary".
    """
    forwards: dict[type[nn.Module], tuple[str, Forward | None]] = {
        cls: (name, FORWARDS.get(name) or _calling(cls, ROTARY[name]))
        for name, classes in CLASSES.items()
        for cls in classes
    }
    fused = set()
    for module in model.modules():
        name, forward = forwards.get(type(module), ("", None))
        if forward is None or (name == "swiglu" and not isinstance(module.act_fn, nn.SiLU | SiLUActivation)):
            continue
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]  # a deep copy rebinds it
        fused.add(name)
    return tuple(sorted(fused))


def _rms_norm(self, hidden_states: Tensor) -> Tensor:
    # In place: a norm's output is read only by linear layers, or for q and k by the rotary embedding, so
    # nothing else uses its gradient. The norm keeps its input, so rotary may overwrite its output.
    out = LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", True, None
    )
    device = out.device.type
    if torch.is_autocast_enabled(device):  # one cast; else each reader would make and keep one
        out = out.to(torch.get_autocast_dtype(device))
    return out


def _swiglu(self, hidden_states: Tensor) -> Tensor:
    return self.down_proj(
        LigerSiLUMulFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states))
    )


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`: q [1, H, T, D] and k [1, K, T, D] lie as [1, T, heads, D]; angles [1, T, D]."""
    return LigerRopeFunction.apply(q, k, cos, sin)


def _multimodal_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: list[int]
) -> tuple[Tensor, Tensor]:
    """`apply_multimodal_rotary_pos_emb`: angles [3, 1, T, D], of which each section of D reads one axis."""
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(angle.split(sections * 2, -1))], -1)
        for angle in (cos, sin)
    )
    return _rotary(q, k, cos, sin)


def _vision_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_vision`: q and k [T, H, D], cos and sin [T, D]."""
    q, k = LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def _calling(attention: type[nn.Module], functions: dict[str, Callable]) -> Forward | None:
    """The class's own forward with `functions` replaced by name; None if it calls none of them."""
    forward = unwrap(attention.forward)  # transformers 5.24 renames an argument in a decorator
    if functions.keys().isdisjoint(forward.__code__.co_names):
        return None
    names = forward.__globals__ | functions
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


# Exact classes by the kind of layer that liger-kernel computes. The vision towers of Qwen2-VL and Qwen3-VL
# have LayerNorm and GELU, which stay as they are.
CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "rms_norm": (qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen2_vl.Qwen2VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm),
    "swiglu": (qwen2_5_vl.Qwen2MLP, qwen2_vl.Qwen2MLP, qwen3_vl.Qwen3VLTextMLP, qwen2_5_vl.Qwen2_5_VLMLP),
    "rotary": (qwen2_5_vl.Qwen2_5_VLAttention, qwen2_vl.Qwen2VLAttention, qwen3_vl.Qwen3VLTextAttention),
    "vision_rotary": (
        qwen2_5_vl.Qwen2_5_VLVisionAttention,
        qwen2_vl.VisionAttention,
        qwen3_vl.Qwen3VLVisionAttention,
    ),
}
FORWARDS: dict[str, Forward] = {"rms_norm": _rms_norm, "swiglu": _swiglu}
ROTARY: dict[str, dict[str, Callable]] = {
    "rotary": {
        "apply_rotary_pos_emb": _rotary,
        "apply_multimodal_rotary_pos_emb": _multimodal_rotary,  # transformers 5.16
    },
    "vision_rotary": {"apply_rotary_pos_emb_vision": _vision_rotary},
}
