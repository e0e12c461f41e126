"""What vLLM is given, in this process or at a server, and what it gives back.

A model's folder, options, requests and weights go in; completions come back.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.models import EncodedPrompt
from geo_r1.models.qwen_vl import MODEL_CLASSES
from geo_r1.models.skeleton import empty_model
from geo_r1.rollout.sampling import Completion, SamplingConfig

FORBIDDEN = -1e30  # added to a logit: its probability is exactly 0. JSON, for a server, has no infinity
COLDEST = 0.01  # vLLM draws at no lower temperature but 0, and at none above the next
HOTTEST = 2.0
LONGEST_SIDE = 200  # times the other: the most that a picture may be


def write_engine_folder(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Qwen2VLImageProcessorPil,
) -> None:
    """Write all of a model but its weights, which are sent; what was in the folder is replaced.

    Pictures come at the size that the policy takes, so the limits of the image processor are opened to what
    `PromptEncoder` can make of a picture: vLLM plans its memory for the largest one that they allow.
    """
    config = copy.deepcopy(config)
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    image_processor = copy.deepcopy(image_processor)
    token_pixels = (image_processor.patch_size * image_processor.merge_size) ** 2
    most_tokens = math.ceil(image_processor.size["longest_edge"] / token_pixels)
    # A long and narrow picture is one token wide at least, and rounded up on both sides.
    most_tokens += math.ceil(math.sqrt(LONGEST_SIDE * most_tokens) + math.sqrt(most_tokens)) + 1
    image_processor.size = {"shortest_edge": token_pixels, "longest_edge": most_tokens * token_pixels}
    partial = folder.with_name(folder.name + ".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    for part in (config, tokenizer, image_processor, GenerationConfig.from_model_config(config)):
        part.save_pretrained(partial)
    partial.rename(folder)


def common_options() -> dict[str, Any]:
    """Options of an engine whose weights are sent."""
    return {
        "load_format": "dummy",
        "generation_config": "vllm",  # requests say all there is to say
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "enable_prefix_caching": True,  # a group's completions share their prompt
        "limit_mm_per_prompt": {"video": 0},  # else memory is planned for the longest video
        "mm_processor_cache_gb": 0,  # a prompt's pictures come once between two loads
        "mm_device_do_normalize": False,  # its constants are drawn at random where no checkpoint is read
    }


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """Options that vLLM needs on a CPU: there a seeded request fails whose prompt is computed in parts."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4 * max_model_len, 8192),
        "block_size": 32,  # completions share whole blocks of their prompt; 128, the default, is long
    }


