"""Connections of each rank to each other rank, over TCP.

A rank listens on a port of its own, and hands round its address and a token through a store that all reach.
Who connects shows the token and its rank. Once all ranks are there, nobody listens any more.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import sys
import time
from contextlib import ExitStack, suppress
from selectors import EVENT_READ, PollSelector
from typing import Protocol

SECONDS_TO_MEET = 120.0  # seconds from the first rank's coming to the last's
LONGEST = 2000  # bytes of a line: it fits into any socket's buffer, so nobody waits to send it


class Store(Protocol):
    """What all ranks can write to and read from, such as a torch.distributed store."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes:
        """The value, once it is set."""
        ...


class Peer:
    """A connection cut into lines; neither reading nor telling ever waits."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.left = False  # it has said goodbye
        self.end: str | None = None  # what became of the other side, once nothing more can come
        self.buffer = b""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a machine that vanished without closing: 10 s of silence, then 3 tries
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def read(self) -> None:
        """Take in what has arrived."""
        try:
            while chunk := self.socket.recv(4096):
                self.buffer += chunk
                if len(self.buffer) > 4 * LONGEST:
                    self.end = "says too much"
                    return
            self.end = "was killed (no goodbye)"
        except BlockingIOError:
            pass
        except ConnectionResetError:  # it ended before it had read everything
            self.end = "was killed (no goodbye)"
        except OSError as error:
            self.end = f"cannot be reached any more ({error.strerror})"

    def line(self) -> str | None:
        """The next whole line, if there is one."""
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline:
            return None
        self.buffer = rest
        return line.decode(errors="replace")

    def tell(self, line: str) -> None:
        """Send a line, cut to LONGEST bytes."""
        with suppress(OSError):  # it has ended, which reading tells
            self.socket.send(line.encode(errors="replace")[:LONGEST] + b"\n")


def meet(rank: int, size: int, store: Store, host: str) -> dict[int, Peer]:
    """Connect to every lower rank, and be connected to by every higher one; returns them by rank.

    Raises:
        OSError: a rank cannot be reached, or has not come within SECONDS_TO_MEET; one line that says which.
    """
    token = secrets.token_hex(16)
    with ExitStack() as opened, _listen(host, size) as listener:
        address, port = listener.getsockname()[:2]
        store.set(f"lifeline/{rank}", f"{address} {port} {token}")
        peers = {}
        for lower in range(rank):
            address, port, theirs = store.get(f"lifeline/{lower}").decode().split()
            try:
                connection = socket.create_connection((address, int(port)), timeout=SECONDS_TO_MEET)
            except OSError as error:
                raise ConnectionError(
                    f"rank {rank} cannot reach rank {lower} at {address} port {port} ({error}); "
                    f"{host!r} must name an interface that all machines of the job reach"
                ) from error
            peers[lower] = Peer(opened.enter_context(connection))
            peers[lower].tell(f"{theirs} {rank}")
        peers |= _welcome(listener, token, {*range(rank + 1, size)}, opened)
        opened.pop_all()
    return peers


def _listen(host: str, size: int) -> socket.socket:
    """A free port of the interface that leads to `host`."""
    for family, kind, protocol, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with (
            suppress(OSError),
            socket.socket(family, kind, protocol) as route,
        ):  # or the next of its addresses
            route.connect(target)  # sends nothing: only asks the kernel for the way
            return socket.create_server((route.getsockname()[0], 0), family=family, backlog=size + 16)
    raise ConnectionError(f"no interface of this machine leads to {host!r}")


def _welcome(listener: socket.socket, token: str, missing: set[int], opened: ExitStack) -> dict[int, Peer]:
    """Wait for the missing ranks; whoever else comes, or comes without the token, is dropped."""
    joined: dict[int, Peer] = {}
    deadline = time.monotonic() + SECONDS_TO_MEET
    listener.setblocking(False)
    selector = PollSelector()
    selector.register(listener, EVENT_READ)
    while missing:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"ranks {sorted(missing)} have not come within {SECONDS_TO_MEET:g} s")
        for key, _ in selector.select(left):
            if key.data is None:
                with suppress(BlockingIOError, ConnectionError):  # it has gone again
                    connection = opened.enter_context(listener.accept()[0])
                    selector.register(connection, EVENT_READ, Peer(connection))
                continue
            peer: Peer = key.data
            peer.read()
            greeting = peer.line()
            if greeting is None and peer.end is None:
                continue
            selector.unregister(peer.socket)
            shown, _, number = (greeting or "").partition(" ")
            if hmac.compare_digest(shown.encode(), token.encode()) and int(number) in missing:
                missing.remove(int(number))
                joined[int(number)] = peer
            else:
                peer.socket.close()
    for key in selector.get_map().values():
        if key.data is not None:
            key.data.socket.close()
    return joined
