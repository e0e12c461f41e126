"""Launch tables: how each Triton kernel is launched for which sizes, and why.

Every Triton kernel here is launched by `kernel[grid](..., **row.options)`, with a row of the table beside it.
So the tables list every configuration that can run, and `make aot` builds each of them ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Launch:
    """One row of a table.

    Args:
        reason: why these values; figures name the device they were measured on.
        num_warps: warps per program.
        num_stages: depth of the software pipeline over a loop's loads.
        blocks: block sizes by the kernel's constexpr parameter, powers of two.
    """

    def __init__(self, reason: str, *, num_warps: int, num_stages: int = 1, **blocks: int) -> None:
        self.reason, self.blocks = reason, blocks
        self._options = {**blocks, "num_warps": num_warps, "num_stages": num_stages}

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return self._options

    @contextmanager
    def replaced(self, **options: int) -> Iterator[None]:
        """Launch with other values of some options within the block, as a sweep does."""
        kept = self.blocks, self._options
        self._options = {**self._options, **options}
        self.blocks = {name: self._options[name] for name in self.blocks}
        try:
            yield
        finally:
            self.blocks, self._options = kept
