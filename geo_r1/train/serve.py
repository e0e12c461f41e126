"""`--serve`: a vLLM server that is ready for a recipe's weights, in place of this process."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from typing import Any

import torch

from geo_r1.rollout.vllm_input import cpu_options, flags, serve_command, write_engine_folder
from geo_r1.train.config import Recipe
from geo_r1.train.models import encoder_of, without_weights
from geo_r1.train.samplers import kv_cache_bytes, max_model_len

SERVER = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs


def serve(recipe: Recipe, port: int) -> None:
    """Write `<run.dir>-server/`, all of the recipe's model but its weights, and become vLLM's server of it.

    Raises:
        ValueError: the model cannot be read, the folder not written, or vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ValueError("there is no vLLM beside geo_r1 here; install it with: pip install '.[vllm]'")
    config, tokenizer, image_processor = without_weights(recipe)
    encoder_of(recipe, config, tokenizer, image_processor)  # sets the processor's limits, as the trainer's
    folder = recipe.run.dir.with_name(f"{recipe.run.dir.name}-server")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_engine_folder(folder, config, tokenizer, image_processor)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    length = max_model_len(recipe, config)
    options: dict[str, Any] = {}
    if not torch.cuda.is_available():
        options = cpu_options(length) | {
            "kv_cache_memory_bytes": kv_cache_bytes(recipe, config),
            "enforce_eager": True,  # a small model is compiled for longer than it then saves
        }
    environment, command = serve_command(
        str(folder),
        port=port,
        dtype=recipe.model.dtype,
        max_model_len=length,
        tensor_parallel_size=recipe.rollout.tensor_parallel_size,
        options=flags(options),
    )
    shown = [*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)]
    print(" ".join(shown), flush=True)
    os.execve(
        sys.executable, [sys.executable, "-m", SERVER, "--model", *command[2:]], os.environ | environment
    )
