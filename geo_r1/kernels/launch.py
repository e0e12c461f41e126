"""Launch tables: how each Triton kernel is launched for which sizes, and why.

Every Triton kernel here is launched by `kernel[grid](..., **row.options)`, with a row of the table beside it.
So the tables list every configuration that can run, and `make aot` builds each of them ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The compute capabilities for which `make aot` builds and judges every row.
CHIPS = (80, 86, 89, 90, 100, 120)


def chip_of(x: Tensor) -> int:
    """Compute capability of a tensor's GPU, 90 for an H200; 0 on a CPU, where Triton interprets kernels."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


class Launch:
    """One row of a table.

    Args:
        reason: why these values; figures name the device they were measured on.
        num_warps: warps per program.
        num_stages: depth of the software pipeline over a loop's loads.
        limit: the most instructions that its kernels may spend on an element on an H200; one that needs more
            fails the gate, see `floor.py`. None: any number.
        stack: bytes of a thread's registers that may be spilled to memory.
        blocks: block sizes by the kernel's constexpr parameter, powers of two.
    """

    def __init__(
        self,
        reason: str,
        *,
        num_warps: int,
        num_stages: int = 1,
        limit: float | None = None,
        stack: int = 0,
        **blocks: int,
    ) -> None:
        self.reason, self.blocks, self.limit, self.stack = reason, blocks, limit, stack
        # Triton 3.10 will no longer fuse a product with a sum unless asked to.
        self._options = {**blocks, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}

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
