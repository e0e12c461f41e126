"""Ends the job when a rank gives no sign of life: its process was stopped, or its machine is gone.

When a rank dies, torchrun ends the others. When one hangs, the others would wait in a collective for hours.
So a thread of every rank counts in the job's store, and a second one watches all counts; its own stands still
if the store does not answer. It measures time in beats, so a job that was suspended can be resumed.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from geo_r1.errors import OUTAGE, say

BEATS = 10  # per timeout
ENDED = 1 << 40  # no rank counts that far
TIME_TO_MEET = timedelta(seconds=30)


def say_once(message: str) -> None:
    """Say why the job ends, unless another rank has; returns when it is said."""
    with suppress(dist.DistError, ValueError):  # ValueError: the environment names no store
        store, *_ = next(dist.rendezvous("env://", timeout=TIME_TO_MEET))
        if store.add("geo_r1/failed", 1) == 1:
            say(message)
            store.set("geo_r1/said", "")
        else:  # torchrun would end the other rank as soon as this one ends
            store.wait(["geo_r1/said"], TIME_TO_MEET)
        return
    say(message)  # the store is gone, or there was none


class Heartbeat:
    """Two threads that end this process, with one line, `timeout` seconds after another's last beat."""

    def __init__(self, rank: int, size: int, store: dist.Store, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._store = store.clone()  # type: ignore[attr-defined]  # the other may be waiting
        self._keys = [f"geo_r1/heartbeat/{other}" for other in range(size)]
        self._missed = [0] * size
        self._over = threading.Event()
        for key in self._keys:
            self._store.add(key, 0)
        for task in (self._beat, self._watch):
            threading.Thread(target=task, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """This rank ends well: others no longer wait for it, nor it for them."""
        self._over.set()
        with suppress(dist.DistError):  # the store ends with rank 0 where torchrun does not hold it
            self._store.add(self._keys[self.rank], ENDED)

    def _beat(self) -> None:
        seen = [0] * len(self._keys)
        with suppress(dist.DistError):
            while not self._over.wait(self.timeout / BEATS):
                self._store.add(self._keys[self.rank], 1)
                for rank, count in enumerate(map(int, self._store.multi_get(self._keys))):
                    if count != seen[rank] or count >= ENDED:
                        seen[rank], self._missed[rank] = count, 0

    def _watch(self) -> None:
        while not self._over.wait(self.timeout / BEATS):
            self._missed = [missed + 1 for missed in self._missed]
            hung = [rank for rank, missed in enumerate(self._missed) if missed > BEATS]
            waited = f"{self.timeout:g} s (run.hang_timeout)"
            if self.rank in hung:
                say(f"the store of the job, on the machine of rank 0, has not answered for {waited}")
            elif hung:
                ranks = ", ".join(map(str, hung))
                say_once(f"rank {ranks} has not answered for {waited}: stopped, or its machine is gone")
            if hung:
                os._exit(OUTAGE)
