"""Requests to one server that answers in JSON, of any number of threads, which can all be cut short."""

from __future__ import annotations

import http.client
import json
import os
import socket
from contextlib import suppress
from threading import Event
from typing import Any
from urllib.parse import urlsplit

CONNECT = 10.0  # seconds, at most, until a server takes a connection


class Unavailable(Exception):  # noqa: N818  # of this package alone
    """A server does not answer, or not as it should: it may when it is asked again."""


class HttpClient:
    """Requests to one server. Leaving its context ends those of other threads; until then they may go on."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url if "//" in url else f"//{url}")
        if parts.scheme not in ("", "http", "https") or not parts.hostname:
            raise ValueError(f"a server's address is like http://host:8000, not {url}")
        secure = parts.scheme == "https"
        self.url, self._path, self._timeout = url, parts.path.rstrip("/"), timeout
        self.address = (parts.hostname, parts.port or (443 if secure else 80))
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self.stopped = Event()
        self._closed = False
        self._open: set[socket.socket] = set()

    def __enter__(self) -> None:
        if not self._closed:
            self.stopped.clear()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.cut()

    def close(self) -> None:
        """End all requests, and those that are yet to come."""
        self._closed = True
        self.__exit__()

    def cut(self) -> None:
        """End the requests that are under way."""
        for connection in tuple(self._open):
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def probe(self, path: str) -> int:
        """The status of a path, where the server is well enough to tell."""
        status, _ = self.ask("GET", path)
        if status >= 500:
            raise Unavailable(f"{path}: {status}")
        return status

    def json(self, method: str, path: str, body: Any = None, who: str = "", *, lasts: bool = False) -> Any:
        """Ask, and read the answer.

        Args:
            body: bytes of JSON, or what to make them of.
            who: what an error begins with.
            lasts: wait for as long as it takes.

        Raises:
            ValueError: the server refuses; has its message.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = self.ask(method, path, data, lasts=lasts)
        if status >= 500 or status in (408, 429):
            raise Unavailable(f"{path}: {status} {message_of(answer)}")
        if status >= 400:
            raise ValueError(f"{who}{self.url} refuses {path}: {status} {message_of(answer)}")
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise Unavailable(f"{path}: its answer is not JSON") from error

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, lasts: bool = False
    ) -> tuple[int, bytes]:
        """Status and body of an answer; raises Unavailable where there is none."""
        connection = self._kind(*self.address, timeout=min(CONNECT, self._timeout))
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            channel = connection.sock
            channel.settimeout(None if lasts else self._timeout)
            self._open.add(channel)
            try:
                if self.stopped.is_set():
                    raise Unavailable("the call was given up")
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
            finally:
                self._open.discard(channel)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


def message_of(answer: bytes) -> str:
    """What a server says of an error, on one line."""
    text = answer.decode(errors="replace")
    with suppress(ValueError, AttributeError, TypeError):  # not JSON, or of another form
        told = json.loads(text)
        text = str(
            told.get("error", told).get("message", text) if "error" in told else told.get("detail", text)
        )
    return " ".join(text.split())[:300]
