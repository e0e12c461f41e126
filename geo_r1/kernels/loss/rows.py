"""Rows of logits by our own kernels, "triton" or "cuda".

    z = logits / temperature;  lse = logsumexp(z);  logp = z[target] - lse;  H = -sum_v p_v log p_v
    dlogits = (dlogp (onehot - p) - dH p (log p + H)) / temperature

`triton.py` and `cuda.py` each have `row_statistics`, `grpo_row_loss` and `logit_gradient`, which
fill tensors allocated here. `reference.py` defines the results.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import LossRows, RowLoss


def row_kernels(impl: str) -> RowKernels:
    """The kernels of `impl`, "triton" or "cuda"."""
    return RowKernels(impl)


def in_kernels(config: GRPOLossConfig, rows: LossRows) -> bool:
    """Whether our kernels compute a row's loss while they read its logits."""
    return config.in_kernels and rows.entropy_weight_R is None


class RowKernels:
    """Launches kernels on logits [R, V] of float16, bfloat16 or float32; rows are float32, targets int64."""

    def __init__(self, impl: str) -> None:
        # Imported by name, since the CUDA kernels must run without Triton.
        self._module = importlib.import_module(f"geo_r1.kernels.loss.{impl}")

    def row_statistics(
        self, logits_RV: Tensor, target_R: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logp_R, entropy_R and lse_R2 in one read of the logits.

        lse_R2 [R, 2] is the log-sum-exp in two parts, the largest logit and the log of the sum of
        exp((logit - largest) / temperature). As one rounded number it would spoil every probability.
        """
        rows = _new_row(logits_RV), _new_row(logits_RV), _new_row(logits_RV, 2)
        with torch.cuda.device_of(logits_RV):  # Triton launches on the current device
            self._module.row_statistics(logits_RV, target_R.contiguous(), temperature, *rows)
        return rows

    def grpo_row_loss(
        self,
        logits_RV: Tensor,
        target_R: Tensor,
        rows: LossRows,
        config: GRPOLossConfig,
        d_logits_RV: Tensor | None = None,
    ) -> tuple[RowLoss, Tensor, Tensor, Tensor]:
        """The loss with ratios per token, straight from logits.

        Args:
            d_logits_RV: [R, V], last stride 1, filled with the gradient if given; may be the logits.

        Returns:
            RowLoss, logp_R, entropy_R, lse_R2.
        """
        floats = (_new_row(logits_RV) for _ in range(5))
        terms = RowLoss._make((*floats, _new_row(logits_RV, dtype=torch.bool)))
        statistics = _new_row(logits_RV), _new_row(logits_RV), _new_row(logits_RV, 2)
        rows = LossRows._make(map(_readable, rows._replace(sequence_R=None, entropy_weight_R=None)))
        with torch.cuda.device_of(logits_RV):
            target_R = target_R.contiguous()
            self._module.grpo_row_loss(logits_RV, target_R, rows, config, terms, *statistics, d_logits_RV)
        return terms, *statistics

    def logit_gradient(
        self,
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
        """dlogits from the rows' derivatives, times the scalar `d_loss`; `out_RV` may be the logits."""
        out_RV = logits_RV.new_empty(logits_RV.shape) if out_RV is None else out_RV
        rows = map(_readable, (entropy_R, d_logp_R, d_entropy_R, d_loss))
        with torch.cuda.device_of(logits_RV):
            self._module.logit_gradient(logits_RV, target_R.contiguous(), temperature, lse_R2, *rows, out_RV)
        return out_RV


def _readable(row_R: Tensor | None) -> Tensor | None:
    return None if row_R is None else row_R.float().contiguous()


def _new_row(logits_RV: Tensor, *more: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape[0], *more, dtype=dtype)
