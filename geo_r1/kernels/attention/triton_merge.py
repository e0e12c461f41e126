"""The two parts of `flash.py` put together in place: outputs by their log-sum-exps, gradients by their sum.

    lse = logaddexp(lse, part_lse);  out = out exp(old lse - lse) + part exp(part_lse - lse)

Bytes moved for n rows of H heads of D numbers: both outputs read and one written, 3 n H D b; a sum as many.
Arithmetic is in float32, and results are rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geo_r1.kernels.launch import Launch

# Largest head size -> rows and columns of a block: 4096 numbers, 32 for each thread. Nothing was measured.
BLOCKS = {
    64: Launch("up to 64 columns", BR=64, BD=64, num_warps=4),
    128: Launch("up to 128 columns", BR=32, BD=128, num_warps=4),
    256: Launch("up to 256 columns", BR=16, BD=256, num_warps=4),
}

Rows = Tensor | slice  # [n] int64, or a range with both ends


@triton.jit
def _rows(row_ptr, first, num_rows, HAS_ROWS: tl.constexpr, BR: tl.constexpr):
    """A block's rows of the part, which of them exist, and where they are in the whole."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = o_r < num_rows
    place = first + o_r
    if HAS_ROWS:
        place = tl.load(row_ptr + o_r, mask=inside, other=0)
    return o_r.to(tl.int64), inside, place.to(tl.int64)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row_ptr, first, num_rows, head_size,
    stride_t, stride_h, part_stride_t, part_stride_h, lse_stride_h, part_lse_stride_h,
    HAS_ROWS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_r, inside, place = _rows(row_ptr, first, num_rows, HAS_ROWS, BR)
    p_lse = lse_ptr + i_h * lse_stride_h + place
    lse = tl.load(p_lse, mask=inside, other=0.0)
    part_lse = tl.load(part_lse_ptr + i_h * part_lse_stride_h + o_r, mask=inside, other=0.0)
    top = tl.maximum(lse, part_lse)
    own, other = tl.exp(lse - top), tl.exp(part_lse - top)
    tl.store(p_lse, top + tl.log(own + other), mask=inside)

    o_d = tl.arange(0, BD)
    mask = inside[:, None] & (o_d < head_size)[None, :]
    p_out = out_ptr + i_h * stride_h + place[:, None] * stride_t + o_d[None, :]
    p_part = part_ptr + i_h * part_stride_h + o_r[:, None] * part_stride_t + o_d[None, :]
    share = (other / (own + other))[:, None]
    b_out = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
    b_part = tl.load(p_part, mask=mask, other=0.0).to(tl.float32)
    b_out = b_out * (1 - share) + b_part * share
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(
    total_ptr, part_ptr, row_ptr, first, num_rows, head_size,
    stride_t, stride_h, part_stride_t, part_stride_h,
    HAS_ROWS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_r, inside, place = _rows(row_ptr, first, num_rows, HAS_ROWS, BR)
    o_d = tl.arange(0, BD)
    mask = inside[:, None] & (o_d < head_size)[None, :]
    p_total = total_ptr + i_h * stride_h + place[:, None] * stride_t + o_d[None, :]
    p_part = part_ptr + i_h * part_stride_h + o_r[:, None] * part_stride_t + o_d[None, :]
    b_total = tl.load(p_total, mask=mask, other=0.0).to(tl.float32)
    b_total += tl.load(p_part, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_total, b_total.to(total_ptr.dtype.element_ty), mask=mask)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
    """Merge a part into the rows of an output.

    Args:
        out: [T, H, D], last stride 1.
        lse: [H, T] float32, nats, last stride 1.
        part: [n, H, D], last stride 1; its rows are `rows` of `out`.
        part_lse: [H, n] float32.
        rows: each row at most once.
    """
    num_rows, num_heads, head_size = part.shape
    row = _row(head_size)
    _merge_kernel[(triton.cdiv(num_rows, row.options["BR"]), num_heads)](
        out, lse, part, part_lse.contiguous(), *_place(rows), num_rows, head_size,
        *out.stride()[:2], *part.stride()[:2], lse.stride(0), num_rows,
        HAS_ROWS=isinstance(rows, Tensor), **row.options,
    )  # fmt: skip


def add(total: Tensor, part: Tensor, rows: Rows) -> None:
    """Add a part [n, H, D] to the rows of a total [T, H, D]; last strides 1, each row at most once."""
    num_rows, num_heads, head_size = part.shape
    row = _row(head_size)
    _add_kernel[(triton.cdiv(num_rows, row.options["BR"]), num_heads)](
        total, part, *_place(rows), num_rows, head_size, *total.stride()[:2], *part.stride()[:2],
        HAS_ROWS=isinstance(rows, Tensor), **row.options,
    )  # fmt: skip


def _place(rows: Rows) -> tuple[Tensor | None, int]:
    return (rows, 0) if isinstance(rows, torch.Tensor) else (None, rows.start)


def _row(head_size: int) -> Launch:
    return next(row for most, row in BLOCKS.items() if head_size <= most)
