"""Input and output of vLLM, in this process or at a server: model folder, options, requests, completions."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.errors import UserError
from geo_r1.models import EncodedPrompt
from geo_r1.models.qwen_vl import MODEL_CLASSES
from geo_r1.rollout.sampling import Completion, SamplingConfig

FORBIDDEN = -1e30  # added to a logit: its probability is exactly 0. JSON, for a server, has no infinity
COLDEST, HOTTEST = 0.01, 2.0  # the temperatures, besides 0, that vLLM samples at
LONGEST_SIDE = 200  # times the other, at most


def write_engine_folder(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Qwen2VLImageProcessorPil,
) -> None:
    """Write everything of a model but its weights, which are sent; replaces the folder.

    Images have the policy's size already, so the image processor's limits are widened to every size that
    `PromptEncoder` makes: vLLM plans its memory for the largest image that they allow.
    """
    config = copy.deepcopy(config)
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    image_processor = copy.deepcopy(image_processor)
    token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
    most_tokens = math.ceil(image_processor.size["longest_edge"] / token_pixels)
    # A long and narrow image is one token wide at least, and rounded up on both sides.
    most_tokens += math.ceil(math.sqrt(LONGEST_SIDE * most_tokens) + math.sqrt(most_tokens)) + 1
    image_processor.size = {"shortest_edge": token_pixels, "longest_edge": most_tokens * token_pixels}
    partial = folder.with_name(folder.name + ".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    for part in (config, tokenizer, image_processor, GenerationConfig.from_model_config(config)):
        part.save_pretrained(partial)
    partial.rename(folder)


def common_options() -> dict[str, Any]:
    """Options of every engine; its weights are sent."""
    return {
        "load_format": "dummy",
        "generation_config": "vllm",  # requests state every option
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "enable_prefix_caching": True,  # a group's completions share their prompt
        "limit_mm_per_prompt": {"video": 0},  # otherwise memory is planned for the longest video
        "mm_processor_cache_gb": 0,  # a prompt's images come once per load
        "mm_device_do_normalize": False,  # its constants are drawn at random where no checkpoint is read
    }


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """Options that vLLM needs on a CPU, where a seeded request fails if its prompt is computed in parts."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4 * max_model_len, 8192),
        "enforce_eager": True,  # compiling a small model takes longer than it saves
        "block_size": 32,  # completions share whole blocks of their prompt; 128, the default, is long
    }


def serve_command(folder: Path, **options: Any) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of a server for `ServerEngine`.

    In development mode anyone who reaches the port can change what the server runs. VLLM_API_KEY guards
    sampling, but not the routes that replace weights: keep the port to this machine or a private network.

    Args:
        folder: written by `write_engine_folder`.
        options: further ones, by vLLM's names in Python, such as host, port, dtype and max_model_len. The
            default host is reached from this machine alone.
    """
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    named = common_options() | {
        "enable_scale_out": True,
        "worker_extension_cls": "geo_r1.rollout.vllm.channel.WeightReceiver",
        "host": "127.0.0.1",
    }
    # `vllm serve` asks for the version of a package named vllm, which the build for CPUs is not.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return environment, server + flags(named | options)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options by their names in Python, as words of vLLM's command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def seed_of(stream: str) -> int:
    """The seed of a prompt's random stream; vLLM adds a completion's index to it, and takes 64 bits."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def sampling_params(
    sampling: SamplingConfig,
    num_completions: int,
    stream: str,
    end_token_ids: Collection[int],
    vision_token_ids: Collection[int],
) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams` for one prompt.

    A bias on their logits forbids tokens, for one addition a step. A list of allowed tokens would be sent
    with every request and masked at every step; bad words are a loop over the requests.

    Raises:
        UserError: vLLM does not sample at that temperature.
    """
    greedy = sampling.temperature == 0
    if not greedy and not COLDEST <= sampling.temperature <= HOTTEST:
        raise UserError(
            f"vLLM samples at temperature 0 or {COLDEST} to {HOTTEST}, not {sampling.temperature}; "
            "change it, or sample natively"
        )
    return {
        "n": 1 if greedy else num_completions,  # vLLM refuses to repeat a greedy one
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed_of(stream),
        "logprobs": 0,  # of the drawn token alone
        "stop_token_ids": sorted(end_token_ids),
        "ignore_eos": True,  # only the list above ends a completion
        "logit_bias": dict.fromkeys(sorted(vision_token_ids), FORBIDDEN),
        "detokenize": False,
        "skip_special_tokens": False,
    }


def images_of(prompt: EncodedPrompt) -> list[Image.Image]:
    """A prompt's images as they were encoded; raises ValueError if they were not kept."""
    if len(prompt.images) != len(prompt.image_grids):
        raise ValueError(
            f"sample {prompt.sample_id}: {len(prompt.image_grids)} images were encoded and "
            f"{len(prompt.images)} kept; vLLM needs them: PromptEncoder(..., keep_images=True)"
        )
    return [Image.fromarray(pixels) for pixels in prompt.images]


def check_expanded(prompt: EncodedPrompt, token_ids: Sequence[int]) -> None:
    """Raise UserError, with the sample's name, unless vLLM's tokens of a prompt are the policy's."""
    if list(token_ids) != prompt.token_ids:
        raise UserError(
            f"sample {prompt.sample_id}: vLLM reads a prompt of {len(token_ids)} tokens where the policy has "
            f"{len(prompt.token_ids)}; its folder must be written by write_engine_folder for this policy"
        )


def read_completions(
    said: Sequence[tuple[Sequence[int], Sequence[float], str | None]],
    num_completions: int,
    sampling: SamplingConfig,
    vision_token_ids: Collection[int],
) -> list[Completion]:
    """Completions of one prompt.

    Args:
        said: each completion's tokens, their log-probabilities, and vLLM's reason to finish.
    """
    completions = []
    for token_ids, logp, reason in said:
        assert reason in ("stop", "length"), f"vLLM finished a completion because of {reason}"
        assert len(token_ids) == len(logp) > 0 and not set(token_ids) & set(vision_token_ids)
        if sampling.temperature == 0:  # each token is certain
            logp = [0.0] * len(logp)
        completions.append(Completion(list(token_ids), list(logp), reason == "stop"))
    if sampling.temperature == 0:
        completions *= num_completions
    assert len(completions) == num_completions
    return completions
