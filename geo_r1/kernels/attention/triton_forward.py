"""Packed attention forward in Triton, and the functions that its backward shares.

    s_ij = scale q_i . k_j,   lse_i = log sum_j exp(s_ij),   out_i = sum_j exp(s_ij - lse_i) v_j

A program computes one tile of queries for one head, and reads the keys of the tile's prefix and of its own
segment. In the "long" rows of the table, one loop takes the blocks that need no mask, which come first in
both, and another takes the few at the ends. Neighbouring programs are heads of one tile, so heads that share
keys find them in cache.

A head of 80 or 96 numbers is held as 64 + 16 or 64 + 32, since blocks are powers of two.

Operations: 4 D per visible pair and head. Bytes: q and out once, k and v once per tile of queries.

Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from geo_r1.kernels import launch
from geo_r1.kernels.launch import Launch

LOG2_E = math.log2(math.e)  # the hardware has exp2, so kernels use it, and a log-sum-exp in base 2
# Three tf32 products replace one in float32, at nearly its accuracy; other dtypes ignore this.
PRECISION = tl.constexpr("tf32x3")

# (kind of batch, largest head size) -> tile. "short": no segment is longer than 64 tokens, so a tile is a
# whole segment. SPLIT: blocks that need no mask have a loop of their own. Reasons begin with the most
# registers that a kernel needs on sm_90 / sm_80. Nothing here was measured. A kind that names chips replaces
# the row of the same size on them: most were found for sm_90, and other chips spill. Limits are at
# least a twentieth above the most that was counted with Triton 3.6, 3.7 and 3.9.
FORWARD = {
    ("long", 32): Launch(
        "79/128; more stages spill on sm_80", BM=128, BN=64, SPLIT=1, limit=8.8, num_warps=8
    ),
    ("long", 128): Launch("225/222, 128 KiB", BM=128, BN=64, SPLIT=1, limit=12.3, num_warps=8, num_stages=3),
    ("short", 32): Launch("92/127; two stages spill on sm_80", BM=64, BN=64, SPLIT=0, limit=15, num_warps=4),
    ("short", 80): Launch(
        "155/240; three windows per SM on sm_90, two with two stages",
        BM=64,
        BN=64,
        SPLIT=0,
        limit=20,
        num_warps=4,
    ),
    ("short", 128): Launch(
        "203/255; fetches k and v of the one block together",
        BM=64,
        BN=64,
        SPLIT=0,
        limit=20.5,
        num_warps=4,
        num_stages=2,
    ),
    ("float32", 64): Launch("163/158", BM=32, BN=32, SPLIT=0, num_warps=4),
    ("float32", 128): Launch("224/230; 32 rows spill", BM=16, BN=32, SPLIT=0, num_warps=8),
    ("short sm_8x", 64): Launch(
        "190/190; one stage spills on sm_86 and sm_89", BM=64, BN=64, SPLIT=0, num_warps=4, num_stages=2
    ),
    ("short sm_8x", 128): Launch("254; two stages spill on sm_86", BM=64, BN=64, SPLIT=0, num_warps=4),
    ("short sm_12x", 128): Launch("174; 64 keys spill", BM=64, BN=32, SPLIT=0, num_warps=4),
}


@triton.jit
def load_rows(
    x_ptr, start, end, stride_t, BT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr
):
    """Rows [start, start + BT) of one head as columns [0, D0) and [D0, D0 + D1); MASK: zeros from `end`."""
    o_t = tl.arange(0, BT)
    p_t = x_ptr + tl.cast(start, tl.int64) * stride_t + o_t[:, None] * stride_t
    p_0 = p_t + tl.arange(0, D0)[None, :]
    # [BT, D0], [BT, D1]; without D1 the second is a placeholder that is never used
    if MASK:
        m_t = (start + o_t < end)[:, None]
        b_0 = tl.load(p_0, mask=m_t, other=0.0)
        b_1 = b_0
        if D1:
            b_1 = tl.load(p_t + D0 + tl.arange(0, D1)[None, :], mask=m_t, other=0.0)
    else:
        b_0 = tl.load(p_0)
        b_1 = b_0
        if D1:
            b_1 = tl.load(p_t + D0 + tl.arange(0, D1)[None, :])
    return b_0, b_1


@triton.jit
def store_rows(x_ptr, start, end, stride_t, b_0, b_1, BT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write rows [start, min(start + BT, end)) of one head."""
    o_t = tl.arange(0, BT)
    p_t = x_ptr + tl.cast(start, tl.int64) * stride_t + o_t[:, None] * stride_t
    m_t = (start + o_t < end)[:, None]
    tl.store(p_t + tl.arange(0, D0)[None, :], b_0.to(x_ptr.dtype.element_ty), mask=m_t)
    if D1:
        tl.store(p_t + D0 + tl.arange(0, D1)[None, :], b_1.to(x_ptr.dtype.element_ty), mask=m_t)


