"""Attention over packed batches, forward and backward and forward alone, against library kernels.

Operations: 4 H D for each visible (query, key) pair forward, 2.5 times that backward. A library kernel cannot
share a prompt: it gets every completion with its own copy of the prompt, as in today's trainers, while
operations count a shared prompt once. Errors are measured on the output and the gradients of q, k and v.
Forward alone keeps nothing for a backward pass if the library allows it, and leaves out flex_attention, which
would need a second compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import (
    DTYPE,
    ON_GPU,
    Case,
    Provider,
    Tensors,
    our_names,
    ours,
    why_missing,
    why_not_compiled,
)
from geo_r1.kernels import PackedLayout, packed_attention

TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
FORWARD_PEERS = ["torch flash varlen", "torch SDPA", "torch SDPA, cuDNN", "cuDNN frontend"]
FORWARD_PEERS += ["flash-attn 2", "flash-attn 3", "flash-attn 4"]
PEERS = [*FORWARD_PEERS, "flex_attention, compiled"]

# Makes the output.
Attend = Callable[[], Tensor]
# Makes the timed function from the attention and the inputs that need gradients.
Timed = Callable[[Attend, Tensors], Callable[[], Tensors]]


@dataclass(frozen=True)
class AttentionSize:
    name: str
    prompts: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...] | None
    heads: int
    kv_heads: int
    head_size: int
    causal: bool = True

    def __str__(self) -> str:
        return self.name

    @cached_property
    def sequences(self) -> list[tuple[range, range]]:
        """(prompt rows, own rows) of each sequence that a kernel without shared prompts needs."""
        found, start = [], 0
        for prompt, lengths in zip(self.prompts, self.completions or [()] * len(self.prompts), strict=True):
            rows = range(start, start + prompt)
            start += prompt
            if not lengths:
                found.append((range(0), rows))
            for length in lengths:
                found.append((rows, range(start, start + length)))
                start += length
        return found

    @property
    def num_tokens(self) -> int:
        return sum(self.prompts) + sum(map(sum, self.completions or ()))

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(own) for prompt, own in self.sequences]

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs; those of a shared prompt count once."""
        total = sum(map(self._within, self.prompts))
        for prompt, lengths in zip(self.prompts, self.completions or (), strict=False):
            total += sum(prompt * length + self._within(length) for length in lengths)
        return total

    @property
    def repeated_pairs(self) -> int:
        return sum(map(self._within, self.lengths))

    def _within(self, length: int) -> int:
        return length * (length + 1) // 2 if self.causal else length * length


def windows(images: list[tuple[int, int]]) -> tuple[int, ...]:
    """Patches of each vision window: 4 x 4 merged patches of 2 x 2, fewer at an image's right and bottom."""

    def split(size: int) -> list[int]:
        return [min(4, size - start) for start in range(0, size, 4)]

    return tuple(4 * h * w for height, width in images for h in split(height) for w in split(width))


# A panorama of 1036 x 504 and five satellite tiles of 756 x 756 pixels, in merged patches of 28.
IMAGES = [(18, 37), *[(27, 27)] * 5]
VISION = {"completions": None, "heads": 16, "kv_heads": 16, "head_size": 80, "causal": False}
TEXT = {"heads": 28, "kv_heads": 4, "head_size": 128}
if ON_GPU:
    SIZES = [
        AttentionSize("causal 4 x 4096", (4096,) * 4, None, **TEXT),
        AttentionSize("causal 16K ragged", (6500, 4100, 2900, 1700, 900, 284), None, **TEXT),
        AttentionSize("shared prompt 4300 + 8 x 400", (4300,), ((400,) * 8,), **TEXT),
        AttentionSize("vision windows", windows(IMAGES), **VISION),
        AttentionSize("vision whole images", tuple(4 * h * w for h, w in IMAGES), **VISION),
    ]
else:
    small = {"heads": 4, "kv_heads": 2, "head_size": 32}
    SIZES = [
        AttentionSize("causal 2 x 256", (256,) * 2, None, **small),
        AttentionSize("shared prompt 256 + 8 x 24", (256,), ((24,) * 8,), **small),
        AttentionSize("vision windows", windows([(6, 9)]), **VISION),
    ]
FORWARD_SIZES = [size for size in SIZES if size.causal]  # text: prompts are scored without gradients


