"""Rows of logits by the CUDA kernels of csrc/grpo_loss.cu; the functions of `triton`, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from geo_r1.kernels.extension import launch
from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import SAPO_SATURATED, LossRows, RowLoss


def row_statistics(logits_RV: Tensor, target_R: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logp_R, entropy_R, lse_R2 in one read of the logits; see `triton.row_statistics`."""
    logp_R, entropy_R = (_new_row(logits_RV) for _ in range(2))
    lse_R2 = _new_row(logits_RV, 2)
    launch(
        "row_statistics",
        logits_RV,
        **_logits(logits_RV, target_R, temperature),
        logp=logp_R,
        entropy=entropy_R,
        lse=lse_R2,
    )
    return logp_R, entropy_R, lse_R2


def grpo_row_loss(
    logits_RV: Tensor,
    target_R: Tensor,
    rows: LossRows,
    config: GRPOLossConfig,
    d_logits_RV: Tensor | None = None,
) -> tuple[RowLoss, Tensor, Tensor, Tensor]:
    """The formula for ratios per token, straight from logits; see `reference.grpo_row_loss`.

    Args:
        d_logits_RV: [R, V], filled with the gradient if given, last stride 1; may be the logits themselves.

    Returns:
        RowLoss, logp_R, entropy_R, lse_R2.
    """
    loss_R, d_logp_R, d_entropy_R, kl_R, ratio_R, logp_R, entropy_R = (_new_row(logits_RV) for _ in range(7))
    lse_R2 = _new_row(logits_RV, 2)
    clipped_R = _new_row(logits_RV, dtype=torch.bool)
    launch(
        "grpo_row_loss",
        logits_RV,
        **_logits(logits_RV, target_R, config.temperature),
        advantage=_row(rows.advantage_R),
        token_weight=_row(rows.token_weight_R),
        old_logp=_row(rows.old_logp_R),
        ref_logp=_row(rows.ref_logp_R),
        importance_weight=_row(rows.importance_weight_R),
        loss=loss_R,
        d_logp=d_logp_R,
        d_entropy=d_entropy_R,
        kl=kl_R,
        ratio=ratio_R,
        clipped=clipped_R,
        logp=logp_R,
        entropy=entropy_R,
        lse=lse_R2,
        d_logits=d_logits_RV,
        d_stride_r=0 if d_logits_RV is None else d_logits_RV.stride(0),
        policy=config.policy,
        kl_estimator=config.kl_estimator,
        has_delta=config.delta is not None,
        epsilon=config.epsilon,
        clip_high=config.clip_high,
        delta=config.delta or 0.0,
        tau_pos=config.sapo_temperature_pos,
        tau_neg=config.sapo_temperature_neg,
        sapo_saturated=SAPO_SATURATED,
        beta=config.beta,
        entropy_coef=config.entropy_coef,
    )
    terms = RowLoss(loss_R, d_logp_R, d_entropy_R, kl_R, ratio_R, clipped_R)
    return terms, logp_R, entropy_R, lse_R2


def logit_gradient(
    logits_RV: Tensor,
    target_R: Tensor,
    lse_R2: Tensor,
    entropy_R: Tensor,
    d_logp_R: Tensor,
    d_entropy_R: Tensor | None,
    temperature: float,
    *,
    d_loss: Tensor | None = None,
    out_RV: Tensor | None = None,
) -> Tensor:
    """dlogits from the rows' derivatives, times the scalar `d_loss`; `out_RV` may be the logits themselves.

    See `reference.logit_gradient`.
    """
    out_RV = logits_RV.new_empty(logits_RV.shape) if out_RV is None else out_RV
    launch(
        "logit_gradient",
        logits_RV,
        **_logits(logits_RV, target_R, temperature),
        lse=lse_R2,
        entropy=_row(entropy_R),
        d_logp=_row(d_logp_R),
        d_entropy=_row(d_entropy_R),
        d_loss=_row(d_loss),
        d_logits=out_RV,
        d_stride_r=out_RV.stride(0),
    )
    return out_RV


def _logits(
    logits_RV: Tensor, target_R: Tensor, temperature: float
) -> dict[str, Tensor | torch.dtype | float]:
    """What every launcher is told of the logits."""
    return {
        "dtype": logits_RV.dtype,
        "logits": logits_RV,
        "target": target_R.contiguous(),
        "num_rows": logits_RV.shape[0],
        "num_cols": logits_RV.shape[1],
        "stride_r": logits_RV.stride(0),
        "stride_v": logits_RV.stride(1),
        "inv_temperature": 1 / temperature,
    }


def _row(row_R: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if row_R is None else row_R.float().contiguous()


def _new_row(logits_RV: Tensor, *more: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape[0], *more, dtype=dtype)