@triton.jit
def dot_t(b_a0, b_a1, b_b0, b_b1, D1: tl.constexpr):
    """[M, D] times [N, D] transposed, float32."""
    b_ab = tl.dot(b_a0, tl.trans(b_b0), input_precision=PRECISION)
    if D1:
        b_ab = tl.dot(b_a1, tl.trans(b_b1), b_ab, input_precision=PRECISION)
    return b_ab


@triton.jit
def add_dot(b_acc0, b_acc1, b_p, b_x0, b_x1, D1: tl.constexpr):
    """acc [M, D] += p [M, N] times x [N, D], with p rounded to x's dtype."""
    b_p = b_p.to(b_x0.dtype)
    b_acc0 = tl.dot(b_p, b_x0, b_acc0, input_precision=PRECISION)
    if D1:
        b_acc1 = tl.dot(b_p, b_x1, b_acc1, input_precision=PRECISION)
    return b_acc0, b_acc1


@triton.jit
def key_blocks(tile_ptr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr):
    """The blocks of keys that a tile of queries sees: with SPLIT, first those that need no mask.

    Blocks without a mask start at the prefix's start and then at the segment's. Masked blocks cover the rest
    of the prefix, then the keys from `rest` on.
    """
    first = tl.load(tile_ptr)
    start = tl.load(tile_ptr + 1)
    end = tl.load(tile_ptr + 2)
    prefix = tl.load(tile_ptr + 3)
    prefix_end = tl.load(tile_ptr + 4)
    rest = start
    key_end = end
    if CAUSAL:
        key_end = tl.minimum(first + BM, end)
    num_prefix = 0
    if SPLIT:
        num_prefix = (prefix_end - prefix) // BN
        # first - start is a multiple of BM, and BM is a multiple of BN
        rest = first if CAUSAL else end - (end - start) % BN
    num_full = num_prefix + (rest - start) // BN
    prefix_rest = prefix + num_prefix * BN
    num_prefix_rest = tl.cdiv(prefix_end - prefix_rest, BN)
    num_rest = num_prefix_rest + tl.cdiv(key_end - rest, BN)
    return (
        first, start, end, prefix, prefix_end, key_end,
        num_prefix, num_full, prefix_rest, num_prefix_rest, rest, num_rest,
    )  # fmt: skip


