"""What a row of a launch table is: how a kernel is launched for some sizes, and why.

Every Triton kernel of this package is launched by `kernel[grid](..., **row.options)`, with a row of a table
that stands beside the kernel, so that all configurations that can ever run are listed and `make aot` builds
each of them ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One configuration.

    Attributes:
        blocks: block sizes by the kernel's constexpr parameter, powers of two.
        num_warps: warps a program.
        num_stages: depth of the software pipeline over a loop's loads.
        reason: why these; figures name the device they were measured on, or say "not measured".
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    reason: str

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


def launch(reason: str, *, num_warps: int, num_stages: int = 1, **blocks: int) -> Launch:
    """A row, written as the call that it becomes."""
    return Launch(tuple(blocks.items()), num_warps, num_stages, reason)