@dataclass(frozen=True)
class Inputs:
    """Packed leaves and the output's gradient, and the same with prompts repeated."""

    size: AttentionSize
    device: torch.device

    @cached_property
    def packed(self) -> Tensors:
        g = torch.Generator(self.device).manual_seed(0)
        size = self.size
        heads = (size.heads, size.kv_heads, size.kv_heads, size.heads)
        shapes = [(size.num_tokens, n, size.head_size) for n in heads]
        q, k, v, d_out = (torch.randn(*shape, generator=g, device=self.device).to(DTYPE) for shape in shapes)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out

    @cached_property
    def source(self) -> Tensor:
        """For each row with prompts repeated, its packed row."""
        rows = [row for prompt, own in self.size.sequences for row in (*prompt, *own)]
        return torch.tensor(rows, device=self.device)

    @cached_property
    def first(self) -> Tensor:
        """For each packed row, the first of its copies."""
        copies = torch.arange(len(self.source), device=self.device)
        first = torch.full((self.size.num_tokens,), len(copies), device=self.device)
        return first.scatter_reduce_(0, self.source, copies, "amin")

    @cached_property
    def repeated(self) -> Tensors:
        """Copies; only the first copy of a prompt has an output gradient, or it would count several times."""
        q, k, v, d_out = self.packed
        leaves = [x.detach().index_select(0, self.source).requires_grad_() for x in (q, k, v)]
        d_repeated = torch.zeros_like(leaves[0]).index_copy_(0, self.first, d_out)
        return (*leaves, d_repeated)

    def merge(self, results: Tensors) -> list[Tensor]:
        """Turns results of the repeated rows into results of the packed rows."""
        out, *grads = results
        merged = [out.index_select(0, self.first)]
        for grad in grads:
            shape = (self.size.num_tokens, *grad.shape[1:])
            total = torch.zeros(shape, dtype=torch.float64, device=self.device)
            merged.append(total.index_add_(0, self.source, grad.double()))
        return merged


def with_gradients(attend: Attend, inputs: Tensors) -> Callable[[], Tensors]:
    q, k, v, d_out = inputs

    def run() -> Tensors:
        out = attend()
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))

    return run


def forward_alone(attend: Attend, inputs: Tensors) -> Callable[[], Tensors]:
    @torch.no_grad()
    def run() -> Tensors:
        return (attend(),)

    return run


def truth(inputs: Inputs, layout: PackedLayout) -> list[Tensor]:
    """The reference in float64, one query head at a time; tests compare it with the definition."""
    q, k, v, d_out = (x.detach().double() for x in inputs.packed)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    shared = inputs.size.heads // inputs.size.kv_heads
    for h in range(inputs.size.heads):
        kv = h // shared
        leaves = [x.contiguous().requires_grad_() for x in (q[:, h, None], k[:, kv, None], v[:, kv, None])]
        out_head = packed_attention(*leaves, layout, causal=inputs.size.causal, impl="reference")
        grads = torch.autograd.grad(out_head, leaves, d_out[:, h, None])
        out[:, h], dq[:, h] = out_head.detach()[:, 0], grads[0][:, 0]
        dk[:, kv] += grads[1][:, 0]
        dv[:, kv] += grads[2][:, 0]
    return [out, dq, dk, dv]


def flash(inputs: Inputs, module: str | None = None) -> Attend:
    """The flash kernels inside torch, or those of a package's module."""
    q, k, v, _ = inputs.repeated
    cu = torch.tensor([0, *inputs.size.lengths], device=inputs.device).cumsum(0, dtype=torch.int32)
    longest, causal = max(inputs.size.lengths), inputs.size.causal
    if module is None:
        torch_flash = torch.ops.aten._flash_attention_forward
        return lambda: torch_flash(q, k, v, cu, cu, longest, longest, 0.0, causal, False)[0]
    function = import_module(module).flash_attn_varlen_func
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def attend() -> Tensor:
        out = function(q, k, v, causal=causal, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def cudnn(inputs: Inputs) -> Attend:
    """cuDNN's kernels for sequences of any lengths, which torch does not call."""
    import_module("cudnn.sdpa.fwd.torch_op")  # registers the op and its gradient
    q, k, v, _ = inputs.repeated
    cu = torch.tensor([0, *inputs.size.lengths], device=inputs.device).cumsum(0, dtype=torch.int32)
    lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), max(inputs.size.lengths))
    options = {"is_causal": inputs.size.causal, "cu_seqlens_q": cu, "cu_seqlens_kv": cu, **lengths}
    return lambda: torch.ops.cudnn.sdpa_fwd(q, k, v, q.shape[-1] ** -0.5, **options)[0]


