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
from pydantic import BaseModel, ValidationError

from geo_r1.errors import UserError, one_line

CONNECT = 10.0  # seconds, at most, until a server takes a connection
MOST_REQUESTS = 256  # at a time
LONGEST_ANSWER = 1 << 28  # bytes; a group of 64 completions of 16 K tokens takes a fifth of it

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Unavailable(Exception):  # noqa: N818  # never leaves this package
    """A server or one of its workers does not answer as it should; it may do so when asked again."""


class HttpClient:
    """Requests to one server, made by coroutines that `run` runs, one at a time.

    The environment's VLLM_API_KEY is sent, if there is one.

    Args:
        url: such as http://host:8000, as the recipe's `rollout.server_url`.
        timeout: seconds that a request may take.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = httpx2.URL(url)
        self.url = url
        self.address = (parts.host, parts.port or (443 if parts.scheme == "https" else 80))
        key = os.environ.get("VLLM_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": parts,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx2.Timeout(None, connect=min(CONNECT, timeout)),
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            "verify": ssl.create_default_context(),
            "trust_env": False,  # no proxy stands between a trainer and its server
        }
        self._timeout = timeout
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
            self._slots = asyncio.Semaphore(MOST_REQUESTS)
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
        status, _ = await self._ask("GET", path)
        if status >= 500:
            raise Unavailable(f"{path}: {status}")
        return status

    async def post(self, path: str, body: Any) -> None:
        """Ask for something that has no answer but its status; raises as `read`."""
        await self._content("POST", path, body)

    async def read(
        self,
        answer: type[M],
        method: str,
        path: str,
        body: Any = None,
        who: str = "",
        *,
        unlimited: bool = False,
    ) -> M:
        """An answer in JSON, checked.

        Args:
            answer: its model.
            body: bytes of JSON, or a value to write as JSON.
            who: the start of an error's message.
            unlimited: True if the request may take as long as it likes.

        Raises:
            UserError: the server refuses; has its message.
            Unavailable: there is no answer, or none of that form.
        """
        content = await self._content(method, path, body, who, unlimited=unlimited)
        try:
            return answer.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise Unavailable(f"{path}: its answer is of another form: {place} {first['msg']}") from error

    async def _content(
        self, method: str, path: str, body: Any, who: str = "", *, unlimited: bool = False
    ) -> bytes:
        status, content = await self._ask(method, path, body, unlimited=unlimited)
        if status >= 500 or status in (408, 429):
            raise Unavailable(f"{path}: {status} {message_of(content)}")
        if status >= 400:
            raise UserError(f"{who}{self.url} refuses {path}: {status} {message_of(content)}")
        return content

    async def _ask(
        self, method: str, path: str, body: Any = None, *, unlimited: bool = False
    ) -> tuple[int, bytes]:
        """Status and content of a whole response; raises Unavailable if there is none."""
        options: dict[str, Any] = {}
        if body is not None:
            options["content"] = body if isinstance(body, bytes) else json.dumps(body).encode()
            options["headers"] = {"Content-Type": "application/json"}
        limit = None if unlimited else self._timeout
        content = bytearray()
        try:
            async with (
                self._slots,
                asyncio.timeout(limit),
                self._client.stream(method, path, **options) as response,
            ):
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > LONGEST_ANSWER:
                        raise Unavailable(f"{path}: its answer has more than {LONGEST_ANSWER >> 20} MiB")
        except httpx2.HTTPError as error:
            raise Unavailable(f"{path}: {type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise Unavailable(f"{path}: no whole answer within {limit:g} s") from error
        return response.status_code, bytes(content)


def message_of(content: bytes) -> str:
    """A server's message about an error, on one line."""
    text = content[:4096].decode(errors="replace")
    with suppress(ValueError, AttributeError, LookupError, TypeError):  # not JSON, or of another form
        told = json.loads(content)
        text = told["error"]["message"] if "error" in told else told.get("detail", text)
    return one_line(text)[:300]
