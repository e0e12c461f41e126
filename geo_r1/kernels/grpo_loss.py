"""The GRPO family of losses on full logits, and the weights that average it.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

Source: GRPO, arXiv:2402.03300; options and names follow TRL's GRPOTrainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geo_r1.kernels.impls import resolve_impl
from geo_r1.kernels.loss_config import DEFAULT_CONFIG, GRPOLossConfig
from geo_r1.kernels.reference import grpo_row_loss, row_statistics

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class GRPOLossOutput:
    """The loss and what each row says about it. Rows of weight zero report 0, 0, 0, 1 and False.

    float32, or float64 for float64 inputs.
    """

    loss: Tensor  # scalar, differentiable
    logp_R: Tensor  # [R] nats, no gradient, as are all below
    entropy_R: Tensor  # [R] nats
    kl_R: Tensor  # [R] nats, by the chosen estimator; zeros without ref_logp_R
    ratio_R: Tensor  # [R] policy / old policy, before any clipping; one a sequence with level "sequence"
    clipped_R: Tensor  # [R] bool, the bound took the row's gradient (never with "sapo")


def grpo_loss(
    logits_RV: Tensor,
    target_R: Tensor,
    advantage_R: Tensor,
    token_weight_R: Tensor,
    *,
    old_logp_R: Tensor | None = None,
    ref_logp_R: Tensor | None = None,
    importance_weight_R: Tensor | None = None,
    sequence_R: Tensor | None = None,
    config: GRPOLossConfig = DEFAULT_CONFIG,
    impl: str | None = None,
) -> GRPOLossOutput:
    """GRPO's loss from full logits.

        L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)
        clip:  policy = -min(min(ratio, delta) A, clamp(ratio, 1 - epsilon, 1 + epsilon_high) A)
        cispo: policy = -stop_gradient(min(ratio, epsilon_high)) A logp
        sapo:  policy = -4 / tau sigmoid(tau (ratio - 1)) A

    Differentiable in `logits_RV` only. A row of weight zero contributes exactly zero, whatever it holds.

    Args:
        logits_RV: [R, V] float16, bfloat16, float32 or float64. R = 0 is legal, and its loss is 0.
        target_R: [R] int64 in [0, V), the drawn tokens.
        advantage_R: [R] floating, no unit, each row's completion's.
        token_weight_R: [R] floating, how rows are averaged, see `token_weights`.
        old_logp_R: [R] floating, nats, under the policy that drew the tokens. None: strictly on-policy, the
            ratio is 1 and its gradient is kept.
        ref_logp_R: [R] floating, nats, under the reference model. Needed where beta is not 0.
        importance_weight_R: [R] floating, multiplies the policy term (correction for a sampler that differs
            from the old policy). None: 1.
        sequence_R: [R] int64, which completion a row belongs to; any ids, rows in any order. Needed with
            level "sequence".
        config: options.
        impl: implementation, see `available_impls()`.

    Returns:
        GRPOLossOutput.

    Raises:
        ValueError: a shape, dtype or device is wrong, an input that the options need is missing, or (on the
            CPU) a target is out of range.

    Source: GRPO, arXiv:2402.03300; clip higher and token averages, DAPO, arXiv:2503.14476; sequence ratios,
        GSPO, arXiv:2507.18071; cispo, arXiv:2506.13585; sapo, arXiv:2511.20347; TRL's GRPOTrainer.
    """
    resolve_impl("grpo_loss", impl, logits_RV.device)
    check_matrix("logits_RV", logits_RV)
    rows_R = (advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R)
    check_rows(logits_RV, target_R, logits_RV.shape[1], config, *rows_R)
    kept_R = token_weight_R != 0
    # Before the softmax: its backward multiplies by probabilities, and zero times NaN is NaN.
    logits_RV = torch.where(kept_R[:, None], logits_RV, 0.0)
    logp_R, entropy_R = row_statistics(logits_RV, target_R, config.temperature)
    loss_R, kl_R, ratio_R, clipped_R = grpo_row_loss(logp_R, entropy_R, *rows_R, config)
    return loss_output(loss_R.sum(), kept_R, logp_R, entropy_R, kl_R, ratio_R, clipped_R)


def loss_output(
    loss: Tensor,
    kept_R: Tensor,
    logp_R: Tensor,
    entropy_R: Tensor,
    kl_R: Tensor,
    ratio_R: Tensor,
    clipped_R: Tensor,
) -> GRPOLossOutput:
    """Bundle a loss with its rows' reports, zeros where a row took no part."""
    logp_R = torch.where(kept_R, logp_R.detach(), 0.0)
    entropy_R = torch.where(kept_R, entropy_R.detach(), 0.0)
    return GRPOLossOutput(loss, logp_R, entropy_R, kl_R, ratio_R, clipped_R)


