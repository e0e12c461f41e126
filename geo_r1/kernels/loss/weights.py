"""How the loss types average over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

LossType = Literal[
    # TRL's names
    "grpo",
    "bnpo",
    "dapo",
    "dr_grpo",
    "cispo",
    "sapo",
    "vespo",
    "luspo",
    # verl's names
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
_OVER_TOKENS = ("bnpo", "dapo", "cispo", "vespo", "token-mean")
_PER_SEQUENCE = ("grpo", "sapo", "seq-mean-token-mean")
_SUMS = ("luspo", "seq-mean-token-sum")


def token_weights(
    completion_len_N: Sequence[int] | Tensor,
    loss_type: LossType,
    *,
    num_items: float | None = None,
    max_completion_length: int | None = None,
    mask_R: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every completion token, for each way of averaging.

        grpo, sapo, seq-mean-token-mean          1 / (len_i * num_sequences)   a mean of means over tokens
        bnpo, dapo, cispo, vespo, token-mean     1 / num_tokens                a mean over tokens
        luspo, seq-mean-token-sum                1 / num_sequences             a mean of sums over tokens
        dr_grpo                                  1 / (num_sequences * max_completion_length)
        seq-mean-token-sum-norm                  1 / max_completion_length

    A completion of length zero, or all masked, has no weights. TRL's loss types count it as a sequence,
    verl's do not.

    Args:
        completion_len_N: [N] tokens of each completion: ints, or an integer tensor (the host reads it
            once from an accelerator).
        loss_type: how to average, by TRL's or verl's name.
        num_items: the count in the denominator if the batch is only part of the optimiser's step: tokens of
            the whole step for a mean over tokens, else sequences. None: those of this batch.
        max_completion_length: tokens; dr_grpo and seq-mean-token-sum-norm require it.
        mask_R: [R] the tokens that count; others get 0, and are not in any length. None: all.
        dtype: of the weights.

    Returns:
        [R] no gradient, completions one after another, on the device of the lengths.

    Raises:
        ValueError: an unknown loss type, a negative length, a mask of another shape, or a count that is
            missing or not positive.

    Source: TRL's GRPOTrainer; bnpo and dr_grpo, arXiv:2503.20783; dapo, arXiv:2503.14476; luspo,
        arXiv:2602.05261; verl's `agg_loss`.
    """
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type: expected one of {', '.join(get_args(LossType))}, got {loss_type!r}")
    rows_N = _lengths(completion_len_N)
    for name, count in (("num_items", num_items), ("max_completion_length", max_completion_length)):
        if count is not None and not count > 0:
            raise ValueError(f"{name}: expected a number above 0, got {count}")
    longest = float(max_completion_length or 1)
    if max_completion_length is None and loss_type in ("dr_grpo", "seq-mean-token-sum-norm"):
        raise ValueError(f"loss_type={loss_type!r} needs max_completion_length, got None")
    length_N = rows_N
    if mask_R is not None:
        ends_N = rows_N.cumsum(0)
        if mask_R.dim() != 1 or (rows_N.device.type == "cpu" and len(mask_R) != int(rows_N.sum())):
            raise ValueError(f"mask_R: expected [{int(rows_N.sum())}], got {list(mask_R.shape)}")
        counted = torch.nn.functional.pad((mask_R != 0).long().cumsum(0), (1, 0))
        length_N = counted[ends_N] - counted[ends_N - rows_N]

    num_sequences: Tensor | float = float(length_N.numel())
    if loss_type.startswith("seq-"):
        num_sequences = (length_N > 0).sum().double()
    num_tokens: Tensor | float = length_N.sum().double()
    if num_items is not None:
        num_sequences = num_tokens = float(num_items)
    ones_N = torch.ones_like(length_N, dtype=torch.float64)
    if loss_type in _PER_SEQUENCE:
        denominator_N = length_N.double() * num_sequences
    elif loss_type in _OVER_TOKENS:
        denominator_N = ones_N * num_tokens
    elif loss_type in _SUMS:
        denominator_N = ones_N * num_sequences
    else:
        denominator_N = ones_N * longest * (num_sequences if loss_type == "dr_grpo" else 1.0)
    weight_R = denominator_N.reciprocal().to(dtype).repeat_interleave(rows_N)
    return weight_R if mask_R is None else torch.where(mask_R != 0, weight_R, 0.0)


def _lengths(completion_len_N: Sequence[int] | Tensor) -> Tensor:
    length_N = torch.as_tensor(completion_len_N)
    if length_N.numel() == 0:
        length_N = length_N.long()  # an empty list has no integer dtype
    if length_N.dim() != 1 or length_N.is_floating_point() or length_N.dtype == torch.bool:
        raise ValueError(
            f"completion_len_N: expected [N] integers, got {list(length_N.shape)} {length_N.dtype}"
        )
    length_N = length_N.long()
    if length_N.device.type == "cpu" and (length_N < 0).any():
        raise ValueError(f"completion_len_N: expected lengths of at least 0, got {int(length_N.min())}")
    return length_N
