"""Load a checkpoint, from a folder or the hub, as a model on packed batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.errors import UserError, one_line
from geo_r1.models.chat import TemplateFault, memory_limit, render_chat
from geo_r1.models.qwen_vl import MODEL_CLASSES, PackedVLM
from geo_r1.models.skeleton import empty_model


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    liger: bool = True,
    weights: bool = True,
    weights_on: torch.device | str | None = None,
) -> tuple[PackedVLM, Tokenizer, Qwen2VLImageProcessorPil]:
    """Load a checkpoint, its tokenizer and its image processor from a folder or by hub name.

    Args:
        dtype: the weights' dtype.
        compute_dtype, liger: see `PackedVLM`.
        device: where the model will run.
        weights: False builds the model on the `meta` device and reads no weight files.
        weights_on: where to put the weights for now; None: on `device`.

    Raises:
        UserError: there is no such checkpoint, it is incomplete, or of an unsupported family.
    """
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise UserError(f"model {path} cannot be loaded: there is no such folder")
    with _reading(path, "config.json"):
        config = _config(path)
    with _reading(path, "its weights"):
        model = _read(path, config, dtype) if weights else empty_model(config, dtype)
    if not weights:
        with _reading(path, "generation_config.json"), suppress(OSError):  # else built from the config
            model.generation_config = GenerationConfig.from_pretrained(path)
    with _reading(path, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        _check_tokenizer(tokenizer, config)
    with _reading(path, "preprocessor_config.json"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        _check_image_processor(image_processor, config.vision_config)
    if weights:
        torch.nn.Module.to(model, device if weights_on is None else weights_on)
    return PackedVLM(model, compute_dtype, liger, device), tokenizer, image_processor


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of a checkpoint's weights, as its config says; float32 if it does not.

    Raises:
        UserError: the config cannot be read.
    """
    with _reading(path, "config.json"):
        dtype = _config(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextmanager
def _reading(path: str | Path, part: str) -> Iterator[None]:
    """Turn what transformers raises on a user's file into one line; which error it is depends on the file."""
    try:
        yield
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:
        known = isinstance(error, OSError | ValueError | SafetensorError)
        reason = (
            one_line(str(error).split("\n")[0]) if known else f"{type(error).__name__}: {one_line(error)}"
        )
        raise UserError(f"model {path} cannot be loaded: {part}: {reason}") from error


def _config(path: str | Path) -> PreTrainedConfig:
    raw, _ = PreTrainedConfig.get_config_dict(path)
    kind = raw.get("model_type")
    if kind not in MODEL_CLASSES:  # transformers would offer to run code that comes with the model
        raise ValueError(f"it is a {kind}; supported: {', '.join(MODEL_CLASSES)}")
    for name in ("text_config", "vision_config"):  # without them, transformers builds its default of 7 B
        if name in raw and not isinstance(raw[name], dict):
            raise ValueError(f"{name} must be a table, it is {raw[name]!r:.40}")
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _check_tokenizer(tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"it has {len(tokenizer)} tokens, but the model embeds {rows}")
    if len(tokenizer) <= config.image_token_id:
        raise ValueError(f"it has {len(tokenizer)} tokens, but images are {config.image_token_id}")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        with memory_limit():
            text = render_chat(tokenizer, chat, ask=True)
    except TemplateFault as fault:
        raise ValueError(f"its chat template {fault}") from fault
    count = tokenizer(text, add_special_tokens=False)["input_ids"].count(config.image_token_id)
    if count != 1:
        token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        raise ValueError(f"its chat template writes {token} {count} times for one image")


def _check_image_processor(image_processor: Qwen2VLImageProcessorPil, tower: PreTrainedConfig) -> None:
    for name, of_tower in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        own, wanted = getattr(image_processor, name), getattr(tower, of_tower)
        if own != wanted:
            raise ValueError(f"{name} is {own}, but the model's vision_config has {of_tower} {wanted}")


def _read(path: str | Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # transformers fills missing weights with random ones, and makes up a tokenizer.
    loaded: Any = MODEL_CLASSES[config.model_type].from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, report = loaded
    if unfit := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ValueError(f"{len(unfit)} weights are missing or of another shape, the first is {unfit[0]}")
    return model
