"""The models of a run: loaded by rank 0, prepared as the recipe asks, and sharded over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedConfig

from geo_r1.data import PromptEncoder, World, exemplars
from geo_r1.errors import UserError
from geo_r1.models import PackedVLM, load_model
from geo_r1.models.loading import stored_dtype
from geo_r1.models.lora import add_lora
from geo_r1.models.tiny import build_tiny
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.parallel.strategy import shard_model, strategy_of
from geo_r1.train.recipe.run_sections import ModelConfig, ParallelConfig
from geo_r1.train.recipe.sections import GRPOConfig, Recipe, SFTConfig

TINY = "tiny"
# keys of the recipe's section `world` that are about its questions and answers, not about the world
TEACHER = {"response", "careless", "slip", "curriculum_start", "curriculum_samples"}
TOKENIZER_SAMPLES = 200


@dataclass(frozen=True)
class Models:
    """Loads a run's models: from a folder, from the hub, or the procedural world's own tiny one."""

    recipe: Recipe
    world: World
    ranks: Ranks

    def policy(self, path: str | Path, config: SFTConfig | GRPOConfig) -> Policy:
        """The model that a stage trains.

        Raises:
            UserError: it cannot be loaded, or the recipe leaves nothing to train.
        """
        options = self.recipe.model
        bare = config.optim.optimizer == "adamw_bf16"  # which rounds so that small updates are not lost
        if bare and options.dtype != "bfloat16":
            raise UserError(f"optimizer = adamw_bf16 needs model.dtype = bfloat16, it is {options.dtype}")
        vlm, *_ = self.load(path, torch.bfloat16 if bare else None)
        vlm.freeze(config.freeze)
        lora = self.recipe.lora
        if lora.rank:
            dropout = 0.0 if isinstance(config, GRPOConfig) else lora.dropout
            add_lora(vlm.model, lora.rank, lora.alpha, dropout, lora.targets, lora.vision)
        if not any(parameter.requires_grad for parameter in vlm.model.parameters()):
            raise UserError(f"freeze = {list(config.freeze)} leaves nothing to train")
        vlm.checkpoint_layers(options.checkpointing)
        vlm.offload_activations(options.offload_activations)
        if options.compile:
            vlm.compile_layers()
        return shard_model(vlm, self.ranks, self.recipe.parallel, alpha=lora.alpha if lora.rank else None)

    def reference(self, path: str | Path, moves: bool) -> Policy:
        """A model without gradients, sharded as the policy is.

        Args:
            moves: True if its weights will change, in steps too small for a narrow dtype.
        """
        # Sharded layers compute with narrow weights; under ddp, autocast keeps activations between them wide.
        alike = strategy_of(self.recipe.parallel, self.ranks) == "ddp" or moves
        vlm, *_ = self.load(path, None if alike else getattr(torch, self.recipe.model.dtype))
        vlm.model.requires_grad_(False).eval()
        return shard_model(vlm, self.ranks, self.recipe.parallel, trained=False)

    def finished(self, path: str | Path) -> Policy:
        """A model without gradients, whole on every rank."""
        vlm, *_ = self.load(path, getattr(torch, self.recipe.model.dtype))
        vlm.model.requires_grad_(False).eval()
        return shard_model(vlm, self.ranks, ParallelConfig(strategy="ddp"), trained=False)

    def load(self, path: str | Path, dtype: torch.dtype | None = None) -> tuple[PackedVLM, Any, Any]:
        """Model, tokenizer and image processor; the model has its weights on rank 0, on the host.

        Args:
            dtype: of the weights; without it, that of the recipe, but float32 where layers compute in
                bfloat16: an update of 1e-6 is lost in bfloat16 weights.
        """
        options = self.recipe.model
        compute_dtype = getattr(torch, options.dtype)
        if dtype is None:
            dtype = torch.float32 if compute_dtype == torch.bfloat16 else compute_dtype
        choices: dict[str, Any] = {"device": self.ranks.device, "liger": options.liger}
        if path != TINY:
            return load_model(
                path, dtype, compute_dtype, weights=self.ranks.is_main, weights_on="cpu", **choices
            )
        model, tokenizer, image_processor = build_tiny(_tokenizer_texts(self.world), self.recipe.run.seed)
        torch.nn.Module.to(model, dtype)
        return PackedVLM(model, compute_dtype, **choices), tokenizer, image_processor


def _tokenizer_texts(world: World) -> list[str]:
    samples = [
        write(world, "train", index)
        for index in range(TOKENIZER_SAMPLES)
        for write in (exemplars.chain_of_thought, exemplars.caption)
    ]
    prompts = [part["text"] for s in samples for part in s.messages[0]["content"] if part["type"] == "text"]
    return ["user\n", "assistant\n", *prompts, *(s.response or "" for s in samples)]


def encoder_of(recipe: Recipe, config: Any, tokenizer: Any, image_processor: Any) -> PromptEncoder:
    """The encoder of prompts that the recipe asks for."""
    options = recipe.data
    return PromptEncoder(
        tokenizer,
        image_processor,
        config.image_token_id,
        max_pixels=options.max_pixels,
        max_prompt_tokens=options.max_prompt_tokens,
        on_overlong=options.on_overlong,
        on_bad_sample=options.on_bad_sample,
        keep_images=recipe.rollout.engine == "vllm",
    )


def export_dtype_of(options: ModelConfig) -> torch.dtype:
    """The dtype of exported weights."""
    if options.export_dtype != "base":
        return getattr(torch, options.export_dtype)
    return torch.float32 if options.path == TINY else stored_dtype(options.path)


def world_of(recipe: Recipe) -> World:
    """The procedural world of a recipe."""
    return World(**recipe.world.model_dump(exclude=TEACHER))


def without_weights(recipe: Recipe) -> tuple[PreTrainedConfig, Any, Any]:
    """Config, tokenizer and image processor of the recipe's model.

    Raises:
        UserError: there is no such model, or it is of an unsupported family.
    """
    check_model_exists(recipe.model.path)
    if recipe.model.path != TINY:
        vlm, tokenizer, image_processor = load_model(recipe.model.path, liger=False, weights=False)
    else:  # is made on the spot
        alone = Ranks(0, 1, torch.device("cpu"))
        vlm, tokenizer, image_processor = Models(recipe, world_of(recipe), alone).load(TINY)
    return vlm.model.config, tokenizer, image_processor


def check_model_exists(path: str) -> None:
    """Report a mistyped path at once; transformers would retry the hub for half a minute."""
    if path == TINY or Path(path).is_dir():
        return
    try:
        if not try_to_load_from_cache(path, "config.json"):
            model_info(path, timeout=10)
    except HFValidationError:
        raise UserError(f"model folder {path} does not exist") from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"model {path}: no such folder, and the hub does not answer for it: {error}"
        ) from error
