"""Rows of logits by the CUDA kernels of csrc/grpo_loss.cu; the arguments are those of `rows.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geo_r1.kernels.extension import launch
from geo_r1.kernels.loss.reference import SAPO_SATURATED


def row_statistics(logits_RV, target_R, temperature, logp_R, entropy_R, lse_R2):
    inputs = _logits(logits_RV, target_R, temperature)
    launch("row_statistics", logits_RV, **inputs, logp=logp_R, entropy=entropy_R, lse=lse_R2)


def grpo_row_loss(logits_RV, target_R, rows, config, terms, logp_R, entropy_R, lse_R2, d_logits_RV):
    launch(
        "grpo_row_loss",
        logits_RV,
        **_logits(logits_RV, target_R, config.temperature),
        **{name.removesuffix("_R"): row_R for name, row_R in zip(rows._fields[:5], rows[:5], strict=True)},
        **{name.removesuffix("_R"): row_R for name, row_R in terms._asdict().items()},
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


def logit_gradient(
    logits_RV, target_R, temperature, lse_R2, entropy_R, d_logp_R, d_entropy_R, d_loss, out_RV
):
    launch(
        "logit_gradient",
        logits_RV,
        **_logits(logits_RV, target_R, temperature),
        lse=lse_R2,
        entropy=entropy_R,
        d_logp=d_logp_R,
        d_entropy=d_entropy_R,
        d_loss=d_loss,
        d_logits=out_RV,
        d_stride_r=out_RV.stride(0),
    )


def _logits(logits_RV: Tensor, target_R: Tensor, temperature: float) -> dict[str, Any]:
    """Arguments of every launcher."""
    return {
        "dtype": logits_RV.dtype,
        "logits": logits_RV,
        "target": target_R,
        "num_rows": logits_RV.shape[0],
        "num_cols": logits_RV.shape[1],
        "stride_r": logits_RV.stride(0),
        "stride_v": logits_RV.stride(1),
        "inv_temperature": 1 / temperature,
    }
