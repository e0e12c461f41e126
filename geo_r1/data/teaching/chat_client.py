"""Requests to an OpenAI-compatible endpoint; needs the openai package, which does the retries.

The package waits and retries after lost connections, timeouts, and statuses 408, 409, 429 and 500 or above.
This module limits a response's bytes and total time. It reports a malformed reply as a lost connection, so
that the package retries it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
import openai

from geo_r1.data.teaching.chat import MAX_REPLY, Failure, Messages, Reply, reply_of
from geo_r1.data.teaching.endpoint_options import EndpointConfig
from geo_r1.errors import OutageError, UserError, one_line

try:
    import httpx2 as httpx  # the openai package uses it since version 3
except ImportError:
    import httpx  # type: ignore[no-redef]

MAX_ERROR = 2**16  # bytes read from an error response
MAX_WAIT = 120.0  # seconds; if a server asks for a longer wait, the openai package gives up
SHORTEST_SECRET = 8  # shorter keys are placeholders ("none", "EMPTY") that a reply may contain as words
FOR_ALL_STATUS = (401, 402, 403, 404, 405)  # all requests would fail, as they would after a redirect
FOR_ALL_CODES = ("model_not_found", "insufficient_quota", "unsupported_parameter")


class ChatClient:
    """Sends requests to an endpoint and describes all kinds of failures in the same way.

    Raises:
        UserError: the key or the address cannot be used.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config, self._key, self._http = config, config.key(), _BoundedClient(config.timeout)
        try:
            self._api = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=config.base_url,
                max_retries=config.retries,
                timeout=httpx.Timeout(config.timeout, connect=min(config.timeout, 10.0)),
                http_client=self._http,
            )
        except httpx.InvalidURL as error:
            raise UserError(f"--url {config.url} is not a valid address: {error}") from None

    async def ask(self, messages: Messages) -> Reply | Failure:
        """Send one request, with retries if they may help.

        Raises:
            UserError: no request can succeed: the endpoint is unreachable, or refuses the key or the model.
            OutageError: the endpoint answered before and has gone.
        """
        config, responses = self._config, self._http.responses
        # OpenAI's own models know only the new name, and many local servers only the old one
        limit = "max_completion_tokens" if ".openai.com/" in config.base_url else "max_tokens"
        settings = {limit: config.max_tokens, "temperature": config.temperature}
        create: Any = self._api.chat.completions.with_raw_response.create
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            response = await create(model=config.model, messages=messages, **given)
        except UnicodeEncodeError as error:
            return Failure(f"the messages cannot be written as UTF-8: {error.reason}")
        except openai.APIConnectionError as error:
            unreached = isinstance(error.__cause__, httpx.ConnectError)
            if unreached and responses == self._http.responses:  # no other request was answered meanwhile
                kind = OutageError if responses else UserError
                raise kind(self.shown(f"{config.base_url} cannot be reached: {error.__cause__}")) from None
            return Failure(self.shown(f"{error.__cause__}{_tries(error)}"))
        except openai.APIStatusError as error:
            said = error.body
            if isinstance(said, Mapping):
                said = said.get("message") or said.get("detail") or said
            reason = f"status {error.status_code}: {said}"
            refused = error.status_code < 400 or error.status_code in FOR_ALL_STATUS
            if refused or error.param == "model" or error.code in FOR_ALL_CODES:
                message = f"{config.base_url}, model {config.model!r}: {reason}"
                raise UserError(self.shown(message)) from None
            return Failure(self.shown(f"{reason}{_tries(error)}"))
        reply = reply_of(response.content)
        if isinstance(reply, Failure):
            return Failure(self.shown(reply.reason))
        return replace(reply, text=self._without_key(reply.text))

    async def close(self) -> None:
        await self._api.close()

    def shown(self, message: object) -> str:
        """One printable line; an endpoint's words may contain the key, line breaks and terminal codes."""
        return one_line(self._without_key(str(message)))[:400]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


def _tries(error: openai.APIConnectionError | openai.APIStatusError) -> str:
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return f" ({retries + 1} tries)" if retries else ""


class _BoundedClient(openai.DefaultAsyncHttpxClient):
    """Reads each whole response, within limits on its bytes and on the time from request to last byte.

    Attributes:
        responses: number of responses with any status; if it grows, the endpoint is up.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(follow_redirects=False)
        self._seconds = seconds
        self.responses = 0

    async def send(self, request: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(self._seconds):  # the client's own timeout restarts with every byte
                response = await super().send(request, **{**options, "stream": True})
                self.responses += 1
                body = await _first_bytes(response, MAX_REPLY if response.is_success else MAX_ERROR)
        except (OSError, httpx.TransportError, anyio.EndOfStream) as error:
            late = isinstance(error, TimeoutError | httpx.TimeoutException)
            reason = f"the connection failed: {str(error) or type(error).__name__}"
            reason = f"no reply within {self._seconds:g} s" if late else reason
            unreached = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise (httpx.ConnectError if unreached else httpx.ReadError)(reason, request=request) from error
        headers = {}
        if response.is_success:
            if isinstance(reply := reply_of(body), Failure) and reply.again:
                raise httpx.RemoteProtocolError(reply.reason, request=request)
        else:
            body = body[:MAX_ERROR]
            headers = {name: value for name, value in response.headers.items() if "retry" in name}
            with suppress(KeyError, ValueError):  # the header is missing, or is a date
                headers["retry-after"] = str(min(float(headers["retry-after"]), MAX_WAIT))
            if b'"insufficient_quota"' in body:
                headers["x-should-retry"] = "false"
        return httpx.Response(response.status_code, headers=headers, content=body, request=request)


async def _first_bytes(response: Any, limit: int) -> bytes:
    """A response's body; if it is longer than `limit` bytes, a little more than its first `limit`."""
    body = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > limit:
                break
    finally:
        await response.aclose()
    return bytes(body)
