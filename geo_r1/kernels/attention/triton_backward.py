"""Packed attention backward in Triton: dq by tiles of queries, dk and dv by tiles of keys; windows in one.

    p_ij = exp(s_ij - lse_i),   delta_i = dout_i . out_i,   ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dout_i

The program for a tile of keys reads the one range of queries that see it. So it sums a prompt's gradients
over its completions in registers, in a fixed order, without atomics. The dq kernel runs first and stores
delta.

Operations: 14 D per visible pair and head; scores and dout . v are computed twice. Bytes: q, k, v, out, dout
and the gradients once, k and v once more per tile of queries, q and dout once more per tile of keys. If query
heads share a key head, dk and dv of each query head are written and read again.

A window, a segment of up to 64 tokens that no other sees, is one tile of queries and of keys: one program
computes its three gradients. Operations: 10 D per pair. Bytes: eight tensors instead of twelve, which bind.

Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from geo_r1.kernels.attention.triton_forward import (
    LOG2_E,
    add_dot,
    choose_row,
    dot_t,
    find_row,
    key_blocks,
    load_rows,
    readable,
    scores,
    split_head,
    store_rows,
    strides,
)
from geo_r1.kernels.launch import Launch

# The widest tiles that do not spill; see FORWARD for how to read the reasons.
D_QUERY = {
    ("long", 64): Launch("127/187", BM=128, BN=64, SPLIT=0, limit=14.3, num_warps=8, num_stages=2),
    ("long", 128): Launch(
        "177/198; 128 queries per program read half as many keys as 64",
        BM=128,
        BN=32,
        SPLIT=1,
        limit=19,
        num_warps=8,
        num_stages=2,
    ),
    ("short", 128): Launch(
        "193/229; 64 keys spill on sm_80 from D = 80",
        BM=64,
        BN=32,
        SPLIT=0,
        limit=27.9,
        num_warps=4,
        num_stages=2,
    ),
    ("float32", 64): Launch("255/253", BM=32, BN=32, SPLIT=0, num_warps=8),
    ("float32", 128): Launch(
        "254/255; more rows and, on sm_100, one stage spill",
        BM=16,
        BN=16,
        SPLIT=0,
        num_warps=8,
        num_stages=2,
    ),
    ("short sm_8x", 96): Launch("238; two stages spill with Triton 3.9", BM=64, BN=32, SPLIT=0, num_warps=4),
    ("short sm_12x", 128): Launch(
        "222; two stages spill with Triton 3.9", BM=64, BN=32, SPLIT=0, num_warps=4
    ),
    ("long sm_12x", 64): Launch(
        "137; 64 keys spill with Triton 3.9", BM=128, BN=32, SPLIT=0, num_warps=8, num_stages=2
    ),
    ("float32 sm_12x", 64): Launch("161; 32 keys spill", BM=32, BN=16, SPLIT=0, num_warps=8),
    ("float32 sm_12x", 80): Launch(
        "255; 11 other tiles spill more", BM=16, BN=16, SPLIT=0, num_warps=4, stack=8
    ),
}
# BM queries at a time for BN keys.
D_KEY = {
    ("long", 80): Launch("168/255", BM=32, BN=128, limit=23.7, num_warps=8, num_stages=2),
    ("long", 96): Launch(
        "194/255; two stages spill on sm_80", BM=32, BN=128, limit=25, num_warps=8, num_stages=3
    ),
    ("long", 128): Launch(
        "230/255; 64 queries spill on both", BM=32, BN=128, limit=23.7, num_warps=8, num_stages=2
    ),
    ("short", 96): Launch("209/255", BM=32, BN=64, limit=25.7, num_warps=4, num_stages=2),
    ("short", 128): Launch("240/255; two stages spill on sm_80", BM=32, BN=64, limit=22.7, num_warps=4),
    ("float32", 64): Launch("176/176", BM=16, BN=32, num_warps=8),
    ("float32", 80): Launch("255/255; one stage spills", BM=16, BN=16, num_warps=8, num_stages=2),
    ("float32", 128): Launch("192/194; more rows spill", BM=16, BN=16, num_warps=8),
    ("float32 sm_10x", 80): Launch(
        "255; 4 other tiles spill more", BM=16, BN=32, num_warps=8, num_stages=2, stack=16
    ),
    ("float32 sm_12x", 80): Launch(
        "255; 9 other tiles spill more", BM=16, BN=32, num_warps=8, num_stages=2, stack=24
    ),
    ("short sm_8x", 128): Launch("249; 32 queries spill on sm_86", BM=16, BN=64, num_warps=4, num_stages=2),
    ("short sm_10x", 128): Launch("114; 32 queries spill", BM=16, BN=64, num_warps=4, num_stages=2),
    ("short sm_12x", 96): Launch("174; 32 queries spill", BM=16, BN=64, num_warps=4, num_stages=2),
    ("long sm_8x", 96): Launch("241; 128 keys spill on sm_86", BM=32, BN=64, num_warps=8, num_stages=2),
    ("long sm_12x", 96): Launch("228; 128 keys spill", BM=32, BN=64, num_warps=8, num_stages=2),
    ("long sm_12x", 128): Launch("170; 128 keys spill", BM=32, BN=64, num_warps=8, num_stages=2),
}
# A window's queries and keys. In float32 windows take the two kernels above.
D_WINDOW = {
    ("short", 128): Launch(
        "up to D = 96 90 to 155/83 to 255, three windows per SM on sm_90; then 198/198, two; of 8 warps one",
        BM=64,
        num_warps=4,
    )
}


@triton.jit
def _d_query_block(
    b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, k_ptr, v_ptr, stride_k_t, stride_v_t, key, key_end, o_i,
    scale_log2, b_dq0, b_dq1,
    BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq of one block of keys, without its scale."""
    b_k0, b_k1 = load_rows(k_ptr, key, key_end, stride_k_t, BN, D0, D1, MASK)
    b_v0, b_v1 = load_rows(v_ptr, key, key_end, stride_v_t, BN, D0, D1, MASK)
    b_s = scores(b_q0, b_q1, b_k0, b_k1, key, key_end, o_i, BN, D1, MASK, CAUSAL)  # [BM, BN]
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_ds = b_p * (dot_t(b_do0, b_do1, b_v0, b_v1, D1) - b_delta[:, None])
    return add_dot(b_dq0, b_dq1, b_ds, b_k0, b_k1, D1)


