"""What samples completions, wherever it runs: with the weights that it was last given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from geo_r1.models import EncodedPrompt
from geo_r1.rollout.sampling import Completion, SamplingConfig

Copies = Literal["none", "per rank", "one"]


class EngineLost(ValueError):  # noqa: N818  # a user's to mend: the message says what to do
    """An engine does not answer any more; nothing that it was asked for has come."""


class WeightsLost(EngineLost):
    """An engine came back without the weights it was given: `load` them again, then ask again."""


class RolloutEngine(Protocol):
    """Samples with a copy of the policy of its own.

    One caller at a time; any thread.

    Attributes:
        copies: of the policy's weights: "none" (it samples with the policy itself, and `load` does nothing),
            one "per rank", or "one" for all ranks, which rank 0 loads.
    """

    copies: Copies

    @property
    def holds_base(self) -> bool:
        """Whether adapters alone are wanted by the next `load`: what they are added to is here already."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Take over weights: every weight of the policy once, whole.

        Args:
            tensors: by the names of transformers; of a model with adapters by that model's own names, and
                where the engine `holds_base` those of its adapters alone.
            alpha: of the adapters, which are merged here (see `geo_r1.models.lora`); None where none are.

        Raises:
            ValueError: one is missing, unknown or of another shape; names it.
            WeightsLost: it came back without the base weights: all are wanted.
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
        """`num_completions` completions of each prompt, in order.

        Args:
            prompts: with their pictures, where the engine encodes them itself.
            streams: names of the prompts' random streams; the same name draws the same.

        Raises:
            ValueError: the engine refuses a prompt, or reads it otherwise than the policy does; names the
                sample.
            WeightsLost: the engine has no weights, or not those it was given.
            EngineLost: the engine has gone.
        """
        ...

    def sleep(self) -> None:
        """Nothing is asked before the next `load`: memory may be given back until then."""
        ...

    def close(self) -> None:
        """Let go of memory, processes and connections."""
        ...
