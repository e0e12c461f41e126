"""How a trainer's weights reach the workers of its server: over TCP, tensor by tensor, never on a disk.

A tensor is the length of its header (4 bytes), the header in JSON (name, dtype, shape) and its bytes; an
empty header ends the stream. Whoever connects proves to know the key of the transfer, and so does who
listens. The bytes are not encrypted: the network between the two has to be a private one.

Every worker gets every tensor and keeps its part, so N workers cost N times the model's bytes of network.

Of a model with adapters all is sent once, and each worker keeps it whole in the memory of its host. From then
on adapters alone are sent, and merged where they arrive: the arithmetic is the trainer's own, any layer may
have adapters, and sampling costs what it costs without.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from geo_r1.models.lora import BASE, DOWN, UP, merged_state
from geo_r1.rollout.vllm.requests import CheckedWeights, expected_weights, reload

_LENGTH = struct.Struct("!I")
_NONCE = 32  # bytes
_GREETING = 5.0  # seconds that whoever connects has to prove that it is a worker
_LOOK = 0.1  # seconds between two looks at whether workers that have not come still may
_SAMPLE = (
    1 << 16
)  # bytes of each tensor that the checksum of a load reads: all would take longer than sending


class WeightReceiver:
    """What a worker of vLLM can do besides; `vllm serve --worker-extension-cls` mixes it in."""

    model_runner: Any
    device: torch.device
    # The name of base weights, and the state of the model with adapters that they are of.
    kept_weights: tuple[str, dict[str, Tensor]] | None = None

    def describe_receiver(self) -> dict[str, Any]:
        """What a trainer has to know of this server before it sends anything."""
        config = self.model_runner.vllm_config
        return {
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "max_model_len": config.model_config.max_model_len,
        }

    def receive_weights(
        self,
        host: str,
        port: int,
        key: str,
        timeout: float,
        alpha: float | None = None,
        base: str = "",
        whole: bool = True,
    ) -> dict[str, str | None]:
        """Fetch weights from the trainer, into the place of the old ones.

        Args:
            host, port: where the trainer's `WeightSender` listens.
            key: of this transfer, in hexadecimal digits.
            timeout: seconds to wait for the connection, and for the next bytes.
            alpha: of the adapters that the model has; None where it has none, and nothing is kept.
            base: the name of the base weights below the adapters.
            whole: whether they come, too; else they are those that came by this name.

        Returns:
            "refused": what to change before these weights are sent again; "lost": why the stream broke off.
            Both are None after a load that can be sampled with.
        """
        stream = _Stream(bytes.fromhex(key))
        refused = None
        try:
            if whole:
                self.kept_weights = None  # there may not be memory for two
            elif self.kept_weights is None or self.kept_weights[0] != base:
                return {"refused": None, "lost": "a worker of the server has lost the base weights"}
            kept = self.kept_weights[1] if self.kept_weights else {}
            expected = expected_weights(self.model_runner.vllm_config.model_config.hf_config)
            with stream.connect(host, port, timeout):
                if alpha is None:
                    not_loaded = reload(self, weights := CheckedWeights(stream, expected))
                else:
                    arrived = list(stream)
                    weights = CheckedWeights(arrived, _with_adapters(expected, arrived, kept))
                    fitting = dict(weights)
            if stream.lost is None:
                weights.check()
                if alpha is not None:  # vLLM's layers are taken apart only now that all is here
                    kept = {**kept, **fitting}
                    self.kept_weights = base, kept
                    not_loaded = reload(self, merged_state(_near(kept, self.device), alpha))
                if not_loaded:
                    raise ValueError(f"vLLM has {len(not_loaded)} weights more, such as {not_loaded[0]}")
        except ValueError as error:
            refused = str(error)
        except (
            Exception
        ) as error:  # whatever vLLM raises is the trainer's to show: its user does not see this log
            refused = f"vLLM cannot load the weights: {type(error).__name__}: {error}"
        return {"refused": refused, "lost": stream.lost}


def _with_adapters(
    expected: Mapping[str, torch.Size],
    arrived: Sequence[tuple[str, Tensor]],
    kept: Mapping[str, Tensor],
) -> dict[str, torch.Size]:
    """Names and shapes that have to come of a model with adapters.

    Args:
        expected: those of the model without.
        arrived: what came: it says which layers have adapters, and of what rank.
        kept: what is here already; adapters alone have to come, and just as these.
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


