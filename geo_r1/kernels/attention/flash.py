"""Packed attention with a library's flash kernels: two calls, merged by their log-sum-exps.

    own    = every segment against itself              (all T tokens, causal or not)
    prompt = a group's completions against its prompt  (one query sequence per group, never causal)

    lse = logaddexp(lse_own, lse_prompt)
    out = out_own exp(lse_own - lse) + out_prompt exp(lse_prompt - lse)

A batch without completions (vision windows, plain sequences) needs only the first call. Backward calls the
library's backward for both parts with the merged `out` and `lse`. The library rebuilds P = exp(S - lse) and
needs rowsum(dO * O), so each part's gradient is exact. The parts are added in float32.

Operations: only visible pairs are computed. Bytes beyond the library's: the merge, one kernel, reads both
outputs of completion rows and writes one; if several groups share their prompts, their rows are gathered.

`libraries.py` chooses the library. All sum dQ with atomics, in an order that differs from run to run, unless
`torch.use_deterministic_algorithms(True)` is set. AMD GPUs are not supported: their log-sum-exp has another
layout. The merge is tested on a CPU against the definition; no GPU has run it.

Source: FlashAttention-2, arXiv:2307.08691; merging by log-sum-exp as in Hydragen, arXiv:2402.05099.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo_r1.kernels.attention.libraries import MAX_HEAD_SIZE, Sequences, library_for
from geo_r1.kernels.impls import why_not
from geo_r1.kernels.layout import PackedLayout

DTYPES = (torch.float16, torch.bfloat16)  # the libraries are compiled for these
MAX_SEGMENTS = 65535  # sequences are the second axis of the libraries' grids
LOAD_BYTES = 16  # the libraries load and store rows in steps of this size, without checking alignment

# If no sequence has more than one query, both libraries switch to a decoding layout in which every sequence
# must have exactly one. They use the longest length only as an upper bound, so ours is never 1.
MIN_LONGEST = 2


class FlashPlan(NamedTuple):
    """Boundaries of the two calls, built once per layout, with tensors on the layout's device.

    If only one group shares its prompt, the rows are two ranges and nothing is gathered.
    """

    cu_segment: Tensor  # [S + 1] int32, the first call's sequences
    cu_completion: Tensor | None = (
        None  # [B + 1] int32, each group's completions as one sequence; None: no second call
    )
    cu_prompt: Tensor | None = None  # [B + 1] int32, each group's prompt
    completion_row: Tensor | None = None  # [queries of the second call] int64; None: rows split to stop
    prompt_row: Tensor | None = None  # [keys of the second call] int64; None: rows start to split
    max_segment: int = MIN_LONGEST
    max_completion: int = 0
    max_prompt: int = 0
    start: int = 0
    split: int = 0
    stop: int = 0

    @classmethod
    def of(cls, layout: PackedLayout) -> FlashPlan:
        """The layout's plan, made on first use and kept with the layout."""
        return layout.kept(cls, lambda: cls._from_layout(layout))

    @classmethod
    def _from_layout(cls, layout: PackedLayout) -> FlashPlan:
        """Sizes come from lengths on the host, tensors from those on the device, so nothing waits."""
        longest = max([MIN_LONGEST, *layout.prompt_len, *(n for some in layout.completion_len for n in some)])
        shared, stop = [], 0  # (prompt's start, completions' start, end) of groups with both
        for prompt, lengths in zip(layout.prompt_len, layout.completion_len, strict=True):
            start, split = stop, stop + prompt
            stop = split + sum(lengths)
            if start < split < stop:
                shared.append((start, split, stop))
        if not shared:
            return cls(layout.cu_segment, max_segment=longest)

        start_B, split_B = layout.cu_group[:-1], layout.cu_group[:-1] + layout.prefix_len
        prompt_B, completion_B = layout.prefix_len, layout.cu_group[1:] - split_B
        both_B = (prompt_B > 0) & (completion_B > 0)  # other groups get empty sequences
        prompt_B, completion_B = prompt_B * both_B, completion_B * both_B
        cu_prompt, cu_completion = _boundaries(prompt_B), _boundaries(completion_B)
        prompt_row = completion_row = None
        if len(shared) > 1:
            num_keys = sum(split - start for start, split, _ in shared)
            num_queries = sum(stop - split for _, split, stop in shared)
            prompt_row = _ranges(start_B, prompt_B, cu_prompt, num_keys)
            completion_row = _ranges(split_B, completion_B, cu_completion, num_queries)
        return cls(
            layout.cu_segment,
            cu_completion,
            cu_prompt,
            completion_row,
            prompt_row,
            longest,
            max([MIN_LONGEST, *(stop - split for _, split, stop in shared)]),
            max([MIN_LONGEST, *(split - start for start, split, _ in shared)]),
            *shared[0],
        )

    @property
    def own(self) -> Sequences:
        """Every segment against itself."""
        return self.cu_segment, self.cu_segment, self.max_segment, self.max_segment

    @property
    def shared(self) -> Sequences | None:
        """Completions against their prompts; None if no group has both."""
        if self.cu_completion is None or self.cu_prompt is None:
            return None
        return self.cu_completion, self.cu_prompt, self.max_completion, self.max_prompt

    @property
    def rows(self) -> tuple[Any, Any]:
        """Indices of the completion rows and of the prompt rows in the second call."""
        if self.completion_row is None:
            return slice(self.split, self.stop), slice(self.start, self.split)
        return self.completion_row, self.prompt_row


