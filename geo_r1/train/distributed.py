"""Data parallel ranks: each holds the whole model and works on its share of the global batch.

Gradients are summed once a step, after all micro-batches: ranks may hold different numbers of them, or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# One rank may write a large checkpoint, or sample longer than the others, while they wait.
PATIENCE = timedelta(hours=2)


class PeerLost(Exception):  # noqa: N818  # the error is the other rank's
    """Another rank has ended in the middle of the run."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, as torchrun started them; alone without torchrun."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, threads: int = 0) -> Ranks:
        """Join the process group (NCCL on GPUs, gloo on CPUs) and share the machine's cores.

        Args:
            threads: CPU threads of this rank; 0 divides the cores among the ranks of this machine.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(int(os.environ.get("RANK", "0")), size, device)

    def stop(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's positions of a global batch of `count`."""
        return range(self.rank, count, self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with self._together():
                dist.barrier()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the ranks; a parameter unused on some ranks counts as zero there."""
        if self.size == 1:
            return
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        self._all_reduce(used)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def _all_reduce(self, tensor: Tensor) -> None:
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL both raise it when a connection closes
            reason = str(error).splitlines()[0]
            raise PeerLost(
                f"rank {self.rank}: another rank has ended; what it printed says why ({reason})"
            ) from error
