"""A rank that dies or fails ends the whole job within seconds, and one line says why.

A collective alone would wait for the missing rank until its timeout, hours later. Here each rank holds a TCP
connection to each other rank, and a thread that sleeps on all of them. The kernel closes the connections of a
process that ends, however it ends: an end of file without goodbye is a death. What is said, a line each:

    cause RANK CODE TEXT    the first cause that the sender knows of, because of which it leaves
    said                    the sender has printed its cause
    bye                     the sender ends well

Everyone passes on the first cause it learns, so that ranks which leave because of it are not taken for more
deaths. The lowest rank that is still there prints it; if that one ends first, the next does. Then each main
thread has GRACE seconds to leave by itself. A rank that is slow or stopped keeps its connections.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, PollSelector

from geo_r1.train.parallel.peers import Peer, Store, meet

GRACE = 2.0  # seconds
USERS_ERROR, OTHER = 2, 1  # exit codes


@dataclass(frozen=True)
class Cause:
    """Why the job ends: of which rank, the exit code of all others, one line."""

    rank: int
    code: int
    text: str


class Lifeline:
    """This rank's tie to the others. Use `start`; a job of one rank needs no thread and no connection."""

    def __init__(self, rank: int, peers: dict[int, Peer]) -> None:
        self.rank = rank
        self._alone = not peers
        self._peers = peers
        self._cause: Cause | None = None
        self._known, self._told = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._orders: deque[Cause | None] = deque()  # of the main thread; None: say goodbye
        self._selector = PollSelector()  # unlike epoll it holds nothing that a fork would share
        if peers:
            self._bell, self._ear = socket.socketpair()  # wakes the thread for an order
            self._selector.register(self._ear, EVENT_READ, rank)
            for other, peer in peers.items():
                self._selector.register(peer.socket, EVENT_READ, other)
            _running.add(self)
            self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
            self._thread.start()

    @classmethod
    def start(cls, rank: int, size: int, store: Store, host: str) -> Lifeline:
        """Tie this rank to all others; returns once every rank has done so.

        Args:
            rank: this process, from 0.
            size: number of ranks.
            store: hands round where each rank listens, and the token that opens a connection.
            host: a machine that all ranks reach, such as the store's; each listens on its interface to it.

        Raises:
            OSError: a rank cannot be reached, or has not come in time; one line that says which.
        """
        return cls(rank, meet(rank, size, store, host) if size > 1 else {})

    def fail(self, reason: str, code: int = USERS_ERROR) -> None:
        """End the job because of this rank: the reason is printed, once in the whole job.

        Does nothing where another cause came first. Returns when the line is out, or after GRACE; the
        process then has the rest of its GRACE to leave by itself (a job of one rank has no such limit).

        Args:
            reason: printed as one line on stderr, with this rank.
            code: the exit code of the others; USERS_ERROR or OTHER.
        """
        text = " ".join(reason.split()) if self._alone else f"rank {self.rank}: {' '.join(reason.split())}"
        cause = Cause(self.rank, code, text)
        if self._thread is not None:
            self._order(cause)
            self._told.wait(GRACE)
        elif not self._told.is_set():
            self._cause = cause
            self._told.set()
            _say(cause.text)

    def close(self) -> None:
        """Say goodbye: from here on this rank's end is no death, and it no longer notices others'."""
        if self._thread is not None:
            self._order(None)
            self._thread.join()
            self._thread = None
            _running.discard(self)
            self._bell.close()

    def reason(self, timeout: float) -> str | None:
        """Why another rank ended the job, if that is known within `timeout` seconds; it is printed anyway."""
        if self._thread is not None:
            self._known.wait(timeout)
        cause = self._cause if self._known.is_set() else None
        return cause.text if cause is not None and cause.rank != self.rank else None

    @property
    def exit_code(self) -> int:
        """Of a rank that leaves because of another: 2 after an error of the user's, else 1."""
        return OTHER if self._cause is None else self._cause.code

    def _order(self, order: Cause | None) -> None:
        self._orders.append(order)
        self._bell.send(b"\0")

    # The thread. All that follows runs in it alone, but _forget.

    def _watch(self) -> None:
        deadline = None
        ready: Iterable[int] = [*self._peers]  # a greeting may have brought more with it
        while True:
            for rank in ready:
                if rank != self.rank:
                    self._listen_to(rank)
                elif self._obey():
                    return self._leave_well()
            if self._cause is not None:
                if deadline is None:
                    deadline = time.monotonic() + GRACE
                    # An interpreter may hang while it ends, when no thread of it runs any more.
                    signal.setitimer(signal.ITIMER_REAL, GRACE + 1)
                    self._tell(f"cause {self._cause.rank} {self._cause.code} {self._cause.text}")
                if not self._told.is_set() and self.rank == min([self.rank, *self._peers]):
                    _say(self._cause.text)
                    self._tell("said")
                    self._told.set()
                self._known.set()
                if time.monotonic() >= deadline:
                    with suppress(OSError, ValueError):  # nobody reads it any more
                        sys.stdout.flush()
                    os._exit(self._cause.code)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = [key.data for key, _ in self._selector.select(left)]

    def _obey(self) -> bool:
        """Carry out the main thread's orders; True: say goodbye."""
        self._ear.recv(4096)
        while self._orders:
            order = self._orders.popleft()
            if order is None:
                return True
            self._cause = self._cause or order
        return False

    def _listen_to(self, rank: int) -> None:
        peer = self._peers[rank]
        peer.read()
        while (line := peer.line()) is not None:
            word, *rest = line.split(maxsplit=3)
            if word == "bye":
                peer.left = True
            elif word == "said":
                self._told.set()
            else:
                assert word == "cause", line
                self._cause = self._cause or Cause(int(rest[0]), int(rest[1]), rest[2])
        if peer.end is not None:
            if not peer.left:
                self._cause = self._cause or Cause(rank, OTHER, f"rank {rank} {peer.end}")
            self._selector.unregister(peer.socket)
            peer.socket.close()
            del self._peers[rank]

    def _tell(self, line: str) -> None:
        for peer in self._peers.values():
            peer.tell(line)

    def _leave_well(self) -> None:
        if self._cause is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._tell("bye")
        for peer in self._peers.values():
            peer.read()  # closed with something unread, a connection is reset and the goodbye may be lost
            peer.socket.close()
        self._ear.close()

    def _forget(self) -> None:
        """In a fork: it must not keep the connections of its parent open, nor speak for it."""
        for peer in self._peers.values():
            peer.socket.close()
        self._bell.close()
        self._ear.close()
        self._thread = None
        self._known, self._told = threading.Event(), threading.Event()  # the old ones' locks may be held


_running: set[Lifeline] = set()


def _after_fork() -> None:
    while _running:
        _running.pop()._forget()


os.register_at_fork(after_in_child=_after_fork)


def _say(text: str) -> None:
    with suppress(OSError):  # stderr may be closed; the job ends all the same
        os.write(2, f"geo_r1: {text}\n".encode(errors="replace"))  # at once: sys.stderr may be locked
