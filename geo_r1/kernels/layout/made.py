"""Tensors that one stream has made and others may use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Made:
    """The moment at which the current stream of a GPU has made some tensors.

    Nothing is recorded while a CUDA graph is captured: `torch.cuda.graph` waits for all streams before, and
    a capture must not wait for events from outside.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.stream = tensors, torch.cuda.current_stream(tensors[0].device)
        self.event = torch.cuda.Event()
        self.event.record(self.stream)

    @classmethod
    def by_current_stream(cls, value: Any) -> Made | None:
        """The moment at which the tensors in nested tuples are made; None if nobody needs to wait for it."""
        tensors = [x for x in tensors_in(value) if x.device.type == "cuda"]
        return cls(tensors) if tensors and not torch.cuda.is_current_stream_capturing() else None

    def wait(self) -> None:
        """Let the current stream wait for the one that made them, which then does not reuse their memory."""
        stream = torch.cuda.current_stream(self.tensors[0].device)
        if stream == self.stream or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self.event)
        for tensor in self.tensors:
            tensor.record_stream(stream)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
