"""RMSNorm, SwiGLU and rotary positions of a Qwen-VL by liger-kernel's Triton kernels.

    rms_norm: x / sqrt(mean(x^2) + eps) * w      statistics in float32, as transformers computes them
    swiglu:   silu(gate) * up                    one pass instead of two, and silu(gate) is not kept
    rotary:   [a, b] -> [a cos - b sin, b cos + a sin]   rounded once; cos and sin come ready from the model

Each reads its inputs once and writes its outputs once, where transformers takes three to eight passes.

Only the modules of the model handed over change: each gets a `forward` of its own. transformers' classes and
functions stay as they are, for everyone else in the process. (liger-kernel's own patch replaces
`apply_multimodal_rotary_pos_emb`, which transformers no longer calls since 5.17: rotary stays unfused there.)

The kernels work in place: rotary writes over the outputs of the projections, which nothing else reads; the
backward passes of swiglu and rms_norm over saved gates and incoming gradients. So a graph is good for one
backward pass; `retain_graph=True` gives wrong gradients.

Source: Liger-Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Let liger-kernel compute the layers of this model that it knows.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL in float32, bfloat16 or float16, for a GPU.

    Returns:
        What it computes from now on, of "rms_norm", "rotary", "swiglu" and "vision_rotary".
    """
    forwards = _forwards()
    fused = set()
    for module in model.modules():
        name, forward = forwards.get(type(module), ("", None))
        if forward is None or (name == "swiglu" and not isinstance(module.act_fn, nn.SiLU | SiLUActivation)):
            continue
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]  # a deep copy rebinds it
        fused.add(name)
    return tuple(sorted(fused))


def _forwards() -> dict[type[nn.Module], tuple[str, Forward | None]]:
    """By exact class: what liger-kernel computes of it, and how.

    The vision towers of Qwen2-VL and Qwen3-VL have LayerNorm and GELU, which stay.
    """
    text, vision = {"apply_rotary_pos_emb": _rotary}, {"apply_rotary_pos_emb_vision": _vision_rotary}
    return {
        qwen2_5_vl.Qwen2_5_VLRMSNorm: ("rms_norm", _rms_norm),
        qwen2_vl.Qwen2VLRMSNorm: ("rms_norm", _rms_norm),
        qwen3_vl.Qwen3VLTextRMSNorm: ("rms_norm", _rms_norm),
        qwen2_5_vl.Qwen2MLP: ("swiglu", _swiglu),
        qwen2_vl.Qwen2MLP: ("swiglu", _swiglu),
        qwen3_vl.Qwen3VLTextMLP: ("swiglu", _swiglu),
        qwen2_5_vl.Qwen2_5_VLMLP: ("swiglu", _swiglu),
        **{
            c: ("rotary", _calling(c, text))
            for c in (
                qwen2_5_vl.Qwen2_5_VLAttention,
                qwen2_vl.Qwen2VLAttention,
                qwen3_vl.Qwen3VLTextAttention,
            )
        },
        **{
            c: ("vision_rotary", _calling(c, vision))
            for c in (
                qwen2_5_vl.Qwen2_5_VLVisionAttention,
                qwen2_vl.VisionAttention,
                qwen3_vl.Qwen3VLVisionAttention,
            )
        },
    }


def _rms_norm(self, hidden_states: Tensor) -> Tensor:
    # in place: linear layers, or after norms of q and k the rotary embedding, alone read a norm's output, so
    # its gradient is a buffer of nobody else's; the norm keeps its input, so rotary may write over its output
    out = LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", True, None
    )
    device = out.device.type
    if torch.is_autocast_enabled(device):  # the cast that each of its readers would make and keep, made once
        out = out.to(torch.get_autocast_dtype(device))
    return out


def _swiglu(self, hidden_states: Tensor) -> Tensor:
    return self.down_proj(
        LigerSiLUMulFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states))
    )


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`: q [1, H, T, D] and k [1, K, T, D] lie as [1, T, heads, D]; angles [1, T, D]."""
    return LigerRopeFunction.apply(q, k, cos, sin)


def _vision_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_vision`: q and k [T, H, D], cos and sin [T, D]."""
    q, k = LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def _calling(attention: type[nn.Module], functions: dict[str, Callable]) -> Forward | None:
    """The class's own forward with functions that it calls by name replaced; None if it calls no such."""
    forward = attention.forward
    if not functions.keys() <= set(forward.__code__.co_names):
        return None
    names = forward.__globals__ | functions
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
