"""Open the rollout engine that the recipe's section `rollout` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from geo_r1.data.loader import PromptLoader
from geo_r1.errors import UserError
from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.models.cost import cached_bytes
from geo_r1.models.lora import merged_state
from geo_r1.rollout import Completion, SamplingConfig, generate
from geo_r1.rollout.engine import Copies, RolloutEngine
from geo_r1.rollout.vllm.http_client import HttpClient, Unavailable
from geo_r1.rollout.vllm.requests import sampling_params, write_engine_folder
from geo_r1.train.context import RunContext
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import GRPOConfig, Recipe, RolloutConfig
from geo_r1.train.rl.rollout_queue import RolloutQueue, sampling_of

SECONDS_TO_LOOK = 5.0
MOST_AT_A_TIME = 256  # completions that vLLM samples at once; its own default


class PolicySampler:
    """Samples natively with the policy's own weights, between two updates."""

    copies: Copies = "none"
    holds_base = False

    def __init__(self, policy: Policy, ends: set[int], recipe: RolloutConfig) -> None:
        self.policy, self.ends, self.recipe = policy, ends, recipe

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        """Nothing to do: its weights are the policy's."""

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_completions: int,
        sampling: SamplingConfig,
        streams: Sequence[str],
    ) -> list[list[Completion]]:
        with self._model() as vlm:
            return generate(
                vlm,
                prompts,
                num_completions,
                sampling=sampling,
                eos_token_id=self.ends,
                streams=streams,
                max_tokens=self.recipe.max_tokens,
                cuda_graphs=self.recipe.cuda_graphs,
            )

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _model(self) -> AbstractContextManager[PackedVLM]:
        return self.policy.whole()


class CopySampler(PolicySampler):
    """Samples natively with a copy of the policy, which updates leave alone."""

    copies: Copies = "per rank"

    def __init__(self, policy: Policy, ends: set[int], recipe: RolloutConfig) -> None:
        super().__init__(policy, ends, recipe)
        self.vlm = policy.blank(policy.vlm.compute_dtype, policy.ranks.device)  # the first load fills it

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]], *, alpha: float | None = None) -> None:
        own = dict(self.vlm.model.named_parameters())
        for name, tensor in tensors if alpha is None else merged_state(tensors, alpha):
            own[name].copy_(tensor)

    def _model(self) -> AbstractContextManager[PackedVLM]:
        return nullcontext(self.vlm)


def check_rollout_engine(recipe: Recipe, num_ranks: int) -> None:
    """Raise UserError if the engine cannot work, before earlier stages have spent hours."""
    rollout = recipe.rollout
    if rollout.engine == "native":
        if rollout.cuda_graphs and not torch.cuda.is_available():
            raise UserError("rollout.cuda_graphs needs a GPU, and there is none")
        return
    if recipe.model.dtype == "float64":
        raise UserError("vLLM computes in float32 or bfloat16, not in model.dtype = float64")
    sampling_params(sampling_of(rollout), 1, "", (), ())  # raises for what vLLM would refuse
    if rollout.server_url is not None:
        return
    if find_spec("vllm") is None:
        raise UserError("rollout.engine = vllm needs vLLM: pip install '.[vllm]'")
    if num_ranks % rollout.tensor_parallel_size:
        size = rollout.tensor_parallel_size
        raise UserError(
            f"rollout.tensor_parallel_size = {size} needs a multiple of {size} ranks, there are {num_ranks}: "
            f"torchrun --nproc-per-node {size}"
        )


def look_for_server(rollout: RolloutConfig, say: Callable[[str], object]) -> None:
    """Warn at the start of a run, not hours later, if the server does not answer yet."""
    if rollout.server_url is None:
        return
    http = HttpClient(rollout.server_url, SECONDS_TO_LOOK)
    try:
        http.run(partial(http.status, "/health"))
    except Unavailable as error:
        seconds = f"{rollout.patience:.0f} s"
        say(f"{rollout.server_url} does not answer yet ({error}); GRPO will wait {seconds} for it")


def open_rollout_queue(
    context: RunContext, policy: Policy, config: GRPOConfig, loader: PromptLoader, num_steps: int
) -> RolloutQueue:
    """The queue of a stage's rollouts, which the caller closes.

    Raises:
        UserError: vLLM is not installed, or cannot run the model.
        EngineLost: its server does not answer.
    """
    engine = _open_engine(context, policy, config)
    seed = context.recipe.run.seed
    return RolloutQueue(
        policy, engine, loader, context.recipe.rollout, config, seed=seed, num_steps=num_steps
    )


def _open_engine(context: RunContext, policy: Policy, config: GRPOConfig) -> RolloutEngine:
    recipe, vlm, ranks = context.recipe.rollout, policy.vlm, policy.ranks
    ends = {context.tokenizer.eos_token_id, *vlm.end_token_ids}
    if recipe.engine == "native":
        kind = CopySampler if recipe.max_staleness else PolicySampler
        return kind(policy, ends, recipe)
    tokens: dict[str, Any] = {"end_token_ids": ends, "vision_token_ids": vlm.vision_token_ids}
    if recipe.server_url is not None:
        from geo_r1.rollout.vllm.server import ServerEngine

        name = ranks.gather(uuid4().hex)[0]
        return ServerEngine(
            recipe.server_url,
            run=name,
            timeout=recipe.timeout,
            patience=recipe.patience,
            say=context.log.say,
            **tokens,
        )
    from geo_r1.rollout.vllm.in_process import VLLMEngine

    folder = context.run_dir / "rollout-model"
    if ranks.is_main:
        write_engine_folder(folder, vlm.model.config, context.tokenizer, context.encoder.image_processor)
    ranks.barrier()
    on_gpu = ranks.device.type == "cuda"
    return VLLMEngine(
        folder,
        dtype=vlm.compute_dtype,
        max_model_len=max_model_len(context.recipe, vlm.model.config),
        max_num_seqs=min(MOST_AT_A_TIME, config.prompts_per_step * config.num_completions),
        gpu_memory_utilization=recipe.gpu_memory,
        kv_cache_bytes=None if on_gpu else kv_cache_bytes(context.recipe, vlm.model.config),
        tensor_parallel_size=recipe.tensor_parallel_size,
        sleep=on_gpu and not recipe.max_staleness,
        **tokens,
    )


def max_model_len(recipe: Recipe, config: Any) -> int:
    """The most tokens of a prompt with its completion that vLLM must expect."""
    if recipe.rollout.max_model_len is not None:
        return recipe.rollout.max_model_len
    most = config.get_text_config().max_position_embeddings
    prompt = recipe.data.max_prompt_tokens
    return most if prompt is None else min(most, prompt + recipe.rollout.max_new_tokens)


def kv_cache_bytes(recipe: Recipe, config: Any) -> int:
    """Bytes of the keys and values of `rollout.max_tokens` tokens."""
    return recipe.rollout.max_tokens * cached_bytes(config, getattr(torch, recipe.model.dtype).itemsize)
