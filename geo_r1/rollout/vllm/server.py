"""Sampling by a vLLM server: prompts go to it over HTTP, weights over TCP (`geo_r1.rollout.vllm.channel`).

The server may die and come back at any time. Completions that have come by then are kept, and only the others
are asked for again. Every load gives the server a version, and every completion names the version it was
sampled with: a restarted server has none, so none of its completions is used before it has weights again.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from geo_r1.errors import UserError
from geo_r1.files import data_uri
from geo_r1.models import EncodedPrompt
from geo_r1.rollout.engine import Copies, EngineLost, WeightsLost
from geo_r1.rollout.sampling import Completion, SamplingConfig
from geo_r1.rollout.vllm.answers import AllDescribed, AllReceived, Described, Generated, WeightInfo
from geo_r1.rollout.vllm.channel import WeightSender
from geo_r1.rollout.vllm.http_client import HttpClient, Unavailable
from geo_r1.rollout.vllm.requests import (
    check_expanded,
    common_options,
    images_of,
    read_completions,
    sampling_params,
)

GENERATE = "/inference/v1/generate"
NO_LOGPROB = -9999.0  # the server writes it for NaN and for minus infinity
LONGEST_PAUSE = 5.0  # seconds between two attempts

T = TypeVar("T")


class ServerEngine:
    """A `RolloutEngine` at a server that `serve_command` started.

    Args:
        url: such as http://host:8000.
        end_token_ids: each ends a completion.
        vision_token_ids: never sampled.
        run: a name that the clients of one run share; one of them loads and all sample. None: one client.
        timeout: seconds that a request may take, and that sending weights may stand still.
        patience: seconds to go on asking a server that does not answer.
        say: called with a message when the wait for a server begins.

    Raises:
        UserError: the server was started otherwise; has the whole command.
        EngineLost: there is no server within `patience`.
    """

    copies: Copies = "one"

    def __init__(
        self,
        url: str,
        *,
        end_token_ids: Collection[int],
        vision_token_ids: Collection[int],
        run: str | None = None,
        timeout: float,
        patience: float,
        say: Callable[[str], object] = print,
    ) -> None:
        self._http = HttpClient(url, timeout)
        self._end_token_ids, self._vision_token_ids = set(end_token_ids), set(vision_token_ids)
        self._run = run or uuid.uuid4().hex
        self._timeout, self._patience, self._say = timeout, patience, say
        self._start = f"start it with: python -m geo_r1.train RECIPE --serve=HOST:{self._http.address[1]}"
        self._version: str | None = None  # of this client's last load
        # Name and checksum of the base weights that all workers keep after a good load with adapters.
        self._base: tuple[str, int] | None = None
        self._max_model_len = 0
        self._failing_since: float | None = None
        # Answers of a call that has not ended well, by request; the checksum of the weights that gave them.
        self._kept: dict[bytes, list[Completion]] = {}
        self._kept_of = ""
        self._http.run(self._check_server)
        self._failing_since = None

    @property
    def holds_base(self) -> bool:
        """True if the next load is of adapters alone; false after a failed one and after `WeightsLost`."""
        return self._base is not None

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Send weights to every worker of the server; see `RolloutEngine.load`.

        If an earlier `sample` ended in `WeightsLost` and these are the weights that it began with, the same
        call asks only for the completions that had not come.

        Raises:
            UserError: a worker cannot connect, or vLLM cannot load the weights.
            WeightsLost: the server went, or came back, while they were sent.
            EngineLost: it has gone for longer than `patience`.
        """
        self._http.run(partial(self._load, tensors, alpha))
        self._failing_since = None

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_completions: int,
        sampling: SamplingConfig,
        streams: Sequence[str],
    ) -> list[list[Completion]]:
        """All prompts are asked at once; see `RolloutEngine.sample`."""
        for prompt in prompts:  # the server would cut off longer ones without a word
            prompt.check_budget(sampling.max_new_tokens, self._max_model_len, "the server's max_model_len")

        async def ask_all() -> list[list[Completion]]:
            version = await self._insist(self._weight_version)
            self._failing_since = None
            self._check_version(version)
            if self._kept_of != (checksum := version.rpartition("/")[2]):
                self._kept, self._kept_of = {}, checksum
            asked = [
                self._complete(prompt, num_completions, sampling, stream, version)
                for prompt, stream in zip(prompts, streams, strict=True)
            ]
            return await asyncio.gather(*asked)

        groups = self._http.run(ask_all)
        self._kept = {}
        return groups

    def sleep(self) -> None:
        """Do nothing: the server's memory is its own."""

    def close(self) -> None:
        """Give up the requests under way; the server goes on, for the next trainer."""
        self._http.close()

    async def _load(self, tensors: Iterable[tuple[str, Tensor]], alpha: float | None) -> None:
        num_workers = await self._check_server()
        version = f"{self._run}/{uuid.uuid4().hex}"
        base, self._base = self._base if alpha is not None else None, None
        name = base[0] if base else version
        call = {"alpha": alpha, "base": name, "whole": base is None}
        post = self._http.post
        try:
            await post("/abort_requests", {})  # those of a call that was given up
            await post("/update_weight_version", {"new_version": f"{version}/loading"})
            rest, adapters = await self._send(tensors, num_workers, call)
            rest = base[1] if base else rest
            for cache in ("prefix", "mm", "encoder"):
                await post(f"/reset_{cache}_cache", {})
            if await self._weight_version() != f"{version}/loading":
                raise Unavailable("it was started again")
            # The same weights have the same one, whether all were sent or adapters alone.
            self._version = f"{version}/{rest:08x}-{adapters:08x}-{alpha}"
            await post("/update_weight_version", {"new_version": self._version})
            self._base = None if alpha is None else (name, rest)
        except Unavailable as error:
            await self._pause(error, 0)
            raise WeightsLost(f"{self._http.url} did not take the weights: {error}") from error

    async def _send(
        self, tensors: Iterable[tuple[str, Tensor]], num_workers: int, how: dict[str, Any]
    ) -> tuple[int, int]:
        """Send to all workers; returns the checksums of the weights."""
        broken, checksums = Unavailable("its workers did not come for them"), None
        with WeightSender(self._http.address, self._timeout) as sender:
            call = {"method": "receive_weights", "kwargs": sender.arguments() | how}
            told = asyncio.create_task(
                self._http.read(AllReceived, "POST", "/collective_rpc", call, unlimited=True)
            )
            try:
                if await asyncio.to_thread(sender.accept, num_workers, lambda: not told.done()):
                    checksums = sender.send(tensors)  # here, where the ranks gather them
            except Unavailable as error:
                broken = error
            finally:
                sender.close()  # a worker that waits for more learns that there is none
                await asyncio.wait([told], timeout=self._timeout)
        if not told.done():
            raise Unavailable(f"/collective_rpc: no answer within {self._timeout:.0f} s") from broken
        results = told.result().results
        if refused := [result.refused for result in results if result.refused]:
            raise UserError(f"{self._http.url}: {refused[0]}")
        if lost := [result.lost for result in results if result.lost]:
            raise Unavailable(lost[0])
        if checksums is None:
            raise broken
        return checksums

    async def _complete(
        self,
        prompt: EncodedPrompt,
        num_completions: int,
        sampling: SamplingConfig,
        stream: str,
        version: str,
    ) -> list[Completion]:
        """One prompt's; raises WeightsLost if any weights but those of `version` sampled them."""
        params = sampling_params(
            sampling, num_completions, stream, self._end_token_ids, self._vision_token_ids
        )
        body = await asyncio.to_thread(_body, prompt, params)
        key, vision = hashlib.blake2b(body).digest(), self._vision_token_ids

        async def answers() -> list[Completion]:
            who = f"sample {prompt.sample_id}: "
            answer = await self._http.read(Generated, "POST", GENERATE, body, who)
            for choice in answer.choices:
                for span in choice.weight_versions:
                    self._check_version(span.version, version)
            check_expanded(prompt, answer.prompt_token_ids)
            said = [
                (c.token_ids, [token.logprob for token in c.logprobs.content], c.finish_reason)
                for c in sorted(answer.choices, key=lambda choice: choice.index)
            ]
            if any(reason not in ("stop", "length") for *_, reason in said):
                raise Unavailable("it gave up a completion")
            if any(NO_LOGPROB in logp for _, logp, _ in said):
                raise UserError(f"{who}a token has no log-probability: are weights NaN?")
            whole = all(len(ids) == len(logp) > 0 and vision.isdisjoint(ids) for ids, logp, _ in said)
            if len(said) != params["n"] or not whole:
                raise Unavailable(f"{GENERATE}: its answer is not {params['n']} whole completions")
            self._failing_since = None
            return read_completions(said, num_completions, sampling, self._vision_token_ids)

        if key not in self._kept:
            self._kept[key] = await self._insist(answers)
        return self._kept[key]

    async def _weight_version(self) -> str:
        return str((await self._http.read(WeightInfo, "GET", "/weight_info")).weight_version)

    def _check_version(self, version: str, expected: str | None = None) -> None:
        """Raise WeightsLost unless these are weights of this run: of this load, if one is expected."""
        expected = expected or self._version
        own = version.startswith(f"{self._run}/") and not version.endswith("/loading")
        if not own or (expected is not None and version != expected):
            self._base = None  # it went with them
            raise WeightsLost(
                f"{self._http.url} has no weights of this run: it was started again, or is another run's"
            )

    async def _check_server(self) -> int:
        """Wait for the server; returns how many workers it has."""
        paths = ("/health", GENERATE, "/collective_rpc", "/weight_info")
        found = {path: await self._insist(partial(self._http.status, path)) for path in paths}
        if 401 in found.values():
            raise UserError(
                f"{self._http.url} wants another key: set VLLM_API_KEY to the one it was started with"
            )
        wrong = [f"it has no {path}" for path, status in found.items() if status == 404]
        workers: list[Described] = [] if wrong else await self._insist(self._workers)
        if not (wrong or workers):
            wrong.append("its workers are not of WeightReceiver")
        for worker in workers[:1]:
            self._max_model_len = worker.max_model_len
            if worker.logprobs_mode != (mode := common_options()["logprobs_mode"]):
                wrong.append(f"its log-probabilities are {worker.logprobs_mode}, not {mode}")
            if worker.data_parallel_size != 1:
                wrong.append("it has data parallel ranks, whose workers cannot all be reached")
        if wrong:
            raise UserError(f"{self._http.url} cannot be trained with: {'; '.join(wrong)}; {self._start}")
        return len(workers)

    async def _workers(self) -> list[Described]:
        """The workers' descriptions of themselves; empty if they are not ours."""
        try:
            call = {"method": "describe_receiver"}
            return (await self._http.read(AllDescribed, "POST", "/collective_rpc", call)).results
        except Unavailable as error:
            if "describe_receiver" in str(error):  # it is named as what they do not have
                return []
            raise

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer, or patience ends."""
        attempt = 0
        while True:
            try:
                return await ask()
            except Unavailable as error:
                await self._pause(error, attempt)
            attempt += 1

    async def _pause(self, error: Exception, attempt: int) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._say(
                f"{self._http.url} is waited for, up to {self._patience:.0f} s ({error}); {self._start}"
            )
            self._failing_since = now
        waited = now - self._failing_since
        if waited >= self._patience:
            raise EngineLost(
                f"{self._http.url} has not answered for {waited:.0f} s ({error}); {self._start}; then the "
                "trainer's same command goes on"
            ) from error
        await asyncio.sleep(min(0.05 * 2**attempt, LONGEST_PAUSE))


def _body(prompt: EncodedPrompt, params: dict[str, Any]) -> bytes:
    """A request for a prompt's completions, in JSON."""
    request: dict[str, Any] = {
        "token_ids": prompt.short_token_ids,
        "content_parts": [{"type": "image_url", "url": _data_url(p)} for p in images_of(prompt)],
        "sampling_params": params,
        "return_token_ids": True,
    }
    return json.dumps(request).encode()


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # a few times as fast as the best
    return data_uri("image/png", file.getvalue())
