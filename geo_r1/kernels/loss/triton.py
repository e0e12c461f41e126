"""Rows of logits in Triton: statistics, the GRPO loss with its gradient, the gradient alone; see `rows.py`.

A program takes one row. The log-sum-exp is online: one read of the row gives the maximum, the sum of
exp(z - max) and the sum of exp(z - max) (z - max), from which the entropy follows without cancelling. The
powers are of 2, which a GPU computes in one instruction, and whole blocks are read without a mask. So a logit
in bfloat16 takes 12.3 instructions for statistics, 11.6 for the gradient and 21.3 for both on sm_90: fewer
than an H200 issues while it moves the bytes.

Bytes moved for R rows of V logits of b bytes: statistics R V b; the gradient alone 2 R V b; loss and gradient
3 R V b, where the second read comes from L2 if the launch row says so. All arithmetic is in float32.

Source: online softmax, arXiv:1805.02867; the loss, arXiv:2402.03300, see `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from geo_r1.kernels.launch import Launch
from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import SAPO_SATURATED, LossRows, RowLoss

# Largest row in bytes -> how it is read. LOADS: depth of the pipeline; LOADS - 1 blocks are in flight while
# the program works on one. Nothing here was measured. The loss reads a row twice. With one row in flight per
# SM (132 SMs, 300 KB each at V = 152064 in bfloat16: 40 MB) an H200's 60 MB of L2 can hold it until the
# second read; with more it could not. So the launch for large V asks for more than half of an SM's registers.
# Limits are a twentieth above the most that was counted with Triton 3.6, 3.7 and 3.9. With 3.6 the block at
# the end of a large row spills 16 bytes, which fails the gate there.
LOSS_ROWS = {
    1 << 11: Launch("a row is one block", BLOCK_V=1024, LOADS=1, limit=21.6, num_warps=4),
    1 << 16: Launch("rows stay in L2 anyway", BLOCK_V=2048, LOADS=3, limit=27.3, num_warps=8),
    400_000: Launch("one row per SM, 48 KB of it in flight", BLOCK_V=8192, LOADS=4, limit=24.3, num_warps=16),
    1 << 40: Launch("L2 cannot hold even one row per SM", BLOCK_V=2048, LOADS=3, limit=27.3, num_warps=8),
}
# A single pass keeps nothing, so several rows run on an SM, with 8 numbers per thread.
PASS_ROWS = {
    1 << 11: Launch("a row is one block", BLOCK_V=1024, LOADS=1, limit=11.6, num_warps=4),
    1 << 40: Launch("4 rows per SM, 32 KB of them in flight", BLOCK_V=2048, LOADS=3, limit=14.3, num_warps=8),
}

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # below every logit that counts; times the scale it is still finite
LEAST = tl.constexpr(-1000.0)  # exp2 of it is 0

LAUNCHES: tuple[Launch, ...] = (*LOSS_ROWS.values(), *PASS_ROWS.values())


@triton.jit
def _offsets(logits_ptr, BLOCK_V: tl.constexpr):
    """Columns of a block, [groups, VECTOR]: a thread has whole groups, of 16 bytes that lie side by side."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, BLOCK_V // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _add_block(b_x, top, base, total, moment, scale):
    """Sums of each group with one more block; they are relative to 2^base, base = top * scale rounded."""
    b_x = b_x.to(tl.float32)  # [groups, VECTOR]
    top = tl.maximum(top, tl.max(b_x, 1))  # drops a NaN, which reaches the sums by b_x
    new_base = top * scale
    shift = tl.maximum(base - new_base, LEAST)
    decay = tl.math.exp2(shift)
    b_above = _above(b_x, new_base[:, None], scale)
    b_exp = tl.math.exp2(b_above)
    moment = decay * (moment + shift * total) + tl.sum(b_exp * b_above, 1)
    total = decay * total + tl.sum(b_exp, 1)
    return top, new_base, total, moment


