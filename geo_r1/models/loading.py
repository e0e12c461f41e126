"""From a checkpoint's folder, or its name at the hub, to a model on packed batches."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.errors import UserError
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
        dtype: of the weights.
        compute_dtype, liger: see `PackedVLM`.
        device: where the model is going to run.
        weights: False builds the model on the `meta` device, without any file of weights.
        weights_on: where the weights are put for now; None: on `device`.

    Raises:
        UserError: there is no such checkpoint, it is incomplete, or of an unsupported family.
    """
    try:
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise ValueError("there is no such folder")
        config = AutoConfig.from_pretrained(path)
        if config.model_type not in MODEL_CLASSES:
            raise ValueError(f"it is a {config.model_type}; supported: {', '.join(MODEL_CLASSES)}")
        model = _read(path, config, dtype) if weights else empty_model(config, dtype)
        if not weights:
            with suppress(OSError):  # without that file both ways of making a model take the config's values
                model.generation_config = GenerationConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) <= config.image_token_id:
            raise ValueError(
                f"its tokenizer has {len(tokenizer)} tokens, but images are {config.image_token_id}"
            )
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {path} cannot be loaded: {reason}") from error
    if weights:
        torch.nn.Module.to(model, device if weights_on is None else weights_on)
    return PackedVLM(model, compute_dtype, liger, device), tokenizer, image_processor


def _read(path: str | Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # transformers fills weights it does not find with random ones, and makes up a tokenizer.
    loaded: Any = MODEL_CLASSES[config.model_type].from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    if unfit := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ValueError(f"{len(unfit)} weights are missing or of another shape, the first is {unfit[0]}")
    return model
