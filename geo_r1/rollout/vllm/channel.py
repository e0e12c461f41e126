"""How a trainer's weights reach the workers of its server: over TCP, tensor by tensor, never on a disk.

The trainer listens, every worker connects, and both prove that they know the key of the transfer. A message
has a tensor's name, dtype and shape as JSON, and the tensor's bytes follow; an empty message ends the stream.
The bytes are not encrypted, so the network between the two must be a private one. Every worker gets every
tensor and keeps its part, so N workers cost N times the model's bytes of network.

A model with adapters is sent whole once, and each worker keeps it in its host's memory. From then on adapters
alone are sent and merged in the worker: any layer may have some, and sampling costs no more than without.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from geo_r1.models.lora import BASE, DOWN, UP, merged_state
from geo_r1.rollout.vllm.http_client import Unavailable
from geo_r1.rollout.vllm.weights import CheckedWeights, expected_weights, load_into

GREETING = 5.0  # seconds that a connection has to prove that it comes from a worker
LOOK = 0.1  # seconds between two looks at whether missing workers may still come
LONGEST_HEADER = 1 << 16  # bytes
SAMPLE = 1 << 16  # bytes of each tensor in a load's checksum: reading all takes longer than sending
BROKEN = (OSError, EOFError, AuthenticationError)  # what a connection raises when the other side has gone
VLLM_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


class WeightReceiver:
    """A worker's side; `vllm serve --worker-extension-cls` mixes it into vLLM's own worker."""

    model_runner: Any
    device: torch.device
    # The name of base weights, and the whole state of the model with adapters that they belong to.
    kept_weights: tuple[str, dict[str, Tensor]] | None = None

    def describe_receiver(self) -> dict[str, Any]:
        """Facts that a trainer checks before it sends anything."""
        config = self.model_runner.vllm_config
        return {
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "max_model_len": config.model_config.max_model_len,
        }

    def receive_weights(
        self, host: str, port: int, key: str, timeout: float, alpha: float | None, base: str, whole: bool
    ) -> dict[str, str | None]:
        """Replace this worker's weights by the trainer's.

        Args:
            host, port: where the trainer's `WeightSender` listens.
            key: of this transfer, in hexadecimal digits.
            timeout: seconds to wait for the connection, and for the next bytes.
            alpha: of the model's adapters; None for a model without, of which nothing is kept.
            base: the name of the base weights below the adapters.
            whole: True if the base weights come, too, and not just the adapters.

        Returns:
            "refused": what to change before these weights are sent again; "lost": why the stream broke off.
            Both are None after a load that can be sampled with.
        """
        if whole:
            self.kept_weights = None  # there may not be memory for two
        elif self.kept_weights is None or self.kept_weights[0] != base:
            return {"refused": None, "lost": "a worker of the server has lost the base weights"}
        stream, refused = _Stream(bytes.fromhex(key)), None
        expected = expected_weights(self.model_runner.vllm_config.model_config.hf_config)
        try:
            with stream.connect(host, port, timeout):
                if alpha is None:
                    load_into(self, stream, expected)
                else:
                    arrived = list(stream)
            if alpha is not None and stream.lost is None:
                self._merge(arrived, alpha, base, expected)
        except ValueError as error:
            refused = str(error)
        except VLLM_ERRORS as error:  # the trainer shows it: its user does not see this server's log
            refused = f"vLLM cannot load the weights: {type(error).__name__}: {error}"
        return {"refused": None if stream.lost else refused, "lost": stream.lost}

    def _merge(
        self, arrived: Sequence[tuple[str, Tensor]], alpha: float, base: str, expected: dict[str, torch.Size]
    ) -> None:
        """Load the adapters that arrived, with the base weights that arrived or were kept."""
        state = self.kept_weights[1] if self.kept_weights else {}
        weights = CheckedWeights(arrived, _with_adapters(expected, arrived, state))
        state = state | dict(weights)
        weights.check()
        self.kept_weights = base, state
        near = (
            (name, tensor.to(self.device) if name.endswith((f"{BASE}weight", DOWN, UP)) else tensor)
            for name, tensor in state.items()
        )
        load_into(self, merged_state(near, alpha), expected)


def _with_adapters(
    expected: Mapping[str, torch.Size],
    arrived: Sequence[tuple[str, Tensor]],
    kept: Mapping[str, Tensor],
) -> dict[str, torch.Size]:
    """Names and shapes that a load of a model with adapters must have.

    Args:
        expected: those of the model without adapters.
        arrived: says which layers have adapters, and of what rank.
        kept: the state before; if there is one, its adapters alone are due, in the same shapes.
    """
    if kept:
        return {name: tensor.shape for name, tensor in kept.items() if name.endswith((DOWN, UP))}
    shapes = dict(expected)
    for name, tensor in arrived:
        path = name.removesuffix(DOWN).removesuffix(UP)
        weight = shapes.get(f"{path}.weight")
        if path == name or weight is None or not len(weight) == tensor.ndim == 2:
            continue
        rank = tensor.shape[0 if name.endswith(DOWN) else 1]
        shapes |= {path + DOWN: torch.Size((rank, weight[1])), path + UP: torch.Size((weight[0], rank))}
        for end in ("weight", "bias"):
            if (shape := shapes.pop(f"{path}.{end}", None)) is not None:
                shapes[f"{path}{BASE}{end}"] = shape
    return shapes


class _Stream:
    """The tensors that a trainer sends.

    A broken connection ends it without an error, and `lost` says why: by then vLLM has taken its layers
    apart, and it puts them together again only after the last tensor.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.lost: str | None = None

    def connect(self, host: str, port: int, timeout: float) -> Connection:
        try:
            channel = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise ValueError(
                f"a worker of the server cannot connect to the trainer at {host}:{port} ({error}); let "
                "it through the firewall, or run both in one network"
            ) from error
        self._connection = _messages(channel, timeout, timeout)
        return self._connection

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        try:
            answer_challenge(self._connection, self._key)
            deliver_challenge(self._connection, self._key)
            while header := self._connection.recv_bytes(LONGEST_HEADER):  # not `recv`, which unpickles
                name, kind, shape = json.loads(header)
                dtype = getattr(torch, kind)
                # Each tensor has memory of its own: vLLM holds tensors back until their layer is whole.
                data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
                rest = data.numpy().data
                while rest:  # `recv_bytes` takes three times as long
                    if not (count := os.readv(self._connection.fileno(), [rest])):
                        raise EOFError("it closed the connection")
                    rest = rest[count:]
                yield name, data.view(dtype).view(shape)
        except BROKEN as error:
            self.lost = f"a worker of the server lost the trainer: {type(error).__name__}: {error}"


