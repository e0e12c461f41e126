"""Options of sampling, and its result."""

from __future__ import annotations

from dataclasses import dataclass

from geo_r1.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        max_new_tokens: a completion that reaches it is cut off there.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise UserError(
                "sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1, got "
                f"{self.temperature}, {self.top_p}, {self.top_k} and {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Completion:
    """The tokens sampled for a prompt.

    Attributes:
        token_ids: its tokens, including the end token if it ended by itself.
        logp: natural log-probability of each token under the distribution it was drawn from.
        ended: False if it was cut off at `max_new_tokens`.
    """

    token_ids: list[int]
    logp: list[float]
    ended: bool