def serve_command(
    folder: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    max_model_len: int | None = None,
    tensor_parallel_size: int = 1,
    options: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of a server that `ServerEngine` can use.

    In its development mode whoever reaches the port can change what it runs, key or no key: keep it to this
    machine or a private network.

    Args:
        folder: of `write_engine_folder`.
        host: the address that it listens at; who else is to reach it needs another than the default.
        max_model_len: tokens of a prompt and a completion; None takes the most that the model knows.
        options: further ones of the command line.
    """
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    named = {
        **common_options(),
        "enable_scale_out": True,
        "worker_extension_cls": "geo_r1.rollout.vllm.receiver.WeightReceiver",
        "host": host,
        "port": port,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
    }
    if max_model_len is not None:
        named["max_model_len"] = max_model_len
    return environment, ["vllm", "serve", folder, *flags(named), *options]


def flags(options: Mapping[str, Any]) -> list[str]:
    """vLLM's options by their names in Python, as its command line writes them."""
    written: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            written += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return written


def seed_of(stream: str) -> int:
    """The seed of a prompt's random stream; vLLM adds a completion's index to it, and takes 64 bits."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def sampling_params(
    sampling: SamplingConfig,
    num_completions: int,
    seed: int,
    end_token_ids: Collection[int],
    vision_token_ids: Collection[int],
) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams` for one prompt.

    Tokens are forbidden by a bias on their logits: one addition a step. A list of what is allowed would be
    sent with every request and masked at every step, and bad words are a loop over the requests.

    Raises:
        ValueError: vLLM cannot draw at that temperature.
    """
    greedy = sampling.temperature == 0
    if not greedy and not COLDEST <= sampling.temperature <= HOTTEST:
        raise ValueError(
            f"vLLM samples at temperature 0 or {COLDEST} to {HOTTEST}, not {sampling.temperature}; "
            "change it, or sample natively"
        )
    return {
        "n": 1 if greedy else num_completions,  # vLLM refuses to say one thing twice
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
        "logprobs": 0,  # of the token that was drawn, no others
        "stop_token_ids": sorted(end_token_ids),
        "ignore_eos": True,  # the list above is all that ends a completion
        "logit_bias": dict.fromkeys(sorted(vision_token_ids), FORBIDDEN),
        "detokenize": False,
        "skip_special_tokens": False,
    }


def pictures_of(prompt: EncodedPrompt) -> list[Image.Image]:
    """A prompt's pictures as they were encoded.

    Raises:
        ValueError: they were not kept.
    """
    if len(prompt.pictures) != len(prompt.image_grids):
        raise ValueError(
            f"sample {prompt.sample_id}: {len(prompt.image_grids)} images were encoded and "
            f"{len(prompt.pictures)} kept; vLLM needs them: PromptEncoder(..., keep_pictures=True)"
        )
    return [Image.fromarray(pixels) for pixels in prompt.pictures]


def check_expanded(prompt: EncodedPrompt, token_ids: Sequence[int]) -> None:
    """Raise ValueError, with the sample's name, unless vLLM's tokens of a prompt are the policy's."""
    if list(token_ids) != prompt.token_ids:
        raise ValueError(
            f"sample {prompt.sample_id}: vLLM reads a prompt of {len(token_ids)} tokens where the policy has "
            f"{len(prompt.token_ids)}; its folder must be written by write_engine_folder for this policy"
        )


def read_completions(
    said: Sequence[tuple[Sequence[int], Sequence[float], str | None]],
    num_completions: int,
    sampling: SamplingConfig,
    vision_token_ids: Collection[int],
) -> list[Completion]:
    """Completions of one prompt from what vLLM said.

    Args:
        said: of each, its tokens, their log-probabilities and vLLM's reason to finish.
    """
    completions = []
    for token_ids, logp, reason in said:
        assert reason in ("stop", "length"), f"vLLM finished a completion because of {reason}"
        assert len(token_ids) == len(logp) > 0 and not set(token_ids) & set(vision_token_ids)
        if sampling.temperature == 0:  # where each token is certain
            logp = [0.0] * len(logp)
        completions.append(Completion(list(token_ids), list(logp), reason == "stop"))
    if sampling.temperature == 0:
        completions *= num_completions
    assert len(completions) == num_completions
    return completions


def expected_weights(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the weights of a model, tied ones once."""
    model = empty_model(type(config).from_dict(config.to_dict()), torch.float32)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class CheckedWeights:
    """Weights on their way to an engine; those that do not fit are left out and named at the end.

    Args:
        tensors: names and values.
        expected: names and shapes, each wanted once.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, torch.Size]) -> None:
        self._tensors, self._expected = tensors, expected
        self._left = set(expected)
        self._wrong: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            if name not in self._left:
                why = "came twice" if name in self._expected else "is no weight of this model"
                self._wrong.append(f"{name} {why}")
                continue
            self._left.remove(name)
            if tensor.shape != self._expected[name]:
                shapes = f"{list(tensor.shape)}, not {list(self._expected[name])}"
                self._wrong.append(f"{name} has shape {shapes}")
            else:
                yield name, tensor

    def check(self) -> None:
        """Raise ValueError, naming them, if weights did not fit or did not come; call it after the last."""
        wrong = self._wrong + [f"{name} is missing" for name in sorted(self._left)]
        if wrong:
            named = "; ".join(wrong[:3])
            raise ValueError(f"{len(wrong)} weights do not fit the engine's model: {named}")


def reload(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """To be run in each of vLLM's workers: take over weights, and say which of vLLM's own did not come.

    vLLM itself warns of those only, and what came is known to the model's own `load_weights` alone.
    """
    # Its warnings name layers that have no weights, at every load; what is missing is returned.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    model = worker.model_runner.get_model()
    # Without a checkpoint vLLM draws random values for all that one could hold, buffers included.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name for name, _ in model.named_parameters()} | set(model.state_dict()) - tied
    wanted = {name for name in wanted if "._" not in name}  # scales of a quantised cache, set by vLLM itself
    loaded: set[str] = set()
    load_weights = model.load_weights

    def counted(given: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load_weights(given))
        return loaded

    model.load_weights = counted
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    head = model.get_language_model().lm_head
    if (
        model.get_language_model().config.tie_word_embeddings
    ):  # on a CPU it has a packed copy, which is old now
        head.quant_method.process_weights_after_loading(head)
    return sorted(wanted - loaded)
