"""Checks of the losses' inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import LossRows

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise ValueError unless `matrix` is 2-D, its last dimension not empty, of a dtype that losses take."""
    if matrix.dim() != 2 or matrix.shape[1] == 0 or matrix.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: expected two dimensions, the last not empty, of float16, bfloat16, float32 or float64, "
            f"got {list(matrix.shape)} {matrix.dtype}"
        )


def check_row(name: str, row_R: Tensor, like: Tensor, *, integer: bool = False) -> None:
    """Raise ValueError unless `row_R` holds one value for each row of `like`, on its device."""
    dtype_ok = row_R.dtype == torch.int64 if integer else row_R.dtype in FLOAT_DTYPES
    if list(row_R.shape) != [like.shape[0]] or not dtype_ok:
        raise ValueError(
            f"{name}: expected [{like.shape[0]}] {'int64' if integer else 'floating'}, "
            f"got {list(row_R.shape)} {row_R.dtype}"
        )
    if row_R.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got {row_R.device}")


def check_target(target_R: Tensor, like: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless targets are [R] int64 and, if they are on the CPU, in [0, V)."""
    check_row("target_R", target_R, like, integer=True)
    if target_R.device.type == "cpu" and target_R.numel() and not torch.compiler.is_compiling():
        outside = (target_R < 0) | (target_R >= vocab_size)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target_R: expected values in [0, {vocab_size}), got {int(target_R[row])} at row {row}"
            )


def check_rows(
    like: Tensor, target_R: Tensor, vocab_size: int, config: GRPOLossConfig, rows: LossRows
) -> None:
    """Raise ValueError unless the rows of a GRPO loss fit `like` [R, *] and the options."""
    check_target(target_R, like, vocab_size)
    for name, row_R in zip(LossRows._fields, rows, strict=True):
        if row_R is not None:
            check_row(name, row_R, like, integer=name == "sequence_R")
    if config.needs_sequences and rows.sequence_R is None:
        option = config.importance_sampling_level
        reason = f"importance_sampling_level={option!r}" if option != "token" else f"policy={config.policy!r}"
        if option == "token" and config.policy != "vespo":
            reason = f"off_policy_mask_threshold={config.off_policy_mask_threshold}"
        raise ValueError(f"{reason} needs sequence_R, got None")
    if config.beta != 0 and rows.ref_logp_R is None:
        raise ValueError(f"beta={config.beta} needs ref_logp_R, got None")


def check_linear(hidden_RC: Tensor, lm_head_VC: Tensor) -> None:
    """Raise ValueError unless the hidden states and the head fit each other."""
    check_matrix("hidden_RC", hidden_RC)
    check_matrix("lm_head_VC", lm_head_VC)
    if lm_head_VC.shape[0] == 0 or lm_head_VC.shape[1] != hidden_RC.shape[1]:
        raise ValueError(
            f"lm_head_VC: expected [V, {hidden_RC.shape[1]}] to fit hidden_RC, got {list(lm_head_VC.shape)}"
        )
    narrow = hidden_RC.dtype in (torch.float16, torch.bfloat16)
    allowed = (hidden_RC.dtype, torch.float32) if narrow else (hidden_RC.dtype,)
    if lm_head_VC.dtype not in allowed or lm_head_VC.device != hidden_RC.device:
        raise ValueError(
            f"lm_head_VC: expected {' or '.join(map(str, allowed))} on {hidden_RC.device} to fit hidden_RC, "
            f"got {lm_head_VC.dtype} on {lm_head_VC.device}"
        )


def refused_dtype(matrix: Tensor) -> dict[str, str]:
    """Implementations that refuse float64, for `resolve_impl`: the kernels compute in float32."""
    return dict.fromkeys(("triton", "cuda"), "float64 inputs") if matrix.dtype == torch.float64 else {}
