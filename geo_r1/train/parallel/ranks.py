"""This process among the others, and what they tell each other on the host."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geo_r1.cores import usable_cores
from geo_r1.errors import OutageError, UserError, say
from geo_r1.train.parallel.heartbeat import Heartbeat

# One rank may write a large checkpoint, or sample longer than the others, while they wait.
PATIENCE = timedelta(hours=2)
SLOW = 15.0  # seconds of waiting for other ranks until a line says so


class RankLost(OutageError):  # noqa: N818  # the error is the other rank's
    """Another rank has ended in the middle of the run, or could not be reached."""


@contextmanager
def rank_losses() -> Iterator[None]:
    """Turn the errors that collectives raise when a connection closes into RankLost."""
    try:
        yield
    except OutageError:
        raise
    except RuntimeError as error:
        gloo = "gloo/transport" in str(error) and "enforce fail" not in str(error)  # of a misuse of gloo
        if not (gloo or isinstance(error, dist.DistError)):
            raise
        raise RankLost(f"another rank has ended ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class Ranks:
    """This process among the others, as torchrun started them; alone without torchrun."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat | None = None

    @classmethod
    def start(cls, threads: int = 0, hang_timeout: float = 600.0) -> Ranks:
        """Join the process group (NCCL on GPUs, gloo on CPUs) and share the machine's cores.

        Args:
            threads: CPU threads of this rank; 0 takes OMP_NUM_THREADS, or else divides the cores that this
                process may use among the ranks of this machine.
            hang_timeout: seconds without a sign of life from another rank after which the job ends.

        Raises:
            UserError: this machine has fewer GPUs than ranks.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not threads and not os.environ.get("OMP_NUM_THREADS"):  # torch has read it
            threads = max(1, usable_cores() // local_size)
        if threads:
            torch.set_num_threads(threads)
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"LOCAL_RANK is {local}, but this process sees {torch.cuda.device_count()} GPUs: start "
                    "no more ranks than GPUs on a machine, and let each of them see all"
                )
            torch.cuda.set_device(device)
        else:  # else DeepSpeed warns that it had to look, and transformers imports it if it is there
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if size == 1:
            return cls(0, 1, device)
        waiting = threading.Timer(SLOW, say, [f"rank {os.environ['RANK']} waits for the other {size - 1}"])
        waiting.start()
        try:
            store, rank, _ = next(dist.rendezvous("env://"))
            heartbeat = Heartbeat(rank, size, store, hang_timeout)
            # tensors on the host are sent from there, without waiting for the device
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        finally:
            waiting.cancel()
        return cls(rank, size, device, heartbeat)

    def join(self) -> None:
        """Make a process group of one rank, if there is none: sharding needs one."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def stop(self, well: bool = True) -> None:
        """Leave the process group; after an error only a group of one rank, as others may wait elsewhere."""
        if self.size > 1 and not well:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.heartbeat is not None:
            self.heartbeat.stop()

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
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a user's mistake, made in the block by any rank, on every rank.

        The ranks must not communicate in the block. Where it raises, all of them are at the same place.
        """
        if self.size == 1:
            yield
            return
        mistake: UserError | None = None
        try:
            yield
        except UserError as error:
            mistake = error
        found = self.gather(None if mistake is None else (type(mistake), str(mistake)))
        for kind, text in filter(None, found):
            raise kind(text) from mistake

    def any(self, flag: bool) -> bool:
        """True if the flag is set on some rank."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor, on any device, with rank 0's."""
        if self.size > 1:
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
            if source == self.rank:
                dist.send_object_list([outgoing[index]], target, device=torch.device("cpu"))
            elif target == self.rank:
                box: list[Any] = [None]
                dist.recv_object_list(box, source, device=torch.device("cpu"))
                incoming[index] = box[0]
        return incoming
