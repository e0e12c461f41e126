"""The flash libraries that we can call, and which of them runs.

The calls are tested against the libraries' signatures; no GPU has run them. cuDNN's kernels are not called:
torch leaves them turned off for ragged batches, where it would not take grouped heads.

Source: FlashAttention-2, arXiv:2307.08691; FlashAttention-3, arXiv:2407.08608; FlashAttention-4, its
repository.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_SIZE = 256

Sequences = tuple[Tensor, Tensor, int, int]  # cu_q, cu_k: int32 boundaries; the longest lengths

# A library is a class with `forward`, which gives the output and lse [H, queries] float32 in nats, and
# `backward`, which gives the gradients of q, k and v from P = exp(S - lse) and rowsum(d_out * out).


class Flash3Kernels:
    """The flash-attn-3 package; signatures of 3.0.0."""

    def forward(self, q, k, v, sequences, causal, scale):
        import flash_attn_interface  # noqa: F401  # it registers the ops

        options = _by_name(sequences) | {"softmax_scale": scale, "is_causal": causal, "num_splits": 1}
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **options)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, sequences, causal, scale):
        grads = {f"d{name}": x.new_empty(x.shape) for name, x in (("q", q), ("k", k), ("v", v))}
        torch.ops.flash_attn_3.bwd(
            *(d_out, q, k, v, out, lse),
            **grads,
            **_by_name(sequences),
            softmax_scale=scale,
            is_causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return tuple(grads.values())


class Flash4Kernels:
    """The flash-attn-4 package; signatures of August 2026."""

    def forward(self, q, k, v, sequences, causal, scale):
        from flash_attn.cute import interface

        options = _by_name(sequences) | {"softmax_scale": scale, "causal": causal, "return_lse": True}
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, **options)
        return out, lse.contiguous()

    def backward(self, d_out, q, k, v, out, lse, sequences, causal, scale):
        from flash_attn.cute import interface

        return interface._flash_attn_bwd(
            *(q, k, v, out, d_out, lse),
            **_by_name(sequences),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def _by_name(sequences: Sequences) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, sequences, strict=True))


class Flash2Kernels:
    """The flash-attn package; signatures of 2.7.0 to 2.8.4."""

    def forward(self, q, k, v, sequences, causal, scale):
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

        out, lse, *_ = _wrapped_flash_attn_varlen_forward(q, k, v, *sequences, 0.0, scale, causal=causal)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, sequences, causal, scale):
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        _wrapped_flash_attn_varlen_backward(
            *(d_out, q, k, v, out, lse, dq, dk, dv, *sequences, 0.0, scale),
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class TorchKernels:
    """The flash kernels inside torch, called as `torch.nn.attention.varlen` calls them.

    They are FlashAttention-2's, or what `torch.nn.attention.activate_flash_attention_impl` has put there.
    """

    def forward(self, q, k, v, sequences, causal, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *sequences, 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, sequences, causal, scale):
        random = (
            lse.new_empty(2, dtype=torch.uint64),
            lse.new_empty(0),
        )  # dropout's state, which is not used
        return torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *sequences, 0.0, causal, *random, scale=scale
        )


@dataclass(frozen=True)
class Library:
    """A flash library.

    Attributes:
        kernels: how to call it.
        package: as pip names it; None is torch itself.
        oldest: version that it must have.
        chips: first digits of the compute capabilities that it was built for; none: all from 8.0.
        head_size: the largest that it takes.
        deterministic: the largest head size of which it can sum dQ in a fixed order.
    """

    kernels: type[Any]
    package: str | None = None
    oldest: tuple[int, int] = (0, 0)
    chips: tuple[int, ...] = ()
    head_size: int = MAX_HEAD_SIZE
    deterministic: int = MAX_HEAD_SIZE


# The fastest first, by what their authors publish; nothing was measured here.
LIBRARIES = (
    Library(Flash3Kernels, "flash-attn-3", (3, 0), (9,), deterministic=192),
    Library(Flash4Kernels, "flash-attn-4", (4, 0), (9, 10), head_size=128, deterministic=0),
    Library(Flash2Kernels, "flash-attn", (2, 7)),
    Library(TorchKernels),
)


def version(package: str | None) -> str | None:
    """The installed version of a package, torch's for None; None if it is not installed."""
    try:
        return importlib.metadata.version(package or "torch")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def installed() -> tuple[Library, ...]:
    """The libraries that are installed in a version that we can call."""
    found = []
    for library in LIBRARIES:
        text = version(library.package)
        numbers = re.match(r"(\d+)(?:\.(\d+))?", text or "")
        if numbers and (int(numbers[1]), int(numbers[2] or 0)) >= library.oldest:
            found.append(library)
    return tuple(found)


def library_for(chip: int, head_size: int, deterministic: bool) -> Library:
    """The first library for GPUs whose compute capability begins with `chip`, and for a head size."""
    return next(
        library
        for library in installed()
        if chip in (library.chips or (chip,))
        and head_size <= (library.deterministic if deterministic else library.head_size)
    )