def _near(state: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A model's state; what is merged goes to the device first."""
    for name, tensor in state.items():
        yield name, tensor.to(device) if name.endswith((f"{BASE}weight", DOWN, UP)) else tensor


class _Stream:
    """The tensors that a trainer sends.

    Where the connection breaks it ends without an error and says so in `lost`: by then vLLM has taken its
    layers apart, and it puts them together again only after the last tensor.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.lost: str | None = None

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        try:
            self._socket = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise ValueError(
                f"a worker of the server cannot connect to the trainer at {host}:{port} ({error}); let "
                "it through the firewall, or run both in one network"
            ) from error
        return self._socket

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        try:
            _shake_hands(self._socket, self._key, b"worker", b"trainer")
            while header := self._header():
                dtype, shape = getattr(torch, header["dtype"]), header["shape"]
                # Memory of its own: vLLM holds tensors back until their layer is whole.
                data = _read(self._socket, math.prod(shape) * dtype.itemsize)
                yield header["name"], data.view(dtype).view(shape)
        except OSError as error:
            self.lost = f"a worker of the server lost the trainer: {error}"

    def _header(self) -> dict[str, Any]:
        (length,) = _LENGTH.unpack(_read(self._socket, _LENGTH.size).numpy().data)
        return json.loads(_read(self._socket, length).numpy().tobytes())


class WorkerLost(Exception):  # noqa: N818  # never leaves this package
    """A worker does not take weights any more."""


class WeightSender:
    """The trainer's side of one transfer.

    Args:
        towards: host and port of the server: the interface that leads there is the one that listens.
        timeout: seconds to wait for workers to come, and for them to take the next bytes.

    Raises:
        WorkerLost: nothing answers there.
    """

    def __init__(self, towards: tuple[str, int], timeout: float) -> None:
        self._timeout = timeout
        self._key = secrets.token_bytes(_NONCE)
        self._workers: list[socket.socket] = []
        try:
            with socket.create_connection(towards, timeout) as there:
                family, self._host = there.family, there.getsockname()[0]
        except OSError as error:
            raise WorkerLost(str(error)) from error
        self._open = ExitStack()
        self._listener = self._open.enter_context(socket.create_server((self._host, 0), family=family))
        self._listener.settimeout(_LOOK)

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; what was sent still arrives."""
        self._open.close()

    def arguments(self) -> dict[str, Any]:
        """What `receive_weights` has to be called with."""
        port = self._listener.getsockname()[1]
        return {"host": self._host, "port": port, "key": self._key.hex(), "timeout": self._timeout}

    def accept(self, num_workers: int, may_come: Callable[[], bool]) -> bool:
        """Wait for the workers, past strangers; False where they did not all come, or no more may."""
        for _ in range(math.ceil(self._timeout / _LOOK)):
            if len(self._workers) == num_workers or not may_come():
                break
            try:
                connection, _address = self._listener.accept()
            except TimeoutError:
                continue
            try:
                connection.settimeout(min(self._timeout, _GREETING))
                _shake_hands(connection, self._key, b"trainer", b"worker")
            except OSError:  # a stranger, or a worker that has gone: the server's answer says which
                connection.close()
                continue
            connection.settimeout(self._timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._workers.append(self._open.enter_context(connection))
        return len(self._workers) == num_workers

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """Send each tensor to all workers, and the end.

        Returns:
            Two checksums, of names and of the start of each tensor: the same for the same weights. The second
            is that of adapters, the first that of all else.

        Raises:
            WorkerLost: one has gone, or takes nothing more.
        """
        checksums = [0, 0]
        for name, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().view(-1)
            dtype = str(tensor.dtype).removeprefix("torch.")
            header = json.dumps({"name": name, "dtype": dtype, "shape": list(tensor.shape)}).encode()
            data = flat.view(torch.uint8).numpy().data
            part = name.endswith((DOWN, UP))
            checksums[part] = zlib.crc32(data[:_SAMPLE], zlib.crc32(header, checksums[part]))
            self._send_all(_LENGTH.pack(len(header)) + header)
            self._send_all(data)
        self._send_all(_LENGTH.pack(2) + b"{}")
        return checksums[0], checksums[1]

    def _send_all(self, data: bytes | memoryview) -> None:
        try:
            for worker in self._workers:
                worker.sendall(data)
        except OSError as error:
            raise WorkerLost(f"a worker takes no more weights: {error}") from error


def _shake_hands(connection: socket.socket, key: bytes, own: bytes, other: bytes) -> None:
    """Prove to know the key, and have it proven; raises PermissionError where the other side cannot."""
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    theirs = _read(connection, _NONCE).numpy().tobytes()
    connection.sendall(hmac.digest(key, own + theirs + nonce, "sha256"))
    proof = _read(connection, 32).numpy().tobytes()
    if not hmac.compare_digest(proof, hmac.digest(key, other + nonce + theirs, "sha256")):
        raise PermissionError("the other side does not know the key of this transfer")


def _read(connection: socket.socket, num_bytes: int) -> Tensor:
    """Exactly so many bytes, [num_bytes] uint8."""
    data = torch.empty(num_bytes, dtype=torch.uint8)
    rest = data.numpy().data
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionResetError("it closed the connection")
        rest = rest[count:]
    return data
