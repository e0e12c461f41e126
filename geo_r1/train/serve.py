"""`--serve`: this process becomes a vLLM server that is ready for a recipe's weights."""

from __future__ import annotations

import os
import shlex
import socket
from importlib.util import find_spec
from typing import Any

from geo_r1.errors import UserError
from geo_r1.train.recipe.load import SERVE
from geo_r1.train.recipe.sections import Recipe

HOST, PORT = "127.0.0.1", 8000


def become_server(recipe: Recipe, address: str) -> None:
    """Write `<run.dir>-server/`, the recipe's model without its weights, and become vLLM's server of it.

    Args:
        address: `[HOST:]PORT` to listen at; empty for 127.0.0.1:8000.

    Raises:
        UserError: the address is malformed or taken, this is one of several ranks, vLLM is not installed or
            cannot do what the recipe asks, the model cannot be read, or the folder cannot be written.
    """
    host, port = _host_and_port(address)
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"one process becomes the server, not {size} ranks: python -m geo_r1.train {SERVE}")
    if find_spec("vllm") is None:
        raise UserError("there is no vLLM beside geo_r1 here; install it with: pip install '.[vllm]'")
    _check_free(host, port)
    environment, command = _command(recipe, host, port)
    shown = [*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)]
    print(" ".join(shown), flush=True)
    os.execve(command[0], command, os.environ | environment)


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":") if address else (HOST, ":", str(PORT))
    if not (port.isdecimal() and 1 <= int(port) <= 65535 and bool(host) == bool(colon)):
        raise UserError(
            f"{SERVE} takes a port of 1 to 65535 and, for other machines, an address before it, such as "
            f"{SERVE}={PORT} or {SERVE}=10.0.0.1:{PORT}, not {address}"
        )
    return host.removeprefix("[").removesuffix("]") or HOST, int(port)


def _check_free(host: str, port: int) -> None:
    """Refuse a port that is taken: vLLM would notice minutes later, or share it with another vLLM server."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may just have ended
            listener.bind((host, port))
            listener.listen()
    except OSError as error:
        raise UserError(
            f"{SERVE} cannot listen at {host}, port {port}: {error.strerror}; "
            f"{SERVE}=[HOST:]PORT names another"
        ) from error


def _command(recipe: Recipe, host: str, port: int) -> tuple[dict[str, str], list[str]]:
    """Write the server's folder; returns its environment and command line."""
    import torch  # takes seconds: only once there is a server to start

    from geo_r1.rollout.vllm.requests import cpu_options, serve_command, write_engine_folder
    from geo_r1.train.models import encoder_of, without_weights
    from geo_r1.train.rl.rollout_engines import check_rollout_engine, kv_cache_bytes, max_model_len

    served = {"engine": "vllm", "server_url": f"http://{host}:{port}"}  # as its trainer will name it
    check_rollout_engine(recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=served)}), 1)
    config, tokenizer, image_processor = without_weights(recipe)
    image_processor = encoder_of(recipe, config, tokenizer, image_processor).image_processor  # its limits
    folder = recipe.run.dir.with_name(f"{recipe.run.dir.name}-server")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_engine_folder(folder, config, tokenizer, image_processor)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    length = max_model_len(recipe, config)
    cpu: dict[str, Any] = {}
    if not torch.cuda.is_available():
        cpu = cpu_options(length) | {"kv_cache_memory_bytes": kv_cache_bytes(recipe, config)}
    return serve_command(
        folder,
        host=host,
        port=port,
        dtype=recipe.model.dtype,
        max_model_len=length,
        tensor_parallel_size=recipe.rollout.tensor_parallel_size,
        **cpu,
    )