def _boundaries(length_B: Tensor) -> Tensor:
    return torch.nn.functional.pad(length_B.cumsum(0), (1, 0)).int()


def _ranges(start_B: Tensor, length_B: Tensor, cu: Tensor, total: int) -> Tensor:
    """[total] int64: start, start + 1, ... of each range, one range after another."""
    shift = torch.repeat_interleave(start_B - cu[:-1], length_B, output_size=total)
    return shift + torch.arange(total, device=cu.device)


def _kernels(q: Tensor) -> Any:
    chip = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 0
    return library_for(chip, q.shape[2], torch.are_deterministic_algorithms_enabled()).kernels()


def loadable(x: Tensor) -> Tensor:
    """x, or a copy whose rows the libraries can load in steps of LOAD_BYTES."""
    step = LOAD_BYTES // x.element_size()
    fits = x.stride(-1) == 1 and all(stride % step == 0 for stride in x.stride()[:-1])
    if fits and x.data_ptr() % LOAD_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


class TorchMerging:
    """`triton_merge.py` in plain torch, for CPUs."""

    @staticmethod
    def merge(out, lse, part, part_lse, rows):
        # [rows, H, 1] float32: the part's share of the probability, exp(part_lse - new lse)
        share = (part_lse - lse[:, rows]).sigmoid().T.unsqueeze(-1)
        out[rows] = (out[rows] * (1 - share) + part * share).to(out.dtype)
        lse[:, rows] = torch.logaddexp(lse[:, rows], part_lse)

    @staticmethod
    def add(total, part, rows):
        total[rows] += part  # torch adds 16-bit floats in float32 and rounds the sum


def _merging(q: Tensor) -> Any:
    """What merges the two calls: Triton's kernels on a GPU that has them, else plain torch."""
    if q.device.type == "cuda" and why_not("packed_attention", "triton", q.device) is None:
        return importlib.import_module("geo_r1.kernels.attention.triton_merge")
    return TorchMerging


_PLAN = (
    "Tensor cu_segment, Tensor? cu_completion, Tensor? cu_prompt, Tensor? completion_row, "
    "Tensor? prompt_row, SymInt max_segment, SymInt max_completion, SymInt max_prompt, "
    "SymInt start, SymInt split, SymInt stop"
)


@torch.library.custom_op(
    "geo_r1::flash_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, bool causal, float scale, {_PLAN}) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *fields):
    if not q.numel():  # the libraries refuse an empty batch
        return _forward_fake(q)
    plan, kernels = FlashPlan(*fields), _kernels(q)
    q, k, v = map(loadable, (q, k, v))
    out, lse = kernels.forward(q, k, v, plan.own, causal, scale)
    out = out.contiguous()  # the libraries give it the strides of q
    if plan.shared is not None:
        rows, prompt = plan.rows
        part = kernels.forward(q[rows], k[prompt], v[prompt], plan.shared, False, scale)
        _merging(q).merge(out, lse, *part, rows)
    return out, lse


@_forward.register_fake
def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


@torch.library.custom_op(
    "geo_r1::flash_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale, "
        f"{_PLAN}) -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward(d_out, q, k, v, out, lse, causal, scale, *fields):
    if not q.numel():
        return _backward_fake(d_out, q, k, v)
    plan, kernels = FlashPlan(*fields), _kernels(q)
    d_out, q, k, v = map(loadable, (d_out, q, k, v))
    dq, dk, dv = kernels.backward(d_out, q, k, v, out, lse, plan.own, causal, scale)
    grads = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    if plan.shared is not None:
        rows, prompt = plan.rows
        merged = (out[rows], lse[:, rows].contiguous())
        parts = kernels.backward(
            d_out[rows], q[rows], k[prompt], v[prompt], *merged, plan.shared, False, scale
        )
        for total, part, where in zip(grads, parts, (rows, prompt, prompt), strict=True):
            _merging(q).add(total, part, where)
    return grads


@_backward.register_fake
def _backward_fake(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs  # not saved: autograd refuses tensors made in inference mode
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grads = (None,) * 3 if d_out is None else _backward(d_out, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None for _ in ctx.options)


_forward.register_autograd(_gradients, setup_context=_save)


def refusal(q_THD: Tensor, layout: PackedLayout) -> str | None:
    """The property of the inputs that the libraries do not support; None if they support all."""
    if q_THD.dtype not in DTYPES:
        return f"{q_THD.dtype} inputs, only float16 and bfloat16"
    head_size = q_THD.shape[-1]
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return f"a head size of {head_size}, only multiples of 8 up to {MAX_HEAD_SIZE}"
    segments = layout.cu_segment.shape[0] - 1
    if segments > MAX_SEGMENTS:
        return f"{segments} segments, only up to {MAX_SEGMENTS}"
    return None


def flash_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: PackedLayout, *, causal: bool, scale: float
) -> Tensor:
    """`packed_attention` of checked inputs; raises ValueError for those that `refusal` names."""
    if reason := refusal(q_THD, layout):
        raise ValueError(f"packed_attention: impl='flash' does not take {reason}")
    return _forward(q_THD, k_TKD, v_TKD, causal, scale, *FlashPlan.of(layout))[0]
