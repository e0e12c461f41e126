"""Any OpenAI-compatible endpoint: many requests at once, and each ends once, as a reply or a failure."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from geo_r1.data.chat import Failure, Messages, Reply, Trouble, chat_messages, reply_of, trouble_of

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


@dataclass(frozen=True)
class EndpointConfig:
    """How an endpoint is asked. The key itself is not here: it stays in the environment.

    Attributes:
        url: where the API begins, such as http://localhost:8000/v1; /v1 is added where there is no path.
        model: as the endpoint names it.
        key_variable: the environment variable with the key; unset for local servers, which need none.
        concurrency: requests in flight.
        timeout: seconds for one try, from the request to the last byte.
        retries: further tries of a request.
        temperature, max_tokens: of the reply; None leaves them to the endpoint.
        seed: of the random share of the waits between tries.

    Raises:
        ValueError: a value is out of range; names the option.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    temperature: float | None = None
    max_tokens: int | None = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.username or parts.password or parts.query or parts.fragment:
            # not shown: a key may stand in it
            raise ValueError(
                f"--url must be http(s)://host[:port]/path; a key belongs in {self.key_variable}"
            )
        if not self.model:
            raise ValueError("--model must name the endpoint's model")
        if self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, got {self.concurrency}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be above 0 seconds, got {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"--retries must be at least 0, got {self.retries}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature must be from 0 to 2, got {self.temperature}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, got {self.max_tokens}")

    @property
    def base_url(self) -> str:
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"

    @classmethod
    def of(cls, options: argparse.Namespace, prefix: str = "", **given: Any) -> EndpointConfig:
        """The endpoint that options of `add_endpoint_arguments` name.

        Args:
            prefix: as given there.
            given: fields that do not come from the options.

        Raises:
            ValueError: the address or the model is missing, or a value is out of range.
        """
        flag = f"--{prefix}-" if prefix else "--"
        start = f"{prefix}_" if prefix else ""
        found = {field.name: getattr(options, start + field.name, None) for field in fields(cls)} | given
        if not found["url"] or not found["model"]:
            raise ValueError(f"an endpoint needs {flag}url and {flag}model")
        return cls(**{name: value for name, value in found.items() if value is not None})

    def key(self) -> str:
        """The key, "none" where the variable is unset.

        Raises:
            ValueError: it cannot be sent.
        """
        key = os.environ.get(self.key_variable, "").strip() or "none"
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{self.key_variable} holds characters that cannot be part of a key")
        return key


def add_endpoint_arguments(
    parser: argparse._ActionsContainer, prefix: str = "", sampling: bool = True
) -> None:
    """Add the options that `EndpointConfig.of` reads.

    Args:
        prefix: "judge" makes them --judge-url and so on.
        sampling: False leaves out --model, --temperature and --max-tokens, for who has options of that name.
    """
    flag, default = f"--{prefix}-" if prefix else "--", EndpointConfig("http://localhost", "any")
    parser.add_argument(f"{flag}url", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    parser.add_argument(
        f"{flag}key-variable",
        default=default.key_variable,
        metavar="NAME",
        help="environment variable with the key, which goes to the url; unset for none (%(default)s)",
    )
    numbers: list[tuple[str, type, Any, str]] = [
        ("concurrency", int, default.concurrency, "requests at once"),
        ("timeout", float, default.timeout, "seconds for one try"),
        ("retries", int, default.retries, "further tries of a request"),
    ]
    if sampling:
        parser.add_argument(f"{flag}model", help="the model's name at the endpoint")
        numbers.append(("max-tokens", int, default.max_tokens, "tokens of a reply"))
        numbers.append(("temperature", float, None, "of the reply"))
    for name, kind, value, what in numbers:
        told = "the endpoint's own" if value is None else "%(default)s"
        parser.add_argument(f"{flag}{name}", type=kind, default=value, help=f"{what} ({told})")


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