class WeightSender(ExitStack):
    """The trainer's side of one transfer; closing it ends the connections after the bytes that were sent.

    Args:
        towards: host and port of the server; the sender listens at the interface that leads there.
        timeout: seconds to wait for workers to come, and for them to take the next bytes.

    Raises:
        Unavailable: nothing answers there.
    """

    def __init__(self, towards: tuple[str, int], timeout: float) -> None:
        self._timeout = timeout
        self._key = secrets.token_bytes(32)
        self._workers: list[Connection] = []
        super().__init__()
        try:
            with socket.create_connection(towards, timeout) as there:
                family, self._host = there.family, there.getsockname()[0]
        except OSError as error:
            raise Unavailable(str(error)) from error
        self._listener = self.enter_context(socket.create_server((self._host, 0), family=family))
        self._listener.settimeout(LOOK)
        self._proven: SimpleQueue[Connection] = SimpleQueue()
        listening = threading.Thread(target=self._listen, daemon=True)
        listening.start()
        self.callback(listening.join)
        self.callback(_shut, self._listener)  # first, which ends the thread

    def arguments(self) -> dict[str, Any]:
        """Arguments for `WeightReceiver.receive_weights`."""
        port = self._listener.getsockname()[1]
        return {"host": self._host, "port": port, "key": self._key.hex(), "timeout": self._timeout}

    def accept(self, num_workers: int, may_come: Callable[[], bool]) -> bool:
        """Wait for the workers; False if some did not come. Connections without the key are dropped."""
        deadline = time.monotonic() + self._timeout
        while len(self._workers) < num_workers and time.monotonic() < deadline and may_come():
            with suppress(Empty):
                self._workers.append(self.enter_context(self._proven.get(timeout=LOOK)))
        return len(self._workers) == num_workers

    def _listen(self) -> None:
        """Greet every connection in a thread of its own, so that no stranger keeps a worker waiting."""
        while True:
            try:
                channel, _address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:  # it was closed
                return
            threading.Thread(target=self._greet, args=(channel,), daemon=True).start()

    def _greet(self, channel: socket.socket) -> None:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        also = channel.dup()
        connection = _messages(channel, min(self._timeout, GREETING), self._timeout)
        # a stranger may send a byte now and then
        limit = threading.Timer(GREETING, _shut, [also])
        limit.daemon = True
        limit.start()
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
        except BROKEN:  # a stranger, or a worker that has gone: the server's answer says which
            connection.close()
        else:
            self._proven.put(connection)
        finally:
            limit.cancel()
            also.close()

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """Send each tensor to all workers, then the end.

        Returns:
            Two checksums of names and of the start of each tensor: one of adapters, which is the second, and
            one of everything else. Equal weights have equal checksums.

        Raises:
            Unavailable: a worker has gone, or takes no more bytes.
        """
        checksums = [0, 0]
        for name, tensor in tensors:
            header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), [*tensor.shape]]).encode()
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            part = name.endswith((DOWN, UP))
            checksums[part] = zlib.crc32(data[:SAMPLE], zlib.crc32(header, checksums[part]))
            self._send_all(header, data)
        self._send_all(b"", memoryview(b""))
        return checksums[0], checksums[1]

    def _send_all(self, header: bytes, data: memoryview) -> None:
        try:
            for worker in self._workers:
                worker.send_bytes(header)
                rest = data
                while rest:
                    rest = rest[os.write(worker.fileno(), rest) :]
        except OSError as error:
            raise Unavailable(f"a worker takes no more weights: {error}") from error


def _shut(channel: socket.socket) -> None:
    with suppress(OSError):  # it has gone
        channel.shutdown(socket.SHUT_RDWR)


def _messages(channel: socket.socket, receive: float, send: float) -> Connection:
    """A socket as a connection that raises OSError when nothing moves for these numbers of seconds."""
    channel.settimeout(None)  # the kernel's own timeouts hold in its place
    for option, seconds in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
        whole = int(seconds)
        channel.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6)))
    return Connection(channel.detach())
