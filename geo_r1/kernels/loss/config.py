"""Options of the GRPO family of losses; names follow TRL's GRPOTrainer."""

import math
from dataclasses import dataclass
from typing import Literal


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
    policy: Literal["clip", "cispo", "sapo"] = "clip"
    # Sharpness of SAPO's gate for positive advantages, and for all others.
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    # "sequence": one ratio per completion, the geometric mean of its tokens' (GSPO, arXiv:2507.18071).
    importance_sampling_level: Literal["token", "sequence"] = "token"
    # Weight of KL(policy || reference).
    beta: float = 0.0
    kl_estimator: Literal["k3", "k1", "k2"] = "k3"
    # Weight of the entropy bonus.
    entropy_coef: float = 0.0
    # Divides the logits, as it did when the completions were sampled.
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("policy", ("clip", "cispo", "sapo")),
            ("importance_sampling_level", ("token", "sequence")),
            ("kl_estimator", ("k3", "k1", "k2")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("epsilon", "epsilon_high", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")
        for name in ("delta", "sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef: expected a finite number, got {self.entropy_coef}")
        if self.policy == "cispo" and self.epsilon_high is None:
            raise ValueError("policy='cispo' needs epsilon_high, the upper bound of the ratio (e.g. 5.0)")
        if self.policy != "clip" and self.delta is not None:
            raise ValueError(f"delta={self.delta} goes with policy='clip' only, got policy={self.policy!r}")

    @property
    def clip_high(self) -> float:
        """`epsilon_high`, or by default `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def values(self) -> tuple[float | str | None, ...]:
        """The options in order, as the ops take them."""
        return tuple(getattr(self, name) for name in self.__match_args__)


DEFAULT_CONFIG = GRPOLossConfig()
