"""Attention over a packed batch: a completion sees its group's prompt and itself, never its siblings.

    out_i = softmax_j(scale * q_i . k_j) v_j,   j visible from i (see `PackedLayout`)

Operations: 4 * H * D for each visible (i, j) pair forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo_r1.kernels.attention.flash import flash_attention, refusal
from geo_r1.kernels.attention.op import attend
from geo_r1.kernels.attention.reference import reference_attention
from geo_r1.kernels.impls import autocast_dtype, fastest_on, resolve_impl, runs_on
from geo_r1.kernels.layout import PackedLayout
from geo_r1.kernels.layout.tiles import HEAD_SIZES, SHORT

# Dtypes of our own kernels.
DTYPES = {"triton": (torch.float16, torch.bfloat16, torch.float32), "cuda": (torch.float16, torch.bfloat16)}


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layout: PackedLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attend within groups, sharing each group's prompt among its completions.

    Args:
        q_THD: [T, H, D] queries, any float dtype.
        k_TKD: [T, K, D] keys; K divides H (grouped heads).
        v_TKD: [T, K, D] values. Autocast casts all three to its dtype, as it does for torch's attention.
        layout: the batch's boundaries, T tokens in all.
        causal: False lets a segment's tokens see the whole segment and its prompt (vision windows).
        scale: multiplies the scores, above 0; None means D ** -0.5.
        impl: None picks by device, and on a GPU a library's kernels ("flash") for segments of more than 64
            tokens that they take; see `available_impls`. "triton" takes float16, bfloat16 and float32 with D
            of 16, 32, 64, 80, 96 or 128; "cuda" the same heads and "flash" D a multiple of 8, at most 256, in
            float16 and bfloat16.

    Returns:
        [T, H, D], dtype of q, differentiable in q, k and v: once, or with "reference" any number of times.

    Raises:
        ValueError: shapes, dtypes or devices disagree with each other or with the layout, `scale` is not
            finite and above 0, or `impl` cannot run or does not take these inputs.

    Source: shared-prefix attention as in Hydragen, arXiv:2402.05099; exact, no approximation. Kernels:
        FlashAttention-2, arXiv:2307.08691.
    """
    if (dtype := autocast_dtype(q_THD.device)) is not None:  # as for scaled_dot_product_attention
        q_THD, k_TKD, v_TKD = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (q_THD, k_TKD, v_TKD)
        )
    _check(q_THD, k_TKD, v_TKD, layout, scale)
    impl = _library_of(q_THD, layout) if impl is None else impl
    name = resolve_impl("packed_attention", impl, q_THD.device, _refused(q_THD, layout, impl))
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    if name in ("triton", "cuda"):
        return attend(q_THD, k_TKD, v_TKD, layout, causal, scale, name)
    if name == "flash":
        return flash_attention(q_THD, k_TKD, v_TKD, layout, causal=causal, scale=scale)
    return reference_attention(q_THD, k_TKD, v_TKD, layout, causal, scale)


def _library_of(q: Tensor, layout: PackedLayout) -> str | None:
    """A library's kernels for long segments where they run, unless a record names what is fastest there.

    On paper they take half the time of ours: their backward has five products, ours has seven.
    """
    op, device = "packed_attention", q.device
    if layout.max_segment_len <= SHORT or fastest_on(op, device) or "flash" not in runs_on(op, device):
        return None
    return "flash" if refusal(q, layout) is None else None


def _refused(q: Tensor, layout: PackedLayout, impl: str | None) -> dict[str, str]:
    """Implementations that do not take these inputs, and why; "flash" only if it is chosen or named."""
    refused = {}
    head_size = q.shape[2]
    for name, dtypes in DTYPES.items():
        if q.dtype not in dtypes:
            refused[name] = f"{q.dtype} inputs"
        elif head_size not in HEAD_SIZES:
            refused[name] = f"head size {head_size}, only {', '.join(map(str, HEAD_SIZES))}"
    if impl == "flash" and (reason := refusal(q, layout)):
        refused["flash"] = reason
    return refused


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> None:
    tokens = layout.num_tokens
    if q.ndim != 3 or q.shape[0] != tokens or 0 in q.shape[1:]:
        raise ValueError(f"q must be [{tokens}, heads, head size] for this layout, got {list(q.shape)}")
    if k.ndim != 3 or k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k and v must both be [{tokens}, key heads, {q.shape[2]}], "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared among {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == layout.device:
        raise ValueError(
            "q, k, v and the layout must share a device, "
            f"got {q.device}, {k.device}, {v.device}, {layout.device}"
        )
    if scale is not None and not 0 < scale < math.inf:  # torch scales after masking: -inf would turn to NaN
        raise ValueError(f"scale must be finite and above 0, got {scale}")
