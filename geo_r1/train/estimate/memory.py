"""Bytes on one rank with a GPU, by formula; nothing is allocated.

W and T are the entries of all weights and of the trained ones, n is the number of ranks that share them. A
number takes c bytes in products and w as a held weight: c with DeepSpeed, 2 with adamw_bf16, else at least 4.

    part                  ddp       fsdp2              zero2       zero3
    weights               w W       w W / n            c W         c W / n
    weights in float32                                 4 T / n     4 T / n, with bfloat16
    gradients             w T       w T / n            4 T / n     4 T / n
    optimizer state       2 w T     2 w T / n          8 T / n     8 T / n; adamw_8bit: about 2 T / n
    whole weights         c W       c (root + 3 L)                 c (1e9 + head)

The last line is what a batch goes through: autocast's copies under ddp, gathered weights under fsdp2 (L is a
layer, root is everything outside of layers). What the allocator wastes, CUDA's context and NCCL's buffers
(together a few GiB) come on top. Sources: the code of FSDP2 (torch 2.13) and DeepSpeed (0.19).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from geo_r1.errors import UserError
from geo_r1.kernels.loss.chunks import SCRATCH_BYTES, KernelRows
from geo_r1.models.cost import cached_bytes
from geo_r1.models.qwen_vl import VISION
from geo_r1.train.estimate.activations import Numbers, rows_of
from geo_r1.train.estimate.weights import Weight, entries, weights_of
from geo_r1.train.parallel.optim import BLOCK, SMALLEST
from geo_r1.train.parallel.zero import deepspeed_settings
from geo_r1.train.recipe.run_sections import EvalConfig, LoraConfig
from geo_r1.train.recipe.sections import GRPOConfig, OptimConfig, Recipe

Parts = dict[str, int]
ASSUMED = 80 * 10**9  # bytes of a GPU where there is none
WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2}
CACHE_COPIES = 2  # prompts are cached in groups and once more stacked by length
SAMPLED_LOGIT = 4 + 4 + 8 + 8  # logit and log-probability in float32, exponential and its sum in float64
# DeepSpeed's defaults, in numbers; the user's JSON may have others.
ZERO = {"reduce_bucket_size": 5e8, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9}


@dataclass(frozen=True)
class Load:
    """The work of a step, as far as memory depends on it.

    Attributes:
        prompt_tokens: tokens of a prompt, including those of its images.
        image_tokens: tokens of a prompt's images.
        response_tokens: tokens that are learned or sampled for a prompt, in all.
        step_tokens: tokens of a step, over all ranks; None if they fill micro-batches.
    """

    prompt_tokens: int = 2048
    image_tokens: int = 1536
    response_tokens: int = 512
    step_tokens: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank, by part: `held` throughout the stage, added by each phase, and in host memory."""

    held: Parts
    phases: dict[str, Parts]
    host: Parts = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each phase, including what is held."""
        held = sum(self.held.values())
        return {phase: held + sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.totals.values())


def spread_of(recipe: Recipe, num_ranks: int) -> str:
    """How a recipe spreads the model over a number of ranks: ddp, fsdp2, zero2 or zero3."""
    strategy = recipe.parallel.strategy
    if strategy == "auto":
        return "fsdp2" if num_ranks > 1 else "ddp"
    return f"zero{recipe.parallel.zero_stage}" if strategy == "deepspeed" else strategy


def estimate(
    recipe: Recipe,
    config: PreTrainedConfig,
    num_ranks: int,
    stage: str,
    load: Load | None = None,
    *,
    fused: bool = False,
    capacity: int = ASSUMED,
) -> Estimate:
    """Bytes that a stage takes on one rank: rank 0, whose share is the largest.

    Args:
        config: the model's.
        stage: pretrain, sft, grpo or eval.
        load: the work of a step; by default prompts of 2,048 tokens, 1,536 of them of images, with
            responses of 512, or with as many and as long completions as the recipe allows.
        fused: whether liger-kernel computes norms and MLPs.
        capacity: bytes of the GPU, of which vLLM takes a share.

    Raises:
        UserError: the recipe cannot run like this.
    """
    options, rollout = getattr(recipe, stage), recipe.rollout
    if load is None:
        sampled = isinstance(options, GRPOConfig) and options.num_completions * rollout.max_new_tokens
        load = Load(response_tokens=sampled or Load.response_tokens)
    if isinstance(options, EvalConfig):  # a finished model, whole and narrow on each rank
        rank = _Rank(
            recipe, config, weights_of(config, (), LoraConfig()), OptimConfig(), num_ranks, load, fused
        )
        return Estimate({"weights": rank.replica()}, {"evaluation": rank.evaluation()})

    weights = weights_of(config, options.freeze, recipe.lora)
    rank = _Rank(recipe, config, weights, options.optim, num_ranks, load, fused)
    held, phases, tokens = rank.held(), {}, options.optim.max_tokens
    if load.step_tokens is not None:
        tokens = min(tokens, -(-load.step_tokens // num_ranks))
    if isinstance(options, GRPOConfig):
        if options.loss.beta and not recipe.lora.rank:  # with adapters it is the policy without them
            held |= rank.reference()
        sampling: Parts = {}
        if rollout.engine == "native":
            groups, completions = -(-options.prompts_per_step // num_ranks), options.num_completions
            sampling = rank.sampling(groups, completions, rollout.max_new_tokens, rollout.max_tokens)
            ahead = {"copy that samples": rank.replica()}
            sampling |= ahead if rollout.max_staleness else rank.weights_to_sample()
        elif rollout.server_url is None:
            sampling = {"vLLM": round(rollout.gpu_memory * capacity)}
        if rollout.max_staleness:  # alongside everything that a step does
            held |= sampling
        phases["rollout"] = {} if rollout.max_staleness else sampling
        if options.loss.beta or options.num_iterations > 1 or rollout.importance_sampling != "none":
            phases["reference"] = rank.at_work(backward=False) | rank.forward(tokens)
    if recipe.eval.every:
        phases["evaluation"] = rank.weights_to_sample() | rank.evaluation()
    phases |= rank.learning(tokens)
    host: Parts = {}
    for part in rank.in_host_memory():
        for parts in (held, *phases.values()):
            host |= {part: parts.pop(part)} if part in parts else {}
    return Estimate(held, phases, host)


@dataclass
class _Rank:
    """A rank's weights and its work."""

    recipe: Recipe
    config: PreTrainedConfig
    weights: list[Weight]
    optim: OptimConfig
    num_ranks: int
    load: Load
    fused: bool

    def __post_init__(self) -> None:
        parallel, model = self.recipe.parallel, self.recipe.model
        self.spread = spread_of(self.recipe, self.num_ranks)
        self.by_zero, self.sharded = self.spread.startswith("zero"), self.spread in ("fsdp2", "zero3")
        if self.by_zero and self.optim.optimizer != "adamw":
            raise UserError("DeepSpeed flattens weights, which torchao's optimisers cannot update: use adamw")
        shards = (self.spread == "fsdp2" and parallel.shard_size) or self.num_ranks
        if self.num_ranks % shards:
            raise UserError(f"parallel.shard_size = {shards} does not divide the {self.num_ranks} ranks")
        self.shards = 1 if self.spread == "ddp" else shards
        self.offload = parallel.cpu_offload and self.spread != "ddp"
        self.trained = [weight for weight in self.weights if weight.trained]
        self.narrow = WIDTH[model.dtype]
        self.width = 2 if self.optim.optimizer == "adamw_bf16" else max(self.narrow, 0 if self.by_zero else 4)
        self.casts = self.spread == "ddp" and self.width > self.narrow
        self.zero: dict[str, Any] = dict(ZERO)
        if self.by_zero:
            settings = deepspeed_settings(parallel, self.optim.max_grad_norm, self.narrow == 2)
            self.zero |= settings["zero_optimization"]
        numbers = Numbers(self.width if self.casts else self.narrow, self.narrow, self.casts, self.fused)
        self.tokens, self.images = rows_of(self.config, numbers, model.checkpointing)
        self.text: Any = self.config.get_text_config()
        self.head = self.text.vocab_size * self.text.hidden_size
        self.gradients = entries(self.trained, self.shards) * (4 if self.by_zero else self.width)
        # buckets of ddp stay when there is another rank to reduce with, and so do ZeRO 3's partitions
        self.gradients_stay = self.spread == "zero3" or (self.spread == "ddp" and self.num_ranks > 1)

    def in_host_memory(self) -> list[str]:
        """Names of the parts that wait there."""
        parts = ["activations kept"] if self.recipe.model.offload_activations else []
        if self.offload:
            parts += ["weights in float32", "gradients", "optimizer state"]
            parts += ["weights", "reference model"] if self.sharded else []
        return parts

    def held(self) -> Parts:
        """Held throughout training."""
        whole = self.spread == "zero2"
        parts = {"weights": entries(self.weights, 1 if whole else self.shards) * self.width}
        if self.by_zero and (whole or self.width < 4):
            parts["weights in float32"] = 4 * entries(self.trained, self.shards)
        if self.gradients_stay:
            parts["gradients"] = self.gradients
        if self.by_zero:  # it is this large whatever there is to train
            parts["bucket of gradients"] = int(self.zero["reduce_bucket_size"]) * self.width
        return parts | {"optimizer state": sum(map(self._state, self.trained))}

    def _state(self, weight: Weight) -> int:
        """Two averages and a step count; in 8 bits also a scale per block, and two code books."""
        held, row = weight.shard(self.shards), math.prod(weight.shape[1:])
        in_blocks = len(weight.shape) > 1 and row % BLOCK == 0 and weight.shard(1) >= SMALLEST
        if self.optim.optimizer == "adamw_8bit" and in_blocks:
            return 4 + 2 * (held + 4 * (held // BLOCK) + 4 * 256)
        return 4 + 2 * held * (4 if self.by_zero else self.width)

    def reference(self) -> Parts:
        """A second model, spread like the policy; in float32 under ddp and if it moves."""
        wide = self.spread == "ddp" or self.recipe.grpo.reference.sync_steps
        share = entries(self.weights, self.shards if self.sharded else 1)
        return {"reference model": share * (max(self.narrow, 4) if wide else self.narrow)}

    def replica(self) -> int:
        """Bytes of a whole copy in the dtype of products, adapters merged."""
        return entries(weight for weight in self.weights if ".lora_" not in weight.name) * self.narrow

    def weights_to_sample(self) -> Parts:
        """Copies that the native engine makes of the policy's weights."""
        if self.sharded:
            return {"whole replica": self.replica()}
        head = {"head in bfloat16": self.head * self.narrow} if self.casts else {}
        return self.at_work(backward=False) | head

    def at_work(self, *, backward: bool) -> Parts:
        """Whole weights in the dtype of products, while a batch goes through them."""
        if self.casts:  # backward needs copies of frozen weights too, or makes them again
            every = backward and self.recipe.model.checkpointing == "none"
            cast = [w for w in self.weights if w.layer and len(w.shape) > 1 and (w.trained or every)]
            return {"weights in bfloat16": entries(cast) * self.narrow}
        if self.spread == "zero3":
            live = int(self.zero["stage3_max_live_parameters"]) + self.head
            return {"gathered weights": min(entries(self.weights), live) * self.narrow}
        if self.spread != "fsdp2":
            return {}
        layers = _by_layer(self.weights)
        root, largest = layers.pop(""), max(layers.values())
        gathered = (3 if backward else 2) * largest  # at work, copied out, and gathered ahead
        if backward and not self.recipe.parallel.reshard_after_forward:
            gathered = layers.total() + largest
        return {"gathered weights": (root + gathered) * self.narrow}

    def learning(self, tokens: int) -> dict[str, Parts]:
        """The update; with DeepSpeed also the step, which has its gradients in float32 once more."""
        update, after = self.at_work(backward=True) | self._backward(tokens), Parts()
        if self.spread == "fsdp2":  # a layer's, while those of the layer before are summed over the ranks
            layers = _by_layer(weight for weight in self.trained if weight.layer)
            most = max(layers.values(), default=0)
            update["gradients on their way"] = most * (self.narrow + 2 * self.width)
        own = {} if self.gradients_stay else {"gradients": self.gradients}
        if self.by_zero and not self.offload:
            most = 4 * int(self.zero["sub_group_size"]) if self.sharded else self.gradients
            after = own | {"gradients in float32": min(self.gradients, most)}
        return {"update": update | own} | ({"step": after} if after else {})

    def sampling(self, groups: int, completions: int, new_tokens: int, max_tokens: int) -> Parts:
        """Cache and work; groups that do not fit `max_tokens` at once are sampled in turns."""
        group = self.load.prompt_tokens + completions * new_tokens
        groups = max(1, min(groups, max_tokens // group))
        cached = CACHE_COPIES * cached_bytes(self.config, self.narrow) * min(groups * group, max_tokens)
        logits = groups * completions * self.text.vocab_size * SAMPLED_LOGIT
        prefill = self._one_layer(groups * self.load.prompt_tokens, groups * self.load.image_tokens)
        return {"keys and values": cached, "activations at work": prefill, "logits": logits}

    def evaluation(self) -> Parts:
        """Sampling by the model in training, or by a finished one."""
        config = self.recipe.eval
        samples = (config.every and config.every_num_samples) or config.num_samples or config.max_tokens
        return self.sampling(-(-samples // self.num_ranks), 1, config.max_new_tokens, config.max_tokens)

    def forward(self, tokens: int) -> Parts:
        """Log-probabilities without gradients."""
        rows, images = self._split(tokens)
        return {"activations at work": self._one_layer(tokens, images), "loss": self._scratch(rows)}

    def _backward(self, tokens: int) -> Parts:
        """What forward keeps for backward, the layer at work, and the loss."""
        rows, images = self._split(tokens)
        images *= any(weight.name.startswith(VISION) for weight in self.trained)
        kept = self.tokens.kept * tokens + self.images.kept * images
        working = max(self.tokens.backward * tokens, self.images.backward * images)
        # the rows' gradient, a head that autocast narrows, and the head's gradient: its sum and a copy
        loss = self._scratch(rows) + (rows * self.text.hidden_size + self.casts * self.head) * self.narrow
        if any(weight.shape == (self.text.vocab_size, self.text.hidden_size) for weight in self.trained):
            loss += self.head * (max(4, self.narrow) + (self.width if self.casts else self.narrow))
        return {"activations kept": kept, "activations at work": working, "loss": loss}

    def _scratch(self, rows: int) -> int:
        """Logits of a chunk of rows, and the rows themselves."""
        logits = rows * KernelRows.row_bytes(self.text.vocab_size, getattr(torch, self.recipe.model.dtype))
        return min(SCRATCH_BYTES, logits) + rows * self.text.hidden_size * self.narrow

    def _split(self, tokens: int) -> tuple[int, int]:
        """A micro-batch's tokens outside of images, at most all of completions, and those of images."""
        load = self.load
        images = round(tokens * load.image_tokens / max(1, load.prompt_tokens + load.response_tokens))
        return tokens - images, images

    def _one_layer(self, tokens: int, images: int) -> int:
        """The larger of a text layer and a vision block, forward."""
        return max(self.tokens.forward * tokens, self.images.forward * images)


def _by_layer(weights: Iterable[Weight]) -> Counter[str]:
    """Entries by layer."""
    found: Counter[str] = Counter()
    for weight in weights:
        found[weight.layer] += weight.shard(1)
    return found
