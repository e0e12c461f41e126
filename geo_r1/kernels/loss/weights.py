"""How the loss types average over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def token_weights(
    completion_len_N: Sequence[int] | Tensor,
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"],
    *,
    num_items: float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """The weight of every completion token, for each way of averaging.

        grpo     1 / (len_i * num_sequences)      a mean over sequences of means over tokens
        bnpo     1 / num_tokens                   a mean over tokens
        dapo     1 / num_tokens
        dr_grpo  1 / (num_sequences * max_completion_length)

    A completion of length zero has no rows, but counts as a sequence.

    Args:
        completion_len_N: [N] tokens of each completion: ints, or an integer tensor (the host reads it
            once from an accelerator).
        loss_type: how to average.
        num_items: the count in the denominator if the batch is only part of the optimiser's step: sequences
            of the whole step for grpo and dr_grpo, tokens for bnpo and dapo. None: those of this batch.
        max_completion_length: tokens; dr_grpo requires it.

    Returns:
        [R] float32, no gradient, completions one after another, on the device of the lengths.

    Raises:
        ValueError: an unknown loss type, a negative length, or a count that is missing or not positive.

    Source: TRL's GRPOTrainer; bnpo and dr_grpo, arXiv:2503.20783; dapo, arXiv:2503.14476.
    """
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
