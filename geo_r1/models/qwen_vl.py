"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL from transformers, on packed batches with `packed_attention`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from geo_r1.errors import UserError
from geo_r1.kernels import packed_attention
from geo_r1.models.attention import TEXT_ATTENTION, VISION_ATTENTION, Attend, Hidden, add_at_rows
from geo_r1.models.layers import run_layers
from geo_r1.models.memory import Checkpointing, HostMemory
from geo_r1.models.packed import PackedBatch
from geo_r1.models.skeleton import empty_like
from geo_r1.models.vision import tower_inputs

MODEL_CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}

LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PARTS = ("vision", "projector", "text")  # in the order of the forward pass
VISION = "model.visual."  # prefix of the weights of the vision tower and its projector


def part_of(name: str) -> str:
    """The part, one of PARTS, that a weight or module belongs to."""
    if not name.startswith(VISION):
        return "text"
    merges = name.startswith((f"{VISION}merger.", f"{VISION}deepstack_merger_list."))
    return "projector" if merges else "vision"


class PackedVLM:
    """A transformers model, run on a packed batch, or on rows with your own attention.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL with its language head; may be on the `meta` device. Its
            attention is replaced by the packed one.
        compute_dtype: dtype of the layers (autocast); None: the weights' own.
        liger: let liger-kernel compute the layers that it supports, if it is installed and the model runs on
            a GPU.
        device: where the model will run; None: where its weights are.

    Attributes:
        fused_layers: the layers that liger-kernel computes, such as "rms_norm".
        unfused: why it computes none, or not all that it supports; "" if it does.
        checkpointing: what backward computes again.

    Raises:
        UserError: the model belongs to another family.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute_dtype: torch.dtype | None = None,
        liger: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if model.config.model_type not in MODEL_CLASSES:
            raise UserError(f"cannot pack a {model.config.model_type}; supported: {', '.join(MODEL_CLASSES)}")
        model.model.language_model.config._attn_implementation = TEXT_ATTENTION
        model.model.visual.config._attn_implementation = VISION_ATTENTION
        if model.config.model_type == "qwen3_vl":
            model.model.language_model._deepstack_process = add_at_rows
        self.model = model
        self.compute_dtype = compute_dtype or model.dtype
        self.liger = liger
        self._runs_on = None if device is None else torch.device(device)
        self._host_memory: HostMemory | None = None
        self.checkpointing: Checkpointing = "none"
        self._backend: str | Callable | None = None
        self.fused_layers: tuple[str, ...] = ()
        self.unfused = self._why_unfused(liger)
        if not self.unfused:
            from geo_r1.models.liger import CLASSES, fuse_layers  # imports Triton

            self.fused_layers = fuse_layers(model)
            if left := sorted(CLASSES.keys() - set(self.fused_layers)):
                self.unfused = f"not {', '.join(left)}: unknown in transformers {transformers.__version__}"

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
        """The device that the model runs on, or will run on."""
        now = self.model.device
        return now if self._runs_on is None or self._runs_on.type == now.type else self._runs_on

    @property
    def layers(self) -> list[nn.Module]:
        """Text layers and vision blocks; each is recomputed, compiled and sharded as a unit."""
        return [*self.model.model.language_model.layers, *self.model.model.visual.blocks]

    @property
    def lm_head(self) -> Tensor:
        """[V, C] the language head's own weight, in the weights' dtype, for the `linear_*` ops."""
        return self.model.lm_head.weight

    @property
    def vision_token_ids(self) -> list[int]:
        """Tokens that only a prompt may contain."""
        config = self.model.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return [getattr(config, name) for name in names]

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a completion, from the checkpoint's generation config."""
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
            ValueError: image tokens and encoded image patches do not match.
        """
        with self._host_memory.saving() if self._host_memory is not None else nullcontext():
            embedded = self.model.get_input_embeddings()(batch.token_ids)
            deepstack: Sequence[Tensor] = ()
            if batch.pixel_values is not None:
                features, deepstack = self.encode_images(batch.pixel_values, batch.image_grids)
                if len(features) != len(batch.image_rows):
                    raise ValueError(
                        f"{len(batch.image_rows)} image tokens but {len(features)} encoded patches"
                    )
                embedded = embedded.index_copy(0, batch.image_rows, features.to(embedded.dtype))
            return self.run_text(embedded, batch.position_ids, attend, batch.image_rows, deepstack)

    def run_text(
        self,
        embedded: Tensor,
        position_ids: Tensor,
        attend: Attend,
        image_rows: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run embeddings through the text layers.

        Args:
            embedded: [T, C].
            position_ids: [3, T].
            attend: the attention of every layer.
            image_rows: [I] int64, the rows to which `deepstack` is added.
            deepstack: [I, C] each, added after the first, second, ... layer.

        Returns:
            [T, C] final hidden states.
        """
        images = {"visual_pos_masks": image_rows, "deepstack_visual_embeds": deepstack} if deepstack else {}
        with self.autocast():
            outputs = self.model.model.language_model(
                inputs_embeds=embedded[None],
                position_ids=position_ids[:, None],
                attention_mask={"full_attention": None},
                use_cache=False,
                attend=Hidden(attend),
                **images,
            )
        return outputs.last_hidden_state[0].to(self.compute_dtype)

    def autocast(self) -> torch.autocast:
        """A context that computes in `compute_dtype`; the methods enter it themselves."""
        return torch.autocast(
            self.device.type, self.compute_dtype, enabled=self.compute_dtype != self.model.dtype
        )

    def encode_images(
        self, pixel_values: Tensor, grids: Sequence[tuple[int, int, int]]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Encode images of any sizes in one call, without waiting for the device.

        Args:
            pixel_values: [patches, patch size].
            grids: (frames, rows, columns) in patches, one per image.

        Returns:
            [merged patches, C], and features of that shape from inside the tower for the first text layers
            (Qwen3-VL's deepstack), else none.
        """
        visual = self.model.model.visual
        inputs = tower_inputs(visual, grids, pixel_values.device)
        # A frozen tower keeps nothing for backward, even if hooks ask for gradients of the patches.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
        with self.autocast(), torch.set_grad_enabled(trained):
            outputs = visual(pixel_values.to(visual.dtype), **inputs)
        return outputs.pooler_output, getattr(outputs, "deepstack_features", None) or ()

    def freeze(self, parts: Collection[str]) -> None:
        """Train every weight but those of `parts`.

        Args:
            parts: from "vision" (the tower without its projector), "projector" (the merger of patches, with
                Qwen3-VL's deepstack mergers) and "text" (the layers, embeddings and head).

        Raises:
            UserError: there is no such part.
        """
        if unknown := set(parts) - set(PARTS):
            raise UserError(f"cannot freeze {min(unknown)!r}; the parts are {', '.join(PARTS)}")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(part_of(name) not in parts)

    def skeleton(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PackedVLM:
        """The same model and settings on the `meta` device; weights and buffers come later.

        Its parameters and buffers have the names, shapes and dtypes of this model's; adapters, frozen parts
        and memory options are left out.

        Args:
            dtype: dtype of the weights; None: this model's.
            device: where it will run; None: this model's device.
        """
        model = empty_like(self.model, dtype or self.model.dtype)
        return PackedVLM(model, self.compute_dtype, self.liger, device or self.device)

    def checkpoint_layers(self, kind: Checkpointing) -> None:
        """Choose what backward recomputes; the gradients stay the same. Call it before sharding.

        Args:
            kind: "none"; "full" keeps only the input of each layer and vision block; "selective" also the
                output of its attention and every second product after it (in compiled layers, only the
                attention's output).

        Raises:
            UserError: there is no such kind.
        """
        if kind not in get_args(Checkpointing):
            raise UserError(f"no checkpointing {kind!r}; there is {', '.join(get_args(Checkpointing))}")
        self.checkpointing = kind
        run_layers(self.layers, kind, self._backend)

    def offload_activations(self, on: bool) -> HostMemory | None:
        """Move tensors that `hidden_states` and `loss_rows` save for backward to the host, or stop doing so.

        Call it before sharding. With checkpointing, only the inputs of the layers are saved.

        Returns:
            The host memory, with its size limit and its counts; None if off.

        Raises:
            UserError: the layers are compiled without checkpointing.
        """
        if self._host_memory is not None:
            self._host_memory.close()
        self._host_memory = HostMemory(self.model) if on else None
        self._check_offload()
        return self._host_memory

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compile each text layer and vision block, once for all lengths. Call it before sharding.

        Args:
            backend: torch.compile's. Attention stays outside its graphs, so a layer becomes two graphs.

        Raises:
            UserError: activations are offloaded without checkpointing.
        """
        self._backend = backend
        run_layers(self.layers, self.checkpointing, backend)
        self._check_offload()

    def _check_offload(self) -> None:
        if self._backend is not None and self._host_memory is not None and self.checkpointing == "none":
            raise UserError(
                "compiled layers save weights and activations alike: offload_activations needs checkpointing"
            )
