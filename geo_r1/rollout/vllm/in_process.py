"""vLLM in the trainer's process: each rank, or group of ranks, has an engine and gives it its weights."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from geo_r1.errors import UserError, one_line
from geo_r1.models import EncodedPrompt
from geo_r1.models.lora import merged_state
from geo_r1.rollout.engine import Copies
from geo_r1.rollout.sampling import Completion, SamplingConfig
from geo_r1.rollout.vllm import requests
from geo_r1.rollout.vllm.weights import expected_weights, load_into

ENVIRONMENT = {
    # Worker and scheduler run in this process, so that weights are passed as tensors, and because a rank of
    # torchrun must not start others.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}


class VLLMEngine:
    """A `RolloutEngine` in this process.

    Under torchrun every rank makes its engine at the same time as the others, and each
    `tensor_parallel_size` consecutive ranks share one: all of them call every method, with their own prompts.

    Args:
        folder: written by `write_engine_folder`.
        end_token_ids: each ends a completion.
        vision_token_ids: never sampled.
        dtype: of weights, activations and cache.
        max_model_len: the most tokens of a prompt and a completion.
        max_num_seqs: completions sampled at a time.
        gpu_memory_utilization: share of a device's memory to plan with, the trainer's part included.
        kv_cache_bytes: size of the cache of keys and values; None takes what that share leaves. A CPU needs
            it, since free memory there belongs to other processes as well.
        sleep: give memory back when `sleep` is called.

    Raises:
        UserError: vLLM is not installed or cannot run with these arguments.
        ValueError: `sleep`, or no `kv_cache_bytes`, on a CPU.
    """

    copies: Copies = "per rank"
    holds_base = False

    def __init__(
        self,
        folder: Path,
        *,
        end_token_ids: Collection[int],
        vision_token_ids: Collection[int],
        dtype: torch.dtype,
        max_model_len: int,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.4,
        kv_cache_bytes: int | None = None,
        tensor_parallel_size: int = 1,
        sleep: bool = False,
    ) -> None:
        os.environ.update(ENVIRONMENT)
        on_cpu = not torch.cuda.is_available()
        # on a CPU it warns a dozen times about what only a GPU has
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if on_cpu else "WARNING")
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks % tensor_parallel_size:
            raise UserError(
                f"{num_ranks} ranks cannot be shared out among engines of {tensor_parallel_size}; "
                "tensor_parallel_size must divide the number of ranks"
            )
        if on_cpu and sleep:
            raise ValueError("vLLM has no sleep on a CPU; it frees memory of GPUs")
        if on_cpu and kv_cache_bytes is None:
            raise ValueError("on a CPU vLLM's cache needs a size: kv_cache_bytes")
        self.end_token_ids, self.vision_token_ids = list(end_token_ids), list(vision_token_ids)
        self.max_model_len, self.tensor_parallel_size = max_model_len, tensor_parallel_size
        self._expected = expected_weights(AutoConfig.from_pretrained(folder))
        self._ready = self._asleep = False
        self._sleeps, self._on_cpu, self._foreign_group = sleep, on_cpu, dist.is_initialized()
        options = requests.common_options() | {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "enable_sleep_mode": sleep,
            "tensor_parallel_size": tensor_parallel_size,
            "disable_log_stats": True,
        }
        if on_cpu:
            options |= requests.cpu_options(max_model_len)
        if num_ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"
        with _trainer_untouched():
            try:
                from vllm import LLM

                self._llm: Any = LLM(**options)
            except ImportError as error:
                raise UserError(f"vLLM cannot be imported: {error}; pip install vllm") from error
            except ValueError as error:  # such as too little memory for its cache
                raise UserError(f"vLLM cannot start: {one_line(error)}") from error

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Replace the weights; see `RolloutEngine.load`."""
        tensors = tensors if alpha is None else merged_state(tensors, alpha)
        self._ready = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc(load_into, args=(tensors, self._expected))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._ready = True

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_completions: int,
        sampling: SamplingConfig,
        streams: Sequence[str],
    ) -> list[list[Completion]]:
        """`num_completions` completions of each prompt; see `RolloutEngine.sample`."""
        assert self._ready, (
            "an engine has no weights before the first load, nor after one that failed or sleep"
        )
        ends, vision = self.end_token_ids, self.vision_token_ids
        own = [
            (prompt, requests.sampling_params(sampling, num_completions, stream, ends, vision))
            for prompt, stream in zip(prompts, streams, strict=True)
        ]
        first, asked = self._shared(own)
        # On a CPU vLLM draws from the process's own generator before it draws from those of the requests.
        with torch.random.fork_rng(devices=[], enabled=self._on_cpu):
            outputs = self._outputs(asked)
        groups = []
        for (prompt, _), output in list(zip(asked, outputs, strict=True))[first : first + len(own)]:
            requests.check_expanded(prompt, output.prompt_token_ids)
            said = [(text.token_ids, _drawn_logp(text), text.finish_reason) for text in output.outputs]
            groups.append(requests.read_completions(said, num_completions, sampling, vision))
        return groups

    def sleep(self) -> None:
        """Give back weights and cache, if made with `sleep`. Not measured: it needs a GPU."""
        if self._sleeps:
            self._llm.sleep(level=2)
            self._asleep, self._ready = True, False

    def close(self) -> None:
        """Let go of memory; see `RolloutEngine.close`."""
        if self._llm is None:
            return
        with _process_group_kept(self._foreign_group):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    def _shared(
        self, own: list[tuple[EncodedPrompt, dict[str, Any]]]
    ) -> tuple[int, list[tuple[EncodedPrompt, dict[str, Any]]]]:
        """The index of this rank's first request, and the requests of all ranks that share this engine."""
        if self.tensor_parallel_size == 1:
            return 0, own
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        light = [(replace(prompt, pixel_values=None), params) for prompt, params in own]
        everyones: list[Any] = [None] * group.world_size
        dist.all_gather_object(everyones, light, group=group.cpu_group)
        first = sum(map(len, everyones[: group.rank_in_group]))
        return first, [request for asked in everyones for request in asked]

    def _outputs(self, asked: Sequence[tuple[EncodedPrompt, dict[str, Any]]]) -> list[Any]:
        """vLLM's output of each request, in order."""
        from vllm import SamplingParams

        inputs: list[dict[str, Any]] = []
        for prompt, params in asked:
            prompt.check_budget(params["max_tokens"], self.max_model_len, "the engine's max_model_len")
            images = requests.images_of(prompt)
            media = {"multi_modal_data": {"image": images}} if images else {}
            inputs.append({"prompt_token_ids": prompt.short_token_ids} | media)
        running: list[str] = []
        for (prompt, params), given in zip(asked, inputs, strict=True):
            try:
                running += self._llm.enqueue(given, SamplingParams(**params), use_tqdm=False)
            except ValueError as error:  # such as an image more than 200 times as wide as high
                self._llm.llm_engine.abort_request(running, internal=True)
                raise UserError(f"sample {prompt.sample_id}: vLLM refuses it: {error}") from error
        return self._llm.wait_for_completion(use_tqdm=False)


def _drawn_logp(text: Any) -> list[float]:
    return [row[token].logprob for token, row in zip(text.token_ids, text.logprobs, strict=True)]


@contextmanager
def _trainer_untouched() -> Iterator[None]:
    """Restore threads and random states after making an engine.

    vLLM seeds all generators, and on a CPU replaces `torch.set_num_threads` by one that does nothing.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _process_group_kept(foreign: bool) -> Iterator[None]:
    """Keep a process group that is older than the engine while closing it, which would destroy both."""
    destroy = dist.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None or not foreign:
            destroy(group)

    dist.destroy_process_group = destroy_own
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