@triton.jit
def scores(
    b_q0, b_q1, b_k0, b_k1, key, key_end, o_i,
    BN: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """[BM, BN] products of queries and keys, -inf where MASK hides them."""
    b_s = dot_t(b_q0, b_q1, b_k0, b_k1, D1)
    if MASK:
        o_j = key + tl.arange(0, BN)
        m_s = (o_j < key_end)[None, :]
        if CAUSAL:  # a prefix comes before all of its queries, so one rule serves both
            m_s = m_s & (o_j[None, :] <= o_i[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
    return b_s


@triton.jit
def _forward_block(
    b_q0, b_q1, k_ptr, v_ptr, stride_k_t, stride_v_t, key, key_end, o_i, scale_log2,
    b_max, b_sum, b_acc0, b_acc1,
    BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    b_k0, b_k1 = load_rows(k_ptr, key, key_end, stride_k_t, BN, D0, D1, MASK)
    b_s = scores(b_q0, b_q1, b_k0, b_k1, key, key_end, o_i, BN, D1, MASK, CAUSAL)  # [BM, BN]
    # The first block holds a visible key for every row, so this is never -inf - (-inf). [BM]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_keep = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_acc0 = b_acc0 * b_keep[:, None]
    if D1:
        b_acc1 = b_acc1 * b_keep[:, None]
    b_v0, b_v1 = load_rows(v_ptr, key, key_end, stride_v_t, BN, D0, D1, MASK)
    b_acc0, b_acc1 = add_dot(b_acc0, b_acc1, b_p, b_v0, b_v1, D1)
    return b_new, b_sum, b_acc0, b_acc1


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr,
    num_tokens, num_heads, num_shared, scale_log2,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_o_t, stride_o_h,
    D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) // num_heads
    i_h = (tl.program_id(0) % num_heads).to(tl.int64)
    (
        first, start, end, prefix, prefix_end, key_end,
        num_prefix, num_full, prefix_rest, num_prefix_rest, rest, num_rest,
    ) = key_blocks(tile_ptr + i_tile * 5, BM, BN, CAUSAL, SPLIT)  # fmt: skip
    k_ptr += i_h // num_shared * stride_k_h
    v_ptr += i_h // num_shared * stride_v_h
    o_i = first + tl.arange(0, BM)
    # [BM, D0], [BM, D1]
    b_q0, b_q1 = load_rows(q_ptr + i_h * stride_q_h, first, end, stride_q_t, BM, D0, D1, True)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc0 = tl.zeros([BM, D0], tl.float32)
    b_acc1 = 0.0
    if D1:
        b_acc1 = tl.zeros([BM, D1], tl.float32)

    if SPLIT:
        for i_n in tl.range(num_full, disable_licm=True):
            key = tl.where(i_n < num_prefix, prefix + i_n * BN, start + (i_n - num_prefix) * BN)
            b_max, b_sum, b_acc0, b_acc1 = _forward_block(
                b_q0, b_q1, k_ptr, v_ptr, stride_k_t, stride_v_t,
                key, key_end, o_i, scale_log2, b_max, b_sum, b_acc0, b_acc1, BN, D0, D1, False, CAUSAL,
            )  # fmt: skip
    for i_n in tl.range(num_rest, disable_licm=True):
        is_prefix = i_n < num_prefix_rest
        key = tl.where(is_prefix, prefix_rest + i_n * BN, rest + (i_n - num_prefix_rest) * BN)
        block_end = tl.where(is_prefix, prefix_end, key_end)
        b_max, b_sum, b_acc0, b_acc1 = _forward_block(
            b_q0, b_q1, k_ptr, v_ptr, stride_k_t, stride_v_t,
            key, block_end, o_i, scale_log2, b_max, b_sum, b_acc0, b_acc1, BN, D0, D1, True, CAUSAL,
        )  # fmt: skip

    b_acc0 = b_acc0 / b_sum[:, None]
    if D1:
        b_acc1 = b_acc1 / b_sum[:, None]
    store_rows(out_ptr + i_h * stride_o_h, first, end, stride_o_t, b_acc0, b_acc1, BM, D0, D1)
    tl.store(lse_ptr + i_h * num_tokens + o_i, b_max + tl.log2(b_sum), mask=o_i < end)


def find_row(table: Mapping[tuple[str, int], Launch], q_THD: Tensor, kind: str) -> Launch | None:
    """The row for the smallest head size that is at least q's; among equals, the one of q's chip."""
    name = "float32" if q_THD.dtype == torch.float32 else "long" if kind == "long" else "short"
    own = f"{name} sm_{launch.chip_of(q_THD) // 10}x"
    fitting = [(most, kind) for kind, most in table if kind in (name, own) and most >= q_THD.shape[2]]
    if not fitting:
        return None
    most, kind = min(fitting, key=lambda found: (found[0], found[1] == name))
    return table[kind, most]


def choose_row(table: Mapping[tuple[str, int], Launch], q_THD: Tensor, kind: str) -> Launch:
    """The row of a table that has one for all inputs."""
    row = find_row(table, q_THD, kind)
    assert row is not None
    return row


def split_head(head_size: int) -> dict[str, int]:
    """Powers of two that add up to the head size."""
    power = 1 << (head_size.bit_length() - 1)
    return {"D0": power, "D1": head_size - power}


def readable(x: Tensor) -> Tensor:
    """x [T, heads, D], or a copy that kernels can read: heads contiguous, blocks within int32 offsets."""
    return x if x.stride(2) == 1 and x.stride(0) < 2**24 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Each tensor's strides along tokens and heads."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


def forward(q_THD, k_TKD, v_TKD, out_THD, lse_HT, query_tiles, kind, causal, scale):
    """Fill `out` and the base-2 log-sum-exp."""
    (num_tokens, num_heads, head_size), num_shared = q_THD.shape, q_THD.shape[1] // k_TKD.shape[1]
    q, k, v = map(readable, (q_THD, k_TKD, v_TKD))
    row = choose_row(FORWARD, q, kind)
    _forward_kernel[(query_tiles.shape[0] * num_heads,)](
        q, k, v, out_THD, lse_HT, query_tiles,
        num_tokens, num_heads, num_shared, scale * LOG2_E,
        *strides(q, k, v, out_THD),
        **split_head(head_size), CAUSAL=causal, **row.options,
    )  # fmt: skip