@triton.jit
def _above(x, base, scale):
    """x * scale - base with one rounding; -inf becomes LEAST, of which exp2 is 0 and so is the product."""
    return tl.maximum(tl.math.fma(x, scale, -base), LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _statistics(
    p_row, stride_v, target, num_cols, scale, o_v, BLOCK_V: tl.constexpr, LOADS: tl.constexpr
):  # fmt: skip
    """Largest logit, log of the sum relative to it, logp of the target, entropy; zeros without columns.

    Every group of columns has sums of its own, so the loop has no barrier. What it multiplies, it multiplies
    by the rounded base; since all do, the rounding cancels.
    """
    # Loaded before the sums: their barriers keep it ahead of a gradient that is written over the logits. A
    # target out of range gives NaN, not a read outside the row.
    inside = (target >= 0) & (target < num_cols)
    drawn = tl.load(p_row + target * stride_v, mask=inside, other=float("nan")).to(tl.float32)
    top = tl.full([o_v.shape[0]], LOWEST, tl.float32)
    base = top * scale
    total = tl.zeros([o_v.shape[0]], tl.float32)
    moment = tl.zeros([o_v.shape[0]], tl.float32)
    whole = num_cols // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=LOADS):
        b_x = tl.load(p_row + (start + o_v).to(tl.int64) * stride_v)
        top, base, total, moment = _add_block(b_x, top, base, total, moment, scale)
    if whole < num_cols:
        o_rest = whole + o_v
        b_x = tl.load(p_row + o_rest.to(tl.int64) * stride_v, mask=o_rest < num_cols, other=-float("inf"))
        top, base, total, moment = _add_block(b_x, top, base, total, moment, scale)
    row_top = tl.max(top, 0)
    row_base = row_top * scale
    shift = tl.maximum(base - row_base, LEAST)
    decay = tl.math.exp2(shift)
    row_total = tl.sum(decay * total, 0)
    row_moment = tl.sum(decay * (moment + shift * total), 0)
    log_total = tl.math.log2(row_total)
    logp = LN_2 * (tl.math.fma(drawn, scale, -row_base) - log_total)
    entropy = LN_2 * (log_total - row_moment / row_total)
    # relative to the largest logit itself
    log_sum = LN_2 * (log_total - tl.math.fma(row_top, scale, -row_base))
    return row_top, log_sum, logp, entropy


@triton.jit
def _gradient_block(b_logit, o_v, target, base, scale, d_drawn, d_exp, d_above, ENTROPY: tl.constexpr):
    """dlogits of one block: d_drawn (o_v == target) + exp2(z) (d_exp + d_above z), z as in `_above`."""
    if ENTROPY:
        b_above = _above(b_logit.to(tl.float32), base, scale)
        b_d = tl.math.exp2(b_above) * tl.math.fma(b_above, d_above, d_exp)
    else:
        b_d = tl.math.exp2(tl.math.fma(b_logit.to(tl.float32), scale, -base)) * d_exp
    return b_d + tl.where(o_v == target, d_drawn, 0.0)


@triton.jit
def _write_gradient(
    p_row, p_d, stride_v, target, num_cols, cols, top, log_sum, entropy, d_logp, d_entropy,
    scale, inv_temperature, o_v, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """dlogits of a row from its derivatives; a row of which no `cols` count gets zeros and is not read."""
    # (onehot dlogp - p (dlogp + dH (log p + H))) / temperature, where p = exp2(z) / sum
    base = top * scale
    share = inv_temperature * tl.math.exp2(-(log_sum / LN_2 + tl.math.fma(top, scale, -base)))
    d_drawn = d_logp * inv_temperature
    d_exp = -share * d_logp
    d_above = 0.0
    if ENTROPY:
        d_exp -= share * d_entropy * (entropy - log_sum - LN_2 * tl.math.fma(top, scale, -base))
        d_above = -share * d_entropy * LN_2
    column = tl.where((target >= 0) & (target < num_cols), target, -1).to(tl.int32)
    whole = num_cols // BLOCK_V * BLOCK_V
    dtype = p_d.dtype.element_ty
    if cols > 0:
        for start in tl.range(0, whole, BLOCK_V, num_stages=LOADS):
            b_logit = tl.load(p_row + (start + o_v).to(tl.int64) * stride_v)
            b_d = _gradient_block(b_logit, o_v, column - start, base, scale, d_drawn, d_exp, d_above, ENTROPY)
            tl.store(p_d + start + o_v, b_d.to(dtype))
    else:
        for start in tl.range(0, whole, BLOCK_V):
            tl.store(p_d + start + o_v, tl.zeros(o_v.shape, dtype))
    if whole < num_cols:
        o_rest = whole + o_v
        b_logit = tl.load(p_row + o_rest.to(tl.int64) * stride_v, mask=o_rest < cols, other=0.0)
        b_d = _gradient_block(b_logit, o_rest, column, base, scale, d_drawn, d_exp, d_above, ENTROPY)
        tl.store(p_d + o_rest, tl.where(cols > 0, b_d, 0.0).to(dtype), mask=o_rest < num_cols)


@triton.jit
def _expm1_less(d):
    """exp(d) - 1 - d without cancelling: for |d| < 1/4 a series with a relative error of 1e-8."""
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040))))))
    return tl.where(tl.abs(d) < 0.25, series, tl.exp(d) - 1 - d)


