"""The GRPO family of losses on full logits, and the weights that average it.

    L = sum_t w_t * (importance_t * policy_t + beta * KL_t - entropy_coef * H_t)

Source: GRPO, arXiv:2402.03300; options and names follow TRL's GRPOTrainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from geo_r1.kernels import reference
from geo_r1.kernels.checks import check_matrix, check_rows, refused_dtype
from geo_r1.kernels.chunks import row_kernels
from geo_r1.kernels.impls import resolve_impl
from geo_r1.kernels.loss_config import DEFAULT_CONFIG, GRPOLossConfig
from geo_r1.kernels.reference import LossRows, RowLoss


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
    # [R] bool: outside [1 - epsilon, 1 + epsilon_high] on the side that the advantage pushes to; with "cispo"
    # above epsilon_high with a positive advantage; never with "sapo"
    clipped_R: Tensor


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

    Differentiable in `logits_RV` only. A row of weight zero contributes exactly zero, whatever it holds. With
    old_logp_R=None NaN logits show in logp_R and the gradient; the ratio is 1, so the loss may be finite.

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
    check_matrix("logits_RV", logits_RV)
    impl = resolve_impl("grpo_loss", impl, logits_RV.device, refused_dtype(logits_RV))
    rows = LossRows(advantage_R, token_weight_R, old_logp_R, ref_logp_R, importance_weight_R, sequence_R)
    check_rows(logits_RV, target_R, logits_RV.shape[1], config, rows)
    outputs = torch.ops.geo_r1.grpo_loss(logits_RV, target_R, *rows.detached(), *config.values, impl)
    return GRPOLossOutput(*outputs[:6])


CONFIG_SCHEMA = (
    "float epsilon, float? epsilon_high, float? delta, str policy, float sapo_temperature_pos, "
    "float sapo_temperature_neg, str importance_sampling_level, float beta, str kl_estimator, "
    "float entropy_coef, float temperature"
)
ROWS_SCHEMA = (
    "Tensor target_R, Tensor advantage_R, Tensor token_weight_R, Tensor? old_logp_R, Tensor? ref_logp_R, "
    "Tensor? importance_weight_R, Tensor? sequence_R"
)


def _grpo_loss(logits_RV: Tensor, target_R: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The loss, the five reports, and for backward lse and the loss's derivatives in logp and entropy."""
    rows_R = LossRows(*arguments[:6])
    *fields, impl = arguments[6:]
    config = GRPOLossConfig(*fields)
    if impl == "reference":
        logp_R, entropy_R = reference.row_statistics(logits_RV, target_R, config.temperature)
        lse_R2 = logp_R.new_zeros(len(logp_R), 2)  # its backward does not ask
        terms = reference.grpo_row_loss(logp_R, entropy_R, rows_R, config)
    elif config.importance_sampling_level == "token":
        kernels = row_kernels(impl)
        terms, logp_R, entropy_R, lse_R2 = kernels.grpo_row_loss(logits_RV, target_R, rows_R, config)
    else:
        kernels = row_kernels(impl)
        logp_R, entropy_R, lse_R2 = kernels.row_statistics(logits_RV, target_R, config.temperature)
        terms = reference.grpo_row_loss(logp_R, entropy_R, rows_R, config)
    return (
        *loss_outputs(terms, rows_R.token_weight_R, logp_R, entropy_R),
        lse_R2,
        terms.d_logp_R,
        terms.d_entropy_R,
    )


def _grpo_loss_fake(logits_RV: Tensor, *_: Any) -> tuple[Tensor, ...]:
    row_R = fake_row(logits_RV)
    return *fake_loss_outputs(logits_RV), row_R.new_empty(len(row_R), 2), row_R, torch.empty_like(row_R)


def _setup_grpo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_RV, target_R, *_ = inputs
    _, _, entropy_R, _, _, _, lse_R2, d_logp_R, d_entropy_R = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_RV, target_R, lse_R2, entropy_R, d_logp_R, d_entropy_R)
    *_, entropy_coef, temperature, impl = inputs
    ctx.options = (entropy_coef != 0, temperature, impl)


def _grpo_loss_backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 20
    d_logits_RV = torch.ops.geo_r1.logit_gradient(*ctx.saved_tensors, d_loss, *ctx.options)
    return d_logits_RV, *[None] * 19


@torch.library.custom_op(
    "geo_r1::logit_gradient",
    mutates_args=(),
    schema="(Tensor logits_RV, Tensor target_R, Tensor lse_R2, Tensor entropy_R, Tensor d_logp_R, "
    "Tensor d_entropy_R, Tensor d_loss, bool entropy_term, float temperature, str impl) -> Tensor",
)
def _logit_gradient(
    logits_RV: Tensor,
    target_R: Tensor,
    lse_R2: Tensor,
    entropy_R: Tensor,
    d_logp_R: Tensor,
    d_entropy_R: Tensor,
    d_loss: Tensor,
    entropy_term: bool,
    temperature: float,
    impl: str,
) -> Tensor:
    """dlogits; a second derivative raises, for this has no gradient of its own."""
    wanted_R = d_entropy_R if entropy_term else None
    if impl == "reference":
        options = (wanted_R, temperature, d_loss)
        return reference.logit_gradient(logits_RV, target_R, entropy_R, d_logp_R, *options)
    return row_kernels(impl).logit_gradient(
        logits_RV, target_R, lse_R2, entropy_R, d_logp_R, wanted_R, temperature, d_loss=d_loss
    )


@_logit_gradient.register_fake
def _(logits_RV: Tensor, *_: Any) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape)


_grpo_loss_op = torch.library.custom_op(
    "geo_r1::grpo_loss",
    _grpo_loss,
    mutates_args=(),
    schema=f"(Tensor logits_RV, {ROWS_SCHEMA}, {CONFIG_SCHEMA}, str impl) -> ({', '.join(['Tensor'] * 9)})",
)
_grpo_loss_op.register_fake(_grpo_loss_fake)
_grpo_loss_op.register_autograd(_grpo_loss_backward, setup_context=_setup_grpo_loss)


def loss_outputs(
    terms: RowLoss, token_weight_R: Tensor, logp_R: Tensor, entropy_R: Tensor
) -> tuple[Tensor, ...]:
    """The fields of GRPOLossOutput; a row that takes no part reports zeros, whatever it holds."""
    kept_R = token_weight_R != 0
    logp_R, entropy_R = (torch.where(kept_R, row_R, 0.0) for row_R in (logp_R, entropy_R))
    return terms.loss_R.sum(), logp_R, entropy_R, terms.kl_R, terms.ratio_R, terms.clipped_R


def fake_row(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[R] of the dtype that statistics of `like` [R, *] have, or of the one given."""
    return like.new_empty(like.shape[0], dtype=dtype or torch.promote_types(like.dtype, torch.float32))


def fake_loss_outputs(like: Tensor) -> tuple[Tensor, ...]:
    """Shapes and dtypes of the fields of GRPOLossOutput."""
    rows_R = (fake_row(like) for _ in range(4))
    return fake_row(like).new_empty(()), *rows_R, fake_row(like, torch.bool)


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
