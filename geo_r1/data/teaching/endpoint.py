"""Many concurrent requests to an OpenAI-compatible endpoint; each ends as one reply or one failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from geo_r1.data.teaching.chat import Failure, Messages, Reply, chat_messages
from geo_r1.data.teaching.endpoint_options import EndpointConfig, add_endpoint_arguments
from geo_r1.errors import UserError

__all__ = [
    "Endpoint",
    "EndpointConfig",
    "Failure",
    "Messages",
    "Reply",
    "add_endpoint_arguments",
    "chat_messages",
]


class Endpoint:
    """Sends many requests at once. Use it in a `with` statement, in a thread without an event loop.

    Raises:
        UserError: the openai package is missing, or the key or the address cannot be used.
    """

    def __init__(self, config: EndpointConfig) -> None:
        try:
            from geo_r1.data.teaching.chat_client import ChatClient
        except ImportError:
            raise UserError("an endpoint needs openai: pip install 'geo_r1[data]'") from None
        self._concurrency, self._client = config.concurrency, ChatClient(config)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        with self._runner:
            self._runner.run(self._close())

    def run(
        self, requests: Iterable[tuple[str, Callable[[], Messages]]]
    ) -> Iterator[tuple[str, Reply | Failure]]:
        """Send all requests; yields results as they come.

        Args:
            requests: names, and functions that make the messages just before they are sent. If one raises a
                UserError, its request fails.

        Raises:
            UserError, OutageError: no request can succeed; see `ChatClient.ask`.
            KeyboardInterrupt: by Ctrl-C; requests in flight are dropped.
        """
        waiting, loop = iter(requests), self._runner.get_loop()
        flying: set[asyncio.Task[tuple[str, Reply | Failure]]] = set()
        try:
            while True:
                more = islice(waiting, self._concurrency - len(flying))
                flying |= {loop.create_task(self._answer(name, make)) for name, make in more}
                if not flying:
                    return
                done, _ = self._runner.run(asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))
                flying -= done
                errors = [error for task in done if (error := task.exception())]
                yield from (task.result() for task in done if not task.exception())
                if errors:
                    raise errors[0]
        finally:
            if left := [task for task in flying if not task.done()]:  # empty once the endpoint is closed
                self._runner.run(_cancel(left))

    async def _answer(self, name: str, make: Callable[[], Messages]) -> tuple[str, Reply | Failure]:
        try:
            messages = await asyncio.to_thread(make)  # decodes images
        except UserError as error:
            return name, Failure(self._client.shown(error))
        return name, await self._client.ask(messages)

    async def _close(self) -> None:
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})
        await self._client.close()


async def _cancel(tasks: Iterable[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
