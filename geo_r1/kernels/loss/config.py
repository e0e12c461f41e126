"""Options of the GRPO family of losses; names follow TRL's GRPOTrainer where it has the option."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class GRPOLossConfig:
    """Options of the loss, checked when the object is made.

    Raises:
        ValueError: an option is out of range or does not fit another option.
    """

    # Ratios are clipped to [1 - epsilon, 1 + epsilon_high].
    epsilon: float = 0.2
    # None: epsilon. Policy "cispo" requires it, as the upper bound of the ratio itself.
    epsilon_high: float | None = None
    # Upper bound of the ratio on the side that clipping leaves open; only with policy "clip".
    delta: float | None = None
    # "geo_mean" clips each token's log-ratio to [-epsilon, epsilon_high] before their mean is taken.
    policy: Literal["clip", "cispo", "sapo", "vespo", "geo_mean"] = "clip"
    # Lower bound of the ratio; only with policy "cispo". verl has one, TRL has none.
    cispo_low: float | None = None
    # Sharpness of SAPO's gate for positive advantages, and for all others.
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    # VESPO weighs a sequence of ratio w by e^lambda w^k e^(-lambda w), for advantages >= 0 and < 0.
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    # "sequence": one ratio per completion, the geometric mean of its tokens' (GSPO, arXiv:2507.18071).
    # "sequence_token": the same ratio, but each token's gradient is that of its own (GSPO-token).
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    # Leave out the policy and entropy terms of a token whose entropy is below the quantile 1 - q of all rows.
    top_entropy_quantile: float = 1.0
    # Leave out the policy term of a sequence of negative advantage if its mean of old_logp - logp is above.
    off_policy_mask_threshold: float | None = None
    # Weight of KL(policy || reference).
    beta: float = 0.0
    # "k1+" and "k3+" have the gradient of k2. "low_var_kl" is k3, at most 10.
    kl_estimator: Literal["k3", "k1", "k2", "abs", "k1+", "k3+", "low_var_kl"] = "k3"
    # Multiply the KL by the ratio, which makes its gradient that of the KL's expectation.
    use_bias_correction_kl: bool = False
    # Weight of the entropy bonus.
    entropy_coef: float = 0.0
    # Divides the logits, as it did when the completions were sampled.
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in _AT_LEAST_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")
        for name in _ABOVE_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile: expected above 0, at most 1, got {self.top_entropy_quantile}"
            )
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef: expected a finite number, got {self.entropy_coef}")
        if self.policy == "cispo" and self.epsilon_high is None:
            raise ValueError("policy='cispo' needs epsilon_high, the upper bound of the ratio (e.g. 5.0)")
        for name, policy in (("delta", "clip"), ("cispo_low", "cispo")):
            if self.policy != policy and getattr(self, name) is not None:
                value = getattr(self, name)
                raise ValueError(
                    f"{name}={value} goes with policy={policy!r} only, got policy={self.policy!r}"
                )
        if (
            self.cispo_low is not None
            and self.epsilon_high is not None
            and self.cispo_low > self.epsilon_high
        ):
            raise ValueError(f"cispo_low={self.cispo_low} is above epsilon_high={self.epsilon_high}")
        level = {"vespo": "token", "geo_mean": "sequence"}.get(self.policy, self.importance_sampling_level)
        if self.importance_sampling_level != level:
            raise ValueError(f"policy={self.policy!r} goes with importance_sampling_level={level!r} only")

    @property
    def clip_high(self) -> float:
        """`epsilon_high`, or by default `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_sequences(self) -> bool:
        """Whether a row's loss depends on the other rows of its sequence."""
        in_policy = self.importance_sampling_level != "token" or self.policy == "vespo"
        return in_policy or self.off_policy_mask_threshold is not None

    @property
    def by_row(self) -> bool:
        """Whether a row's loss depends on nothing but that row."""
        return not self.needs_sequences and self.top_entropy_quantile == 1

    @property
    def in_kernels(self) -> bool:
        """Whether our kernels compute the loss of a row while they read its logits.

        They know the losses of most runs. All others are computed from the rows' log-probabilities and
        entropies in plain torch, between the kernels for statistics and gradient.
        """
        known = self.policy in ("clip", "cispo", "sapo") and self.kl_estimator in ("k1", "k2", "k3")
        return self.by_row and known and self.cispo_low is None and not self.use_bias_correction_kl

    @property
    def values(self) -> tuple[float | str | None, ...]:
        """The options in order, as the ops take them."""
        return tuple(getattr(self, name) for name in self.__match_args__)

    @classmethod
    def schema(cls) -> str:
        """The options as the parameters of a torch op."""
        return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _kinds(cls).items())


def _kinds(cls: type) -> dict[str, str]:
    """Each option's type: float, float?, bool or str."""
    return {
        name: "str" if get_args(hint) and str in map(type, get_args(hint)) else str(hint)
        for name, hint in get_type_hints(cls).items()
    }


_SCHEMA_TYPES = {"str": "str", "float | None": "float?", str(float): "float", str(bool): "bool"}
_CHOICES: dict[str, tuple[Any, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(GRPOLossConfig).items()
    if str in map(type, get_args(hint))
}
_AT_LEAST_0 = ("epsilon", "epsilon_high", "cispo_low", "beta", "vespo_k_pos", "vespo_k_neg")
_ABOVE_0 = tuple(
    field.name
    for field in fields(GRPOLossConfig)
    if field.name
    not in (*_CHOICES, *_AT_LEAST_0, "top_entropy_quantile", "entropy_coef", "use_bias_correction_kl")
)
DEFAULT_CONFIG = GRPOLossConfig()
