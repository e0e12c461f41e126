"""Requests to one server that answers in JSON, many at a time, which another thread can cut short."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import httpx2

from geo_r1.errors import UserError, one_line

CONNECT = 10.0  # seconds, at most, until a server takes a connection
MOST_REQUESTS = 256  # at a time

T = TypeVar("T")


class Unavailable(Exception):  # noqa: N818  # never leaves this package
    """A server or one of its workers does not answer as it should; it may do so when asked again."""


class HttpClient:
    """Requests to one server, made by coroutines that `run` runs, one at a time.

    The environment's VLLM_API_KEY is sent, if there is one.

    Args:
        url: such as http://host:8000, as the recipe's `rollout.server_url`.
        timeout: seconds to wait for the next bytes of an answer.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = httpx2.URL(url)
        self.url = url
        self.address = (parts.host, parts.port or (443 if parts.scheme == "https" else 80))
        key = os.environ.get("VLLM_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": parts,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx2.Timeout(timeout, connect=min(CONNECT, timeout), pool=None),
            "limits": httpx2.Limits(max_connections=MOST_REQUESTS, max_keepalive_connections=0),
            "verify": ssl.create_default_context(),
            "trust_env": False,  # no proxy stands between a trainer and its server
        }
        self._closed = False
        self._stop: Callable[[], object] | None = None

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine that asks; raises Unavailable if `close` cuts it short."""

        async def within_client() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._stop = lambda: loop.call_soon_threadsafe(task.cancel)
            if self._closed:
                raise Unavailable("the client is closed")
            async with httpx2.AsyncClient(**self._options) as self._client:
                return await call()

        try:
            return asyncio.run(within_client())
        except asyncio.CancelledError:
            raise Unavailable("the call was given up") from None
        finally:
            self._stop = None

    def close(self) -> None:
        """End the requests that another thread waits for; no more can be made."""
        self._closed = True
        if (stop := self._stop) is not None:
            with suppress(RuntimeError):  # they have just ended by themselves
                stop()

    async def status(self, path: str) -> int:
        """The status of a path; raises Unavailable if the server is too unwell to tell."""
        response = await self.ask("GET", path)
        if response.status_code >= 500:
            raise Unavailable(f"{path}: {response.status_code}")
        return response.status_code

    async def json(self, method: str, path: str, body: Any = None, who: str = "", **options: Any) -> Any:
        """An answer's value.

        Args:
            body: bytes of JSON, or a value to write as JSON.
            who: the start of an error's message.
            options: of httpx2.

        Raises:
            UserError: the server refuses; has its message.
            Unavailable: there is no answer, or none that can be read.
        """
        response = await self.ask(method, path, body, **options)
        status = response.status_code
        if status >= 500 or status in (408, 429):
            raise Unavailable(f"{path}: {status} {message_of(response)}")
        if status >= 400:
            raise UserError(f"{who}{self.url} refuses {path}: {status} {message_of(response)}")
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise Unavailable(f"{path}: its answer is not JSON") from error

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """A whole response; raises Unavailable if there is none."""
        if body is not None:
            options["content"] = body if isinstance(body, bytes) else json.dumps(body).encode()
            options["headers"] = {"Content-Type": "application/json"}
        try:
            return await self._client.request(method, path, **options)
        except httpx2.HTTPError as error:
            raise Unavailable(f"{path}: {type(error).__name__}: {error}") from error


def message_of(response: httpx2.Response) -> str:
    """A server's message about an error, on one line."""
    text = response.text
    with suppress(ValueError, AttributeError, LookupError, TypeError):  # not JSON, or of another form
        told = response.json()
        text = told["error"]["message"] if "error" in told else told.get("detail", text)
    return one_line(text)[:300]