def sdpa(inputs: Inputs, *backends: SDPBackend) -> Attend:
    """Sequences of equal length as a dense batch."""
    q, k, v, _ = inputs.repeated
    length = inputs.size.lengths[0]

    def attend() -> Tensor:
        dense = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        grouped = inputs.size.heads != inputs.size.kv_heads
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            out = F.scaled_dot_product_attention(*dense, is_causal=inputs.size.causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def flex(inputs: Inputs) -> Attend:
    """flex_attention on the packed rows themselves: its block mask can share prompts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, T = inputs.size, inputs.size.num_tokens
    q, k, v, _ = inputs.packed
    group, own = [], []  # for each row: its group, and its segment (-1 for a prompt)
    completions = size.completions or [()] * len(size.prompts)
    for index, (prompt, lengths) in enumerate(zip(size.prompts, completions, strict=True)):
        group += [index] * (prompt + sum(lengths))
        own += [-1] * prompt + [i for i, length in enumerate(lengths) for _ in range(length)]
    group_T, own_T = (torch.tensor(x, device=inputs.device) for x in (group, own))

    def visible(batch, head, i, j):
        seen = (group_T[i] == group_T[j]) & ((own_T[j] == -1) | (own_T[i] == own_T[j]))
        return seen & (j <= i) if size.causal else seen

    mask = create_block_mask(visible, None, None, T, T, device=str(inputs.device))
    function = torch.compile(flex_attention, dynamic=False)

    def attend() -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = function(*rows, block_mask=mask, enable_gqa=size.heads != size.kv_heads)
        return out[0].transpose(0, 1)

    return attend


def peers(inputs: Inputs, timed: Timed) -> dict[str, Provider]:
    """All peers; the tests' parameters choose among them."""
    unequal = None if len(set(inputs.size.lengths)) == 1 else "sequences differ in length"
    no_gpu = None if ON_GPU else "torch's flash and cuDNN kernels need a GPU"
    cudnn = SDPBackend.CUDNN_ATTENTION

    def repeated(missing: str | None, make: Callable[..., Attend], *args: Any) -> Provider:
        return Provider(
            lambda: timed(make(inputs, *args), inputs.repeated), missing=missing, unpack=inputs.merge
        )

    return {
        "torch flash varlen": repeated(no_gpu, flash),
        "torch SDPA": repeated(unequal, sdpa),
        "torch SDPA, cuDNN": repeated(unequal or no_gpu, sdpa, cudnn),
        "flex_attention, compiled": Provider(
            lambda: timed(flex(inputs), inputs.packed), missing=why_not_compiled(), unpack=list
        ),
        "cuDNN frontend": repeated(why_missing("cudnn"), cudnn),
        "flash-attn 2": repeated(why_missing("flash_attn"), flash, "flash_attn"),
        "flash-attn 3": repeated(why_missing("flash_attn_interface"), flash, "flash_attn_interface"),
        "flash-attn 4": repeated(why_missing("flash_attn.cute"), flash, "flash_attn.cute"),
    }


def attention_case(op: str, size: AttentionSize, timed: Timed, forwards: float, device: torch.device) -> Case:
    """A case with the operations of `forwards` forward passes."""
    inputs = Inputs(size, device)
    layout = PackedLayout.from_lengths(size.prompts, size.completions, device)
    q, k, v, _ = inputs.packed

    def build(impl: str) -> Callable[[], Tensors]:
        return timed(lambda: packed_attention(q, k, v, layout, causal=size.causal, impl=impl), inputs.packed)

    return Case(
        op,
        size.name,
        DTYPE,
        TOLERANCE[DTYPE],
        {**ours("packed_attention", build), **peers(inputs, timed)},
        truth=lambda: truth(inputs, layout),
        flops=forwards * 4.0 * size.heads * size.head_size * size.pairs,
        facts={"operations_saved": size.repeated_pairs / size.pairs},
    )


@pytest.mark.parametrize("provider", [*our_names("packed_attention"), *PEERS])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_attention(measure, size, provider):
    measure(attention_case, "packed_attention", size, with_gradients, 3.5)


@pytest.mark.parametrize("provider", [*our_names("packed_attention"), *FORWARD_PEERS])
@pytest.mark.parametrize("size", FORWARD_SIZES, ids=str)
def test_packed_attention_forward(measure, size, provider):
    measure(attention_case, "packed_attention forward", size, forward_alone, 1.0)
