"""This process among the others, and what they tell each other on the host."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geo_r1.train.parallel.lifeline import Lifeline

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
    lifeline: Lifeline

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
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"LOCAL_RANK is {local}, but this process sees {torch.cuda.device_count()} GPUs: start "
                    "at most so many ranks a machine, and let each of them see all"
                )
            torch.cuda.set_device(device)
        else:  # DeepSpeed, which transformers imports where it is installed, would warn that it had to look
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if size == 1:
            return cls(0, 1, device, Lifeline(0, {}))
        store, rank, _ = next(dist.rendezvous("env://"))
        # what is on the host travels from there, without waiting for the device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        ties = dist.PrefixStore("lifeline", store)
        return cls(rank, size, device, Lifeline.start(rank, size, ties, os.environ["MASTER_ADDR"]))

    def join(self) -> None:
        """See that there is a process group, which sharding needs even where there is one rank."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def stop(self) -> None:
        """Leave the others, who are about to do the same."""
        if dist.is_initialized():  # of one rank, too, where it was sharded
            dist.destroy_process_group()
        self.lifeline.close()

    def leave(self) -> None:
        """Leave because something went wrong: others may wait elsewhere, and would not hear a goodbye."""
        if self.size == 1:
            self.stop()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's positions of a global batch of `count`."""
        return range(self.rank, count, self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        with self._together():
            dist.all_reduce(total)
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

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor, on whatever device, with rank 0's."""
        if self.size > 1:
            with self._together():
                dist.broadcast(tensor, 0)

    def exchange(self, moves: Sequence[tuple[int, int]], outgoing: Mapping[int, Any]) -> dict[int, Any]:
        """Send objects from rank to rank.

        Args:
            moves: (from, to) of every object that moves, the same list on every rank.
            outgoing: by index in `moves`, the objects that this rank sends.

        Returns:
            By index in `moves`, the objects that came to this rank.
        """
        incoming = {}
        for index, (source, target) in enumerate(moves):  # in one order, so nobody waits in a circle
            with self._together():
                if source == self.rank:
                    dist.send_object_list([outgoing[index]], target, device=torch.device("cpu"))
                elif target == self.rank:
                    box: list[Any] = [None]
                    dist.recv_object_list(box, source, device=torch.device("cpu"))
                    incoming[index] = box[0]
        return incoming

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL both raise it when a connection closes
            reason = str(error).splitlines()[0]
            raise PeerLost(f"another rank has ended ({reason})") from error