@triton.jit
def _policy(
    logp, ratio, advantage, epsilon, clip_high, delta, tau_pos, tau_neg,
    POLICY: tl.constexpr, HAS_DELTA: tl.constexpr, SATURATED: tl.constexpr,
):  # fmt: skip
    """Policy term, its derivative in logp, whether a bound removed the gradient: `reference._policy_term`."""
    if POLICY == "cispo":
        c = tl.where(ratio > clip_high, clip_high, ratio)
        term = -c * advantage * logp
        d_term = -c * advantage
        clipped = (ratio > clip_high) & (advantage > 0)
    elif POLICY == "sapo":
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        bound = 1 + SATURATED / tau
        held = ratio > bound
        gate = 1 / (1 + tl.exp(-tau * (tl.where(held, bound, ratio) - 1)))
        term = -advantage * gate * 4 / tau
        d_term = -advantage * 4 * gate * (1 - gate) * tl.where(held, 0.0, ratio)
        clipped = advantage != advantage  # never clipped, in the shape of the others
    else:
        low = 1 - epsilon
        high = 1 + clip_high
        # `where` keeps a NaN ratio; minimum and maximum may drop it.
        bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        unbounded = ratio
        if HAS_DELTA:
            unbounded = tl.where(ratio > delta, delta, ratio)
        chosen = tl.where(unbounded * advantage <= bounded * advantage, unbounded, bounded)
        held = (chosen < ratio) | (chosen > ratio)
        term = -chosen * advantage
        d_term = -tl.where(held, 0.0, ratio) * advantage
        clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    return term, d_term, clipped


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, logp_ptr, entropy_ptr, lse_ptr,
    num_cols, stride_r, stride_v, inv_temperature,
    BLOCK_V: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_r)
    p_row = logits_ptr + i_r * stride_r
    o_v = _offsets(logits_ptr, BLOCK_V)
    top, log_sum, logp, entropy = _statistics(
        p_row, stride_v, target, num_cols, inv_temperature / LN_2, o_v, BLOCK_V, LOADS
    )
    tl.store(logp_ptr + i_r, logp)
    tl.store(entropy_ptr + i_r, entropy)
    tl.store(lse_ptr + 2 * i_r, top)
    tl.store(lse_ptr + 2 * i_r + 1, log_sum)


