"""The protocol of rollout engines: they sample completions, with the weights that they were last given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from geo_r1.errors import OutageError
from geo_r1.models import EncodedPrompt
from geo_r1.rollout.sampling import Completion, SamplingConfig

Copies = Literal["none", "per rank", "one"]


class EngineLost(OutageError):  # noqa: N818
    """An engine no longer answers; none of the completions it was asked for has come."""


class WeightsLost(EngineLost):
    """An engine came back without the weights it was given: `load` them again, then ask again."""


class RolloutEngine(Protocol):
    """Samples completions for one caller at a time, on any thread.

    Attributes:
        copies: of the policy's weights: "none" (it samples with the policy itself, and `load` does nothing),
            one "per rank", or "one" for all ranks, which rank 0 loads.
    """

    copies: Copies

    @property
    def holds_base(self) -> bool:
        """True if the engine already holds the base weights, so the next `load` is of adapters alone."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Replace the engine's weights by the policy's, each of them once and whole.

        Args:
            tensors: by the names of transformers; for a model with adapters by that model's own names, and
                if the engine `holds_base` those of its adapters alone.
            alpha: of the adapters, which the engine merges (see `geo_r1.models.lora`); None without adapters.

        Raises:
            ValueError: a weight is missing, unknown or of another shape; names it.
            WeightsLost: the engine came back without the base weights: all are due.
            EngineLost: the engine has gone.
        """
        ...

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_completions: int,
        sampling: SamplingConfig,
        streams: Sequence[str],
    ) -> list[list[Completion]]:
        """Sample `num_completions` completions of each prompt, in order.

        Args:
            prompts: with their images, if the engine encodes them itself.
            streams: names of the prompts' random streams; the same name draws the same.

        Raises:
            ValueError: the engine refuses a prompt, or reads it otherwise than the policy; names the sample.
            WeightsLost: the engine has no weights, or not those it was given.
            EngineLost: the engine has gone.
        """
        ...

    def sleep(self) -> None:
        """Give memory back, if possible: no completion is asked for before the next `load`."""
        ...

    def close(self) -> None:
        """Let go of memory, processes and connections."""
        ...