@triton.jit
def _d_query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dq_ptr, delta_ptr, tile_ptr,
    num_tokens, num_heads, num_shared, scale, scale_log2,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_o_t, stride_o_h,
    stride_do_t, stride_do_h, stride_dq_t, stride_dq_h,
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
    b_do0, b_do1 = load_rows(do_ptr + i_h * stride_do_h, first, end, stride_do_t, BM, D0, D1, True)
    b_o0, b_o1 = load_rows(out_ptr + i_h * stride_o_h, first, end, stride_o_t, BM, D0, D1, True)
    b_delta = tl.sum(b_do0.to(tl.float32) * b_o0.to(tl.float32), 1)  # [BM]
    if D1:
        b_delta += tl.sum(b_do1.to(tl.float32) * b_o1.to(tl.float32), 1)
    tl.store(delta_ptr + i_h * num_tokens + o_i, b_delta, mask=o_i < end)
    b_q0, b_q1 = load_rows(q_ptr + i_h * stride_q_h, first, end, stride_q_t, BM, D0, D1, True)
    b_lse = tl.load(lse_ptr + i_h * num_tokens + o_i, mask=o_i < end, other=0.0)
    b_dq0 = tl.zeros([BM, D0], tl.float32)
    b_dq1 = 0.0
    if D1:
        b_dq1 = tl.zeros([BM, D1], tl.float32)

    if SPLIT:
        for i_n in tl.range(num_full, disable_licm=True):
            key = tl.where(i_n < num_prefix, prefix + i_n * BN, start + (i_n - num_prefix) * BN)
            b_dq0, b_dq1 = _d_query_block(
                b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, k_ptr, v_ptr, stride_k_t, stride_v_t,
                key, key_end, o_i, scale_log2, b_dq0, b_dq1, BN, D0, D1, False, CAUSAL,
            )  # fmt: skip
    for i_n in tl.range(num_rest, disable_licm=True):
        is_prefix = i_n < num_prefix_rest
        key = tl.where(is_prefix, prefix_rest + i_n * BN, rest + (i_n - num_prefix_rest) * BN)
        block_end = tl.where(is_prefix, prefix_end, key_end)
        b_dq0, b_dq1 = _d_query_block(
            b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, k_ptr, v_ptr, stride_k_t, stride_v_t,
            key, block_end, o_i, scale_log2, b_dq0, b_dq1, BN, D0, D1, True, CAUSAL,
        )  # fmt: skip

    b_dq0 = b_dq0 * scale
    if D1:
        b_dq1 = b_dq1 * scale
    store_rows(dq_ptr + i_h * stride_dq_h, first, end, stride_dq_t, b_dq0, b_dq1, BM, D0, D1)