def check_matrix(name: str, matrix: Tensor) -> None:
    """Raise ValueError unless `matrix` is [*, not empty] of a dtype the losses take."""
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
    """Raise ValueError unless targets are [R] int64 and, where they live on the CPU, in [0, V)."""
    check_row("target_R", target_R, like, integer=True)
    if target_R.device.type == "cpu" and target_R.numel():
        outside = (target_R < 0) | (target_R >= vocab_size)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target_R: expected values in [0, {vocab_size}), got {int(target_R[row])} at row {row}"
            )


def check_rows(
    like: Tensor,
    target_R: Tensor,
    vocab_size: int,
    config: GRPOLossConfig,
    advantage_R: Tensor,
    token_weight_R: Tensor,
    old_logp_R: Tensor | None,
    ref_logp_R: Tensor | None,
    importance_weight_R: Tensor | None,
    sequence_R: Tensor | None,
) -> None:
    """Raise ValueError unless the rows of a GRPO loss fit `like` [R, *] and the options."""
    check_target(target_R, like, vocab_size)
    check_row("advantage_R", advantage_R, like)
    check_row("token_weight_R", token_weight_R, like)
    for name, row_R in (
        ("old_logp_R", old_logp_R),
        ("ref_logp_R", ref_logp_R),
        ("importance_weight_R", importance_weight_R),
    ):
        if row_R is not None:
            check_row(name, row_R, like)
    if sequence_R is not None:
        check_row("sequence_R", sequence_R, like, integer=True)
    elif config.importance_sampling_level == "sequence":
        raise ValueError("importance_sampling_level='sequence' needs sequence_R, got None")
    if config.beta != 0 and ref_logp_R is None:
        raise ValueError(f"beta={config.beta} needs ref_logp_R, got None")


def token_weights(
    completion_len_N: Sequence[int] | Tensor,
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"],
    *,
    num_items: float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """The weight of every completion token, by which a loss type averages.

        grpo     1 / (len_i * num_sequences)      a mean over sequences of means over tokens
        bnpo     1 / num_tokens                   a mean over tokens
        dapo     1 / num_tokens
        dr_grpo  1 / (num_sequences * max_completion_length)

    A completion of length zero owns no rows, but counts as a sequence.

    Args:
        completion_len_N: [N] tokens of each completion: ints, or an integer tensor (on an accelerator its
            lengths are read once by the host).
        loss_type: how to average.
        num_items: the denominator's count where the batch is only a part of the optimiser's step: sequences
            of the whole step for grpo and dr_grpo, tokens for bnpo and dapo. None: this batch's.
        max_completion_length: tokens; needed by dr_grpo.

    Returns:
        [R] float32, no gradient, completions one after another, on the device of the lengths.

    Raises:
        ValueError: an unknown loss type, a negative length, or a count that is missing or not positive.

    Source: TRL's GRPOTrainer; bnpo and dr_grpo, arXiv:2503.20783; dapo, arXiv:2503.14476.
    """
    length_N = torch.as_tensor(completion_len_N)
    if length_N.numel() == 0:
        length_N = length_N.long()  # an empty list has no dtype of its own
    if length_N.dim() != 1 or length_N.is_floating_point() or length_N.dtype == torch.bool:
        raise ValueError(
            f"completion_len_N: expected [N] integers, got {list(length_N.shape)} {length_N.dtype}"
        )
    length_N = length_N.long()
    if length_N.device.type == "cpu" and (length_N < 0).any():
        raise ValueError(f"completion_len_N: expected lengths of at least 0, got {int(length_N.min())}")
    for name, count in (("num_items", num_items), ("max_completion_length", max_completion_length)):
        if count is not None and not count > 0:
            raise ValueError(f"{name}: expected a number above 0, got {count}")
    num_sequences = length_N.numel() if num_items is None else num_items
    if loss_type == "grpo":
        denominator_N = length_N.double() * num_sequences
    elif loss_type in ("bnpo", "dapo"):
        num_tokens = length_N.sum().double() if num_items is None else num_items
        denominator_N = torch.ones_like(length_N, dtype=torch.float64) * num_tokens
    elif loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length, got None")
        denominator_N = torch.full_like(length_N, num_sequences * max_completion_length, dtype=torch.float64)
    else:
        raise ValueError(f"loss_type: expected grpo, bnpo, dapo or dr_grpo, got {loss_type!r}")
    return denominator_N.reciprocal().float().repeat_interleave(length_N)