@triton.jit
def _loss_kernel(
    # logits, and where their gradient goes: the same rows, for a gradient in place
    logits_ptr, d_logits_ptr,
    # rows, in
    target_ptr, advantage_ptr, weight_ptr, old_ptr, ref_ptr, importance_ptr,
    # rows, out
    loss_ptr, d_logp_ptr, d_entropy_ptr, kl_ptr, ratio_ptr, clipped_ptr, logp_ptr, entropy_ptr, lse_ptr,
    # shapes and strides
    num_cols, stride_r, stride_v, d_stride_r,
    # options
    inv_temperature, epsilon, clip_high, delta, tau_pos, tau_neg, beta, entropy_coef,
    POLICY: tl.constexpr, KL: tl.constexpr, HAS_DELTA: tl.constexpr, SATURATED: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_r)
    weight = tl.load(weight_ptr + i_r).to(tl.float32)
    kept = weight != 0
    # A row of weight zero counts as having no columns, so none of it is read, whatever it holds.
    cols = tl.where(kept, num_cols, 0)
    p_row = logits_ptr + i_r * stride_r
    o_v = _offsets(logits_ptr, BLOCK_V)
    scale = inv_temperature / LN_2
    top, log_sum, logp, entropy = _statistics(p_row, stride_v, target, cols, scale, o_v, BLOCK_V, LOADS)

    advantage = tl.load(advantage_ptr + i_r).to(tl.float32)
    ratio = 1.0
    if HAS_OLD:
        ratio = tl.exp(logp - tl.load(old_ptr + i_r).to(tl.float32))
    term, d_logp, clipped = _policy(
        logp, ratio, advantage, epsilon, clip_high, delta, tau_pos, tau_neg, POLICY, HAS_DELTA, SATURATED
    )
    if HAS_IMPORTANCE:
        importance = tl.load(importance_ptr + i_r).to(tl.float32)
        term *= importance
        d_logp *= importance
    kl = 0.0
    if HAS_REF:
        d = tl.load(ref_ptr + i_r).to(tl.float32) - logp
        if KL == "k1":
            kl = -d
            d_kl = 1.0
        elif KL == "k2":
            kl = d * d / 2
            d_kl = -d
        else:
            kl = _expm1_less(d)
            d_kl = tl.where(tl.abs(d) < 0.25, -(kl + d), 1 - tl.exp(d))  # -expm1(d), also where d is -inf
        if beta != 0:
            term += beta * kl
            d_logp += beta * d_kl
    if ENTROPY:
        term -= entropy_coef * entropy
    d_logp = tl.where(kept, weight * d_logp, 0.0)
    d_entropy = -entropy_coef * weight

    tl.store(loss_ptr + i_r, tl.where(kept, weight * term, 0.0))
    tl.store(d_logp_ptr + i_r, d_logp)
    tl.store(d_entropy_ptr + i_r, d_entropy)
    tl.store(kl_ptr + i_r, tl.where(kept, kl, 0.0))
    tl.store(ratio_ptr + i_r, tl.where(kept, ratio, 1.0))
    tl.store(clipped_ptr + i_r, (kept & clipped).to(tl.int8))
    tl.store(logp_ptr + i_r, tl.where(kept, logp, 0.0))
    tl.store(entropy_ptr + i_r, tl.where(kept, entropy, 0.0))
    tl.store(lse_ptr + 2 * i_r, tl.where(kept, top, 0.0))
    tl.store(lse_ptr + 2 * i_r + 1, tl.where(kept, log_sum, 0.0))

    if GRADIENT:
        _write_gradient(
            p_row, d_logits_ptr + i_r * d_stride_r, stride_v, target, num_cols, cols, top, log_sum,
            entropy, d_logp, d_entropy, scale, inv_temperature, o_v, ENTROPY, BLOCK_V, LOADS,
        )  # fmt: skip


@triton.jit
def _gradient_kernel(
    logits_ptr, d_logits_ptr, target_ptr, lse_ptr, entropy_ptr, d_logp_ptr, d_entropy_ptr, d_loss_ptr,
    num_cols, stride_r, stride_v, d_stride_r, inv_temperature,
    HAS_D_LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_r)
    top = tl.load(lse_ptr + 2 * i_r)
    log_sum = tl.load(lse_ptr + 2 * i_r + 1)
    entropy = tl.load(entropy_ptr + i_r)
    d_logp = tl.load(d_logp_ptr + i_r)
    d_entropy = 0.0
    active = d_logp != 0
    if ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + i_r)
        active |= d_entropy != 0
    if HAS_D_LOSS:
        d_loss = tl.load(d_loss_ptr)
        d_logp *= d_loss
        d_entropy *= d_loss
    _write_gradient(
        logits_ptr + i_r * stride_r, d_logits_ptr + i_r * d_stride_r, stride_v, target, num_cols,
        tl.where(active, num_cols, 0), top, log_sum, entropy, d_logp, d_entropy,
        inv_temperature / LN_2, inv_temperature, _offsets(logits_ptr, BLOCK_V), ENTROPY, BLOCK_V, LOADS,
    )  # fmt: skip


