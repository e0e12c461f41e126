"""Qwen2-VL and Qwen2.5-VL from transformers, run on packed batches with `packed_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    vision_utils,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.kernels import PackedLayout, packed_attention
from geo_r1.models.packed import PackedBatch, to_device

MODEL_CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}

LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The vision tower takes its packed path only where the name contains "flash".
TEXT_ATTENTION = "geo_r1_packed"
VISION_ATTENTION = "geo_r1_packed_flash"

# attend(layer index, q [T, H, D], k [T, K, D], v [T, K, D], scale) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class PackedVLM:
    """A transformers model and the two ways through it: a packed batch, or rows with your own attention.

    Args:
        model: a Qwen2-VL or Qwen2.5-VL with its language head. Its attention is set to the packed one.
        compute_dtype: what layers compute in (autocast); None computes in the weights' own dtype.
        liger: let liger-kernel compute what it can, where it is installed and the model is on a GPU by now;
            False leaves the layers as they are handed over.

    Attributes:
        fused_layers: what liger-kernel computes, such as "rms_norm"; empty where `unfused` says why.
        unfused: why transformers computes every layer; "" where it does not.

    Raises:
        ValueError: the model is of another family.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration | Qwen2VLForConditionalGeneration,
        compute_dtype: torch.dtype | None = None,
        liger: bool = True,
    ) -> None:
        if model.config.model_type not in MODEL_CLASSES:
            raise ValueError(
                f"cannot pack a {model.config.model_type}; supported: {', '.join(MODEL_CLASSES)}"
            )
        model.model.language_model.config._attn_implementation = TEXT_ATTENTION
        model.model.visual.config._attn_implementation = VISION_ATTENTION
        self.model = model
        self.compute_dtype = compute_dtype or model.dtype
        self.fused_layers: tuple[str, ...] = ()
        self.unfused = self._why_unfused(liger)
        if not self.unfused:
            from geo_r1.models.liger import fuse_layers  # imports Triton

            self.fused_layers = fuse_layers(model)

    def _why_unfused(self, liger: bool) -> str:
        if not liger:
            return "it is turned off"
        if self.device.type != "cuda":
            return f"the model is on the {self.device.type.upper()}"
        if not {self.model.dtype, self.compute_dtype} <= set(LIGER_DTYPES):
            return f"it does not compute in {self.compute_dtype}"
        return "" if find_spec("liger_kernel") else "liger-kernel is not installed"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def lm_head(self) -> Tensor:
        """[V, C] the language head's own weight, in the weights' dtype, which the `linear_*` ops take."""
        return self.model.lm_head.weight

    @property
    def vision_token_ids(self) -> list[int]:
        """Tokens that only a prompt may hold."""
        config = self.model.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return [getattr(config, name) for name in names]

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a completion, as the checkpoint's generation config names them."""
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def loss_rows(self, batch: PackedBatch) -> Tensor:
        """[R, C] the hidden states that predict each completion token of the batch, in order."""
        layout = batch.layout

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return packed_attention(q, k, v, layout, scale=scale)

        return self.hidden_states(batch, attend).index_select(0, layout.predictor_row)

    def hidden_states(self, batch: PackedBatch, attend: Attend) -> Tensor:
        """[T, C] final hidden states of every token of the batch.

        Raises:
            ValueError: image tokens and encoded picture patches do not match.
        """
        embedded = self.model.get_input_embeddings()(batch.token_ids)
        if batch.pixel_values is not None:
            features = self.encode_images(batch.pixel_values, batch.image_grids)
            if len(features) != len(batch.image_rows):
                raise ValueError(f"{len(batch.image_rows)} image tokens but {len(features)} encoded patches")
            embedded = embedded.index_copy(0, batch.image_rows, features.to(embedded.dtype))
        return self.run_text(embedded, batch.position_ids, attend)

    def run_text(self, embedded: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """[T, C] embeddings and [3, T] positions through the text layers to [T, C] final hidden states."""
        with self.autocast():
            outputs = self.model.model.language_model(
                inputs_embeds=embedded[None],
                position_ids=position_ids[:, None],
                attention_mask={"full_attention": None},
                use_cache=False,
                attend=attend,
            )
        return outputs.last_hidden_state[0].to(self.compute_dtype)

    def autocast(self) -> torch.autocast:
        """A context that computes in `compute_dtype`; the methods enter it themselves."""
        return torch.autocast(
            self.device.type, self.compute_dtype, enabled=self.compute_dtype != self.model.dtype
        )

    def encode_images(self, pixel_values: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Encode pictures of any sizes in one call: [patches, patch size] to [merged patches, C].

        All indices are made on the host from the grids, so nothing waits for the device.
        """
        visual = self.model.model.visual
        config = visual.config
        grid = torch.tensor(grids)
        images = vision_utils.get_vision_cu_seqlens(grid)
        options = {
            "cu_seqlens": images,
            "position_ids": vision_utils.get_vision_position_ids(grid, config.spatial_merge_size),
        }
        layouts = {"cu_seqlens": images}
        if hasattr(config, "window_size"):
            index, windows = vision_utils.get_vision_window_index(
                grid, config.spatial_merge_size, config.window_size, config.patch_size
            )
            options |= {"window_index": index, "cu_window_seqlens": windows}
            layouts["cu_window_seqlens"] = windows
        options = {name: to_device(tensor, self.device) for name, tensor in options.items()}
        by_boundary = [
            (options[name], PackedLayout.from_lengths(cu.diff().tolist(), device=self.device))
            for name, cu in layouts.items()
        ]
        # With gradient checkpointing transformers asks for gradients of the patches even of a frozen tower.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
        with self.autocast(), torch.set_grad_enabled(trained):
            outputs = visual(
                pixel_values.to(visual.dtype),
                grid_thw=grid,
                max_seqlen=int(images.diff().max()),
                **({"max_window_seqlen": int(windows.diff().max())} if "window_index" in options else {}),
                **options,
                vision_layouts=by_boundary,
            )
        return outputs.pooler_output


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    liger: bool = True,
) -> tuple[PackedVLM, PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    """Load a checkpoint, its tokenizer and its image processor from a folder or by hub name.

    Args:
        dtype: of the weights.
        compute_dtype, liger: see `PackedVLM`.
        device: where the model goes.

    Raises:
        ValueError: there is no such checkpoint, it is incomplete, or of an unsupported family.
    """
    try:
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise ValueError("there is no such folder")
        config = AutoConfig.from_pretrained(path)
        if config.model_type not in MODEL_CLASSES:
            raise ValueError(f"it is a {config.model_type}; supported: {', '.join(MODEL_CLASSES)}")
        # transformers fills weights it does not find with random ones, and makes up a tokenizer.
        loaded: Any = MODEL_CLASSES[config.model_type].from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, report = loaded
        if unfit := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
            raise ValueError(f"{len(unfit)} weights are missing or of another shape, the first is {unfit[0]}")
        tokenizer = AutoTokenizer.from_pretrained(path)
        if len(tokenizer) <= config.image_token_id:
            raise ValueError(
                f"its tokenizer has {len(tokenizer)} tokens, but images are {config.image_token_id}"
            )
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {path} cannot be loaded: {reason}") from error
    return PackedVLM(model.to(device), compute_dtype, liger), tokenizer, image_processor


def _text_attention(module, query, key, value, attention_mask, *, scaling, attend: Attend, **_):
    """transformers' attention signature, [1, heads, T, D] in and [1, T, heads, D] out."""
    # under autocast the rotary embedding leaves q and k in float32
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return attend(module.layer_idx, q, k, v, scaling)[None], None


def _vision_attention(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, vision_layouts, **_
):
    """Windows or whole pictures: the layout belongs to the very boundary tensor that this layer was given."""
    layout = next(layout for boundaries, layout in vision_layouts if boundaries is cu_seq_lens_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, layout, causal=False, scale=scaling)[None], None


AttentionInterface.register(TEXT_ATTENTION, _text_attention)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)
