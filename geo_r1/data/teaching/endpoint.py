"""Any OpenAI-compatible endpoint: many requests at once, and each ends once, as a reply or a failure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from geo_r1.data.teaching.chat import Failure, Messages, Reply, Trouble, chat_messages, reply_of, trouble_of
from geo_r1.data.teaching.endpoint_options import EndpointConfig, add_endpoint_arguments

__all__ = [
    "Endpoint",
    "EndpointConfig",
    "Failure",
    "Messages",
    "Reply",
    "add_endpoint_arguments",
    "chat_messages",
]

MAX_REPLY = 2**20  # bytes of a response: a chain of thought takes some kilobytes
MAX_ERROR = 2**16  # bytes that are read of an error's page
MAX_WAIT = 60.0  # seconds between two tries, unless the server asks for more
SHORTEST_SECRET = 8  # shorter keys are stand-ins ("none", "EMPTY") that may well be words of a reply

pause = asyncio.sleep  # between two tries


class Endpoint:
    """Asks many things at once, with retries; use it in a `with` statement, in a thread with no event loop.

    Timeouts, lost connections, the statuses 408, 409, 425, 429 and from 500, and replies that are rubbish are
    tried again, after a wait that doubles, of which a random half stays, or that the server asks for.

    Raises:
        ValueError: the openai package is missing, or the key or the address cannot be used.
    """

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("an endpoint needs openai: pip install 'geo_r1[data]'") from None
        self.config = config
        self._key = config.key()
        self._http = _http_library()
        self._responses = 0  # of any kind: somebody is there
        try:
            self._client = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=config.base_url,
                max_retries=0,
                timeout=self._http.Timeout(config.timeout, connect=min(config.timeout, 10.0)),
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False, event_hooks={"response": [self._check_status]}
                ),
            )
        except self._http.InvalidURL as error:
            raise ValueError(f"--url {config.url} is no address: {error}") from None
        self._runner = asyncio.Runner()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        with self._runner:
            self._runner.run(self._close())

    def run(
        self, requests: Iterable[tuple[str, Callable[[], Messages]]]
    ) -> Iterator[tuple[str, Reply | Failure]]:
        """Ask everything, and yield results as they come.

        Args:
            requests: a name, and what makes the messages; drawn and called only when about to be sent. A
                ValueError of the latter is the failure of that request.

        Raises:
            ValueError: no request can succeed: the endpoint cannot be reached, or does not take the key or
                the model. Names the endpoint.
            KeyboardInterrupt: by Ctrl-C; what was in flight is dropped.
        """
        waiting, loop = iter(requests), self._runner.get_loop()
        flying: dict[asyncio.Task[Reply | Failure | ValueError], str] = {}
        try:
            while True:
                for name, make in islice(waiting, self.config.concurrency - len(flying)):
                    flying[loop.create_task(self._answer(name, make))] = name
                if not flying:
                    return
                hopeless = None
                for task in self._runner.run(_first_of(flying)):
                    name, outcome = flying.pop(task), task.result()
                    if isinstance(outcome, ValueError):
                        hopeless = outcome
                    else:
                        yield name, outcome
                if hopeless is not None:
                    raise hopeless
        finally:
            if left := [task for task in flying if not task.done()]:
                self._runner.run(_cancel(left))

    async def _answer(self, name: str, make: Callable[[], Messages]) -> Reply | Failure | ValueError:
        """One request from its first try to its end; a ValueError is the end of all."""
        try:
            messages = await asyncio.to_thread(make)  # pictures are decoded there
        except ValueError as error:
            return Failure(self._shown(str(error)))
        rng = random.Random(f"{self.config.seed}/{name}/retry")
        responses = self._responses
        for tries in range(1, self.config.retries + 2):
            try:
                reply = await self._try(messages)
                return replace(reply, text=self._without_key(reply.text))
            except Trouble as caught:
                trouble = caught
            if not trouble.again or tries > self.config.retries:
                break
            responses = self._responses if tries == 1 else responses
            wait = min(MAX_WAIT, 0.5 * 2 ** (tries - 1)) * rng.uniform(0.5, 1)
            await pause(max(wait, trouble.wait))
        if trouble.unreached and responses == self._responses:  # nobody else has been answered meanwhile
            return ValueError(self._shown(f"{self.config.base_url} cannot be reached: {trouble}"))
        if trouble.hopeless:
            return ValueError(self._shown(f"{self.config.base_url}, model {self.config.model!r}: {trouble}"))
        return Failure(self._shown(f"{trouble} ({tries} tries)" if tries > 1 else f"{trouble}"))

    async def _try(self, messages: Messages) -> Reply:
        import anyio
        import openai

        http, config = self._http, self.config
        # OpenAI's own models know only the new name, many local servers only the old one
        limit = "max_completion_tokens" if ".openai.com/" in config.base_url else "max_tokens"
        settings = {limit: config.max_tokens, "temperature": config.temperature}
        create: Any = self._client.chat.completions.with_streaming_response.create
        given = {key: value for key, value in settings.items() if value is not None}
        try:
            async with (
                asyncio.timeout(config.timeout),  # of all: the client's own begins anew with every byte
                create(model=config.model, messages=messages, **given) as response,
            ):
                body, whole = await _first_bytes(response.iter_bytes(), MAX_REPLY)
        except UnicodeEncodeError as error:
            raise Trouble(f"the messages cannot be written as UTF-8: {error.reason}") from None
        except (TimeoutError, openai.APITimeoutError, http.TimeoutException) as error:
            unreached = isinstance(error.__cause__, http.ConnectTimeout)
            raise Trouble(f"no reply within {config.timeout:g} s", again=True, unreached=unreached) from None
        except (openai.APIConnectionError, http.HTTPError, OSError, anyio.EndOfStream) as error:
            cause = error.__cause__ or error
            if isinstance(cause, Trouble):  # of _check_status, which some versions of the client wrap
                raise cause from None
            unreached = isinstance(cause, http.ConnectError)
            reason = str(cause) or type(cause).__name__
            raise Trouble(f"the connection failed: {reason}", again=True, unreached=unreached) from None
        if not whole:
            raise Trouble(f"the response is longer than {MAX_REPLY >> 20} MiB")
        return reply_of(bytes(body))

    async def _check_status(self, response: Any) -> None:
        """Called by the client before it reads a body, which may be endless."""
        self._responses += 1
        if not response.is_success:
            body, _ = await _first_bytes(response.aiter_bytes(), MAX_ERROR)
            raise trouble_of(response.status_code, response.headers.get("retry-after", ""), bytes(body))

    async def _close(self) -> None:
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})
        await self._client.close()

    def _shown(self, text: str) -> str:
        """One line for people: what an endpoint says may hold the key, line ends and terminal codes."""
        line = " ".join(self._without_key(text).split())
        return "".join(character for character in line if character.isprintable())[:400]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


def _http_library() -> Any:
    """What the openai client is built upon: httpx2 since its version 3, httpx before."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        import httpx

        return httpx


async def _first_of(tasks: Iterable[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    return (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]


async def _cancel(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def _first_bytes(chunks: AsyncIterator[bytes], limit: int) -> tuple[bytearray, bool]:
    """The first bytes of a body, up to a limit, and whether these are all."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            return body[:limit], False
    return body, True