@triton.jit
def _d_key_block(
    b_k0, b_k1, b_v0, b_v1, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_q_t, stride_do_t, query, query_end, o_j,
    scale_log2, b_dk0, b_dk1, b_dv0, b_dv1,
    BM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk, without its scale, and dv of one block of queries.

    Queries past the end are zeros and add zeros. Rows of keys past the end may overflow but are never stored.
    """
    o_i = query + tl.arange(0, BM)
    m_i = o_i < query_end
    b_q0, b_q1 = load_rows(q_ptr, query, query_end, stride_q_t, BM, D0, D1, True)
    b_s = dot_t(b_k0, b_k1, b_q0, b_q1, D1)  # [BN, BM]
    if CAUSAL:
        b_s = tl.where(o_j[:, None] <= o_i[None, :], b_s, float("-inf"))
    b_lse = tl.load(lse_ptr + o_i, mask=m_i, other=0.0)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    b_do0, b_do1 = load_rows(do_ptr, query, query_end, stride_do_t, BM, D0, D1, True)
    b_dv0, b_dv1 = add_dot(b_dv0, b_dv1, b_p, b_do0, b_do1, D1)
    b_delta = tl.load(delta_ptr + o_i, mask=m_i, other=0.0)
    b_ds = b_p * (dot_t(b_v0, b_v1, b_do0, b_do1, D1) - b_delta[None, :])
    b_dk0, b_dk1 = add_dot(b_dk0, b_dk1, b_ds, b_q0, b_q1, D1)
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit
def _d_key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tile_ptr,
    num_tokens, num_heads, num_shared, scale, scale_log2,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) // num_heads
    i_h = (tl.program_id(0) % num_heads).to(tl.int64)
    first = tl.load(tile_ptr + i_tile * 4)
    end = tl.load(tile_ptr + i_tile * 4 + 1)
    query_end = tl.load(tile_ptr + i_tile * 4 + 3)
    q_ptr += i_h * stride_q_h
    do_ptr += i_h * stride_do_h
    lse_ptr += i_h * num_tokens
    delta_ptr += i_h * num_tokens
    i_k = i_h // num_shared
    o_j = first + tl.arange(0, BN)
    # [BN, D0], [BN, D1]
    b_k0, b_k1 = load_rows(k_ptr + i_k * stride_k_h, first, end, stride_k_t, BN, D0, D1, True)
    b_v0, b_v1 = load_rows(v_ptr + i_k * stride_v_h, first, end, stride_v_t, BN, D0, D1, True)
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    b_dv0 = tl.zeros([BN, D0], tl.float32)
    b_dk1 = 0.0
    b_dv1 = 0.0
    if D1:
        b_dk1 = tl.zeros([BN, D1], tl.float32)
        b_dv1 = tl.zeros([BN, D1], tl.float32)

    start = tl.load(tile_ptr + i_tile * 4 + 2)
    if CAUSAL:
        start = first
    for query in range(start, query_end, BM):
        b_dk0, b_dk1, b_dv0, b_dv1 = _d_key_block(
            b_k0, b_k1, b_v0, b_v1, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_q_t, stride_do_t,
            query, query_end, o_j, scale_log2, b_dk0, b_dk1, b_dv0, b_dv1, BM, D0, D1, CAUSAL,
        )  # fmt: skip

    b_dk0 = b_dk0 * scale
    if D1:
        b_dk1 = b_dk1 * scale
    store_rows(dk_ptr + i_h * stride_dk_h, first, end, stride_dk_t, b_dk0, b_dk1, BN, D0, D1)
    store_rows(dv_ptr + i_h * stride_dv_h, first, end, stride_dv_t, b_dv0, b_dv1, BN, D0, D1)


@triton.jit
def _d_window_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, tile_ptr,
    num_tokens, num_heads, num_shared, scale, scale_log2,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_o_t, stride_o_h,
    stride_do_t, stride_do_h, stride_dq_t, stride_dq_h, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) // num_heads
    i_h = (tl.program_id(0) % num_heads).to(tl.int64)
    i_k = i_h // num_shared
    first = tl.load(tile_ptr + i_tile * 5)
    end = tl.load(tile_ptr + i_tile * 5 + 2)
    o_i = first + tl.arange(0, BM)
    # [BM, D0], [BM, D1]; tokens past the end are zeros, so as queries they add nothing
    b_q0, b_q1 = load_rows(q_ptr + i_h * stride_q_h, first, end, stride_q_t, BM, D0, D1, True)
    b_k0, b_k1 = load_rows(k_ptr + i_k * stride_k_h, first, end, stride_k_t, BM, D0, D1, True)
    b_do0, b_do1 = load_rows(do_ptr + i_h * stride_do_h, first, end, stride_do_t, BM, D0, D1, True)
    b_o0, b_o1 = load_rows(out_ptr + i_h * stride_o_h, first, end, stride_o_t, BM, D0, D1, True)
    b_v0, b_v1 = load_rows(v_ptr + i_k * stride_v_h, first, end, stride_v_t, BM, D0, D1, True)
    b_lse = tl.load(lse_ptr + i_h * num_tokens + o_i, mask=o_i < end, other=0.0)
    b_delta = tl.sum(b_do0.to(tl.float32) * b_o0.to(tl.float32), 1)  # [BM]
    if D1:
        b_delta += tl.sum(b_do1.to(tl.float32) * b_o1.to(tl.float32), 1)

    b_s = scores(b_q0, b_q1, b_k0, b_k1, first, end, o_i, BM, D1, True, CAUSAL)  # [queries, keys]
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_ds = b_p * (dot_t(b_do0, b_do1, b_v0, b_v1, D1) - b_delta[:, None])
    b_0 = tl.zeros([BM, D0], tl.float32)
    b_1 = 0.0
    if D1:
        b_1 = tl.zeros([BM, D1], tl.float32)
    b_dv0, b_dv1 = add_dot(b_0, b_1, tl.trans(b_p), b_do0, b_do1, D1)
    store_rows(dv_ptr + i_h * stride_dv_h, first, end, stride_dv_t, b_dv0, b_dv1, BM, D0, D1)
    b_dk0, b_dk1 = add_dot(b_0, b_1, tl.trans(b_ds), b_q0, b_q1, D1)
    b_dk0 = b_dk0 * scale
    if D1:
        b_dk1 = b_dk1 * scale
    store_rows(dk_ptr + i_h * stride_dk_h, first, end, stride_dk_t, b_dk0, b_dk1, BM, D0, D1)
    b_dq0, b_dq1 = add_dot(b_0, b_1, b_ds, b_k0, b_k1, D1)
    b_dq0 = b_dq0 * scale
    if D1:
        b_dq1 = b_dq1 * scale
    store_rows(dq_ptr + i_h * stride_dq_h, first, end, stride_dq_t, b_dq0, b_dq1, BM, D0, D1)


def backward(
    d_out_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, dq_THD, dk_THD, dv_THD,
    d_query_tiles, key_tiles, kind, causal, scale,
):  # fmt: skip
    """Fill dq, and dk and dv of every query head."""
    (num_tokens, num_heads, head_size), num_shared = q_THD.shape, q_THD.shape[1] // k_TKD.shape[1]
    q, k, v, do = map(readable, (q_THD, k_TKD, v_TKD, d_out_THD))
    sizes = (num_tokens, num_heads, num_shared, scale, scale * LOG2_E)
    constants = {**split_head(head_size), "CAUSAL": causal}
    if kind == "windows" and (row := find_row(D_WINDOW, q, kind)):
        _d_window_kernel[(d_query_tiles.shape[0] * num_heads,)](
            q, k, v, out_THD, do, lse_HT, dq_THD, dk_THD, dv_THD, d_query_tiles, *sizes,
            *strides(q, k, v, out_THD, do, dq_THD, dk_THD, dv_THD),
            **constants, **row.options,
        )  # fmt: skip
        return
    delta_HT = torch.empty_like(lse_HT)
    _d_query_kernel[(d_query_tiles.shape[0] * num_heads,)](
        q, k, v, out_THD, do, lse_HT, dq_THD, delta_HT, d_query_tiles, *sizes,
        *strides(q, k, v, out_THD, do, dq_THD),
        **constants, **choose_row(D_QUERY, q, kind).options,
    )  # fmt: skip
    _d_key_kernel[(key_tiles.shape[0] * num_heads,)](
        q, k, v, do, lse_HT, delta_HT, dk_THD, dv_THD, key_tiles, *sizes,
        *strides(q, k, v, do, dk_THD, dv_THD),
        **constants, **choose_row(D_KEY, q, kind).options,
    )  # fmt: skip