def row_statistics(logits_RV, target_R, temperature, logp_R, entropy_R, lse_R2):
    _statistics_kernel[(len(logits_RV),)](
        logits_RV, target_R, logp_R, entropy_R, lse_R2,
        logits_RV.shape[1], *logits_RV.stride(), 1 / temperature, **_row(PASS_ROWS, logits_RV),
    )  # fmt: skip


def grpo_row_loss(logits_RV, target_R, rows, config, terms, logp_R, entropy_R, lse_R2, d_logits_RV):
    *floats_R, clipped_R = terms
    _loss_kernel[(len(logits_RV),)](
        logits_RV, d_logits_RV,
        target_R, *rows[:5],
        *floats_R, clipped_R.view(torch.int8), logp_R, entropy_R, lse_R2,
        logits_RV.shape[1], *logits_RV.stride(), 0 if d_logits_RV is None else d_logits_RV.stride(0),
        1 / config.temperature, config.epsilon, config.clip_high, config.delta or 0.0,
        config.sapo_temperature_pos, config.sapo_temperature_neg, config.beta, config.entropy_coef,
        POLICY=config.policy, KL=config.kl_estimator, HAS_DELTA=config.delta is not None,
        SATURATED=SAPO_SATURATED, HAS_OLD=rows.old_logp_R is not None,
        HAS_REF=rows.ref_logp_R is not None,
        HAS_IMPORTANCE=rows.importance_weight_R is not None,
        ENTROPY=config.entropy_coef != 0,
        GRADIENT=d_logits_RV is not None, **_row(LOSS_ROWS, logits_RV),
    )  # fmt: skip


def logit_gradient(
    logits_RV, target_R, temperature, lse_R2, entropy_R, d_logp_R, d_entropy_R, d_loss, out_RV
):
    _gradient_kernel[(len(logits_RV),)](
        logits_RV, out_RV, target_R, lse_R2, entropy_R, d_logp_R, d_entropy_R, d_loss,
        logits_RV.shape[1], *logits_RV.stride(), out_RV.stride(0), 1 / temperature,
        HAS_D_LOSS=d_loss is not None, ENTROPY=d_entropy_R is not None, **_row(PASS_ROWS, logits_RV),
    )  # fmt: skip


def _row(table: dict[int, Launch], logits_RV: Tensor) -> dict[str, int]:
    row_bytes = logits_RV.shape[1] * logits_RV.element_size()
    return next(row.options for most, row in table.items() if row_bytes <= most)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel in every row of its table: each dtype once, each option that changes the code once."""
    plain = GRPOLossConfig()
    full = GRPOLossConfig(beta=0.1, entropy_coef=0.1, delta=2.0)
    options = {
        "clip": plain,
        "clip, all options": full,
        "cispo, k1": GRPOLossConfig(policy="cispo", epsilon_high=5.0, beta=0.1, kl_estimator="k1"),
        "sapo, k2": GRPOLossConfig(policy="sapo", beta=0.1, kl_estimator="k2"),
    }
    row, lse, target = torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    terms = RowLoss(row, row, row, row, row, torch.zeros(2, dtype=torch.bool))
    for dtype, vocabs in (
        (torch.bfloat16, (512, 16384, 152064, 151674)),
        (torch.float32, (512, 16384, 152064)),
    ):
        for vocab in vocabs:
            stride_r = -(-vocab // 32) * 32  # 151674 is no multiple of 16: padded, as in `chunks.py`
            logits = torch.zeros(2, stride_r, dtype=dtype)[:, :vocab]
            label = f"V {vocab} {str(dtype).removeprefix('torch.')}"
            yield f"statistics, {label}", partial(row_statistics, logits, target, 1.0, row, row, lse)
            gradient = partial(logit_gradient, logits, target, 1.0, lse, row, row, row, row[0], logits)
            yield f"gradient, {label}", gradient
            # The policies differ in a row's few numbers, beside which a block of logits is large.
            chosen = (
                options
                if vocab == 152064
                else {name: options[name] for name in ("clip", "clip, all options")}
            )
            for name, config in chosen.items():
                extra = None if config is plain else row
                rows = LossRows(row, row, extra, extra, extra, None)
                loss = partial(grpo_row_loss, logits, target, rows, config, terms, row, row, lse, logits)
                yield f"loss, {name}, {label}", loss
