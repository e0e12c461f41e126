"""vLLM in the trainer's own process: each rank, or group of ranks, has an engine and gives it its weights."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from geo_r1.models import EncodedPrompt
from geo_r1.models.lora import merged_state
from geo_r1.rollout.sampling import Completion, SamplingConfig
from geo_r1.rollout.vllm import requests as vllm_input

ENVIRONMENT = {
    # Worker and scheduler live in this process: weights are handed over as tensors, not sent, and under
    # torchrun a rank must not start others.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class _Request:
    prompt: EncodedPrompt
    num_completions: int
    sampling: SamplingConfig
    stream: str


class VLLMEngine:
    """Samples with vLLM, in this process; a `RolloutEngine`.

    Under torchrun every rank makes its engine at the same time as the others, and `tensor_parallel_size`
    ranks that follow each other share one: each of them calls every method, with prompts of its own.

    Args:
        folder: of `write_engine_folder`.
        end_token_ids: tokens that end a completion.
        vision_token_ids: tokens that are never said.
        dtype: of weights, activations and cache.
        max_model_len: the most tokens of a prompt and a completion.
        max_num_seqs: completions that are said at a time.
        gpu_memory_utilization: share of a device's memory, that of the trainer included, to plan with.
        kv_cache_bytes: size of the cache of keys and values; None: what that share leaves. On a CPU it must
            be given, since memory that is free there is not this process's own.
        sleep: give memory back when `sleep` is called.

    Raises:
        ValueError: vLLM is not installed or cannot do what is asked for.
    """

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
        # on a CPU it warns a dozen times of what cannot be had there
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if on_cpu else "WARNING")
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks % tensor_parallel_size:
            raise ValueError(
                f"{num_ranks} ranks cannot be shared out among engines of {tensor_parallel_size}; "
                "tensor_parallel_size must divide the number of ranks"
            )
        if on_cpu and sleep:
            raise ValueError("vLLM has no sleep on a CPU; it frees memory of GPUs")
        if on_cpu and kv_cache_bytes is None:
            raise ValueError("on a CPU vLLM's cache needs a size: kv_cache_bytes")
        self.end_token_ids, self.vision_token_ids = list(end_token_ids), list(vision_token_ids)
        self.max_model_len, self.tensor_parallel_size = max_model_len, tensor_parallel_size
        self._expected = vllm_input.expected_weights(AutoConfig.from_pretrained(folder))
        self._ready = self._asleep = False
        self._sleeps = sleep
        self._foreign_group, self._on_cpu = dist.is_initialized(), on_cpu
        options = {
            **vllm_input.common_options(),
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_cache_bytes,
            "enforce_eager": on_cpu,  # compiling takes longer there than it saves
            "enable_sleep_mode": sleep,
            "tensor_parallel_size": tensor_parallel_size,
            "disable_log_stats": True,
        }
        if on_cpu:
            options |= vllm_input.cpu_options(max_model_len)
        if num_ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"
        with _trainer_untouched():
            try:
                from vllm import LLM
            except ImportError as error:
                raise ValueError(f"vLLM cannot be imported: {error}; pip install vllm") from error
            self._llm: Any = LLM(**options)
        self._engine: Any = self._llm.llm_engine

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Take over weights; see `RolloutEngine`."""
        tensors = tensors if alpha is None else merged_state(tensors, alpha)
        self._ready = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        weights = vllm_input.CheckedWeights(tensors, self._expected)
        [not_loaded] = self._llm.collective_rpc(vllm_input.reload, args=(weights,))
        weights.check()
        if not_loaded:
            raise ValueError(f"vLLM has {len(not_loaded)} weights that nobody sent, such as {not_loaded[0]}")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._engine.reset_encoder_cache()
        self._ready = True

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_completions: int,
        sampling: SamplingConfig,
        streams: Sequence[str],
    ) -> list[list[Completion]]:
        """`num_completions` completions of each prompt; see `RolloutEngine`."""
        assert self._ready, (
            "an engine has no weights before the first load, nor after one that failed or sleep"
        )
        own = [_Request(p, num_completions, sampling, s) for p, s in zip(prompts, streams, strict=True)]
        first, requests = self._shared(own)
        # On a CPU vLLM draws from the process's own generator before it draws from those of the requests.
        with torch.random.fork_rng(devices=[], enabled=self._on_cpu):
            said = self._run(requests)
        return said[first : first + len(own)]

    def sleep(self) -> None:
        """Give back weights and cache, if made to; see `RolloutEngine`. Not measured: it needs a GPU."""
        if self._sleeps:
            self._llm.sleep(level=2)
            self._asleep, self._ready = True, False

    def close(self) -> None:
        """Let go of memory; see `RolloutEngine`."""
        if self._llm is None:
            return
        with _process_group_kept(self._foreign_group):
            self._engine.engine_core.shutdown()
        self._llm = self._engine = None

    def _shared(self, own: list[_Request]) -> tuple[int, list[_Request]]:
        """The requests of all ranks that share this engine, and where this rank's begin."""
        if self.tensor_parallel_size == 1:
            return 0, own
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        light = [replace(r, prompt=replace(r.prompt, pixel_values=None)) for r in own]
        everyones: list[Any] = [None] * group.world_size
        dist.all_gather_object(everyones, light, group=group.cpu_group)
        first = sum(map(len, everyones[: group.rank_in_group]))
        return first, [request for requests in everyones for request in requests]

    def _run(self, requests: Sequence[_Request]) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        results: list[list[Completion]] = [[] for _ in requests]
        running: dict[int, str] = {}
        try:
            for index, request in enumerate(requests):
                fields = vllm_input.sampling_params(
                    request.sampling,
                    request.num_completions,
                    vllm_input.seed_of(request.stream),
                    self.end_token_ids,
                    self.vision_token_ids,
                )
                params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
                rendered = self._rendered(request)
                running[index] = self._engine.add_request(str(index), rendered, params)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    index = int(output.request_id)
                    del running[index]
                    said = [
                        (text.token_ids, _drawn_logp(text.token_ids, text.logprobs), text.finish_reason)
                        for text in output.outputs
                    ]
                    request = requests[index]
                    results[index] = vllm_input.read_completions(
                        said, request.num_completions, request.sampling, self.vision_token_ids
                    )
        finally:  # after an error, what has begun
            self._engine.abort_request(list(running.values()), internal=True)
        return results

    def _rendered(self, request: _Request) -> Any:
        """A prompt as vLLM's engine takes it, its pictures prepared."""
        prompt = request.prompt
        prompt.check_budget(request.sampling.max_new_tokens, self.max_model_len, "the engine's max_model_len")
        asked: dict[str, Any] = {"prompt_token_ids": prompt.short_token_ids}
        if pictures := vllm_input.pictures_of(prompt):
            asked["multi_modal_data"] = {"image": pictures}
        try:
            [rendered] = self._engine.renderer.render_cmpl([asked])
        except ValueError as error:  # such as a picture more than 200 times as wide as high
            raise ValueError(f"sample {prompt.sample_id}: vLLM refuses it: {error}") from error
        vllm_input.check_expanded(prompt, rendered["prompt_token_ids"])
        return rendered


def _drawn_logp(token_ids: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    return [row[token].logprob for token, row in zip(token_ids, logprobs, strict=True)]


@contextmanager
def _trainer_untouched() -> Iterator[None]:
    """Around making an engine: threads and random states are the trainer's again behind it.

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
    """Around closing an engine: the process group that was there before it is not destroyed with its own."""
    destroy = dist.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None or not foreign:
            destroy(group)

    dist.destroy_process_group = destroy_own
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
