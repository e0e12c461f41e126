"""Bytes on one rank with a GPU, by calculation: nothing is allocated, and nothing was fitted to measurements.

    phase       what is there besides what always is (shards, the optimiser's state, a reference model)
    rollout     the weights to sample with, keys and values of cached tokens, one layer's prefill
    evaluation  the same, where a model is evaluated in training
    reference   the weights at work, one layer, the loss's scratch
    update      the weights at work, gradients, what is kept for backward, one layer, the loss's scratch
    reduce      fsdp2: the gradients of embeddings and head go to their shards
    step        deepspeed: the weights are updated

Ranks hold equal shares but for rounding; this is rank 0's, the largest. What the allocator wastes, CUDA's
context and NCCL's buffers (together a few GiB) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from geo_r1.kernels.loss.chunks import MAX_NARROW_SUMS, SCRATCH_BYTES, KernelRows
from geo_r1.models.cost import cached_bytes
from geo_r1.models.qwen_vl import VISION
from geo_r1.train.estimate.activations import Numbers, kept_bytes, text_layer, vision_block, working_bytes
from geo_r1.train.estimate.holdings import WIDTH, Holdings, Parts
from geo_r1.train.estimate.model_weights import entries, model_weights
from geo_r1.train.recipe.sections import EvalConfig, GRPOConfig, LoraConfig, Recipe, SFTConfig

# Prompts stand in the cache twice, in groups and stacked by length; room for completions grows by half.
CACHE_COPIES = 2
# A sampled logit: itself and its log-probability in float32, the exponential and its sum in float64.
SAMPLED_LOGIT = 4 + 4 + 8 + 8


@dataclass(frozen=True)
class Load:
    """What a step has to do, as far as memory depends on it.

    Attributes:
        prompt_tokens: of a prompt, those of its pictures included.
        picture_tokens: of a prompt's pictures.
        response_tokens: of what is learned about a prompt, or sampled for it, in all.
        step_tokens: of a step, over all ranks; None: enough to fill micro-batches.
    """

    prompt_tokens: int = 2048
    picture_tokens: int = 1536
    response_tokens: int = 512
    step_tokens: int | None = None

    @property
    def picture_share(self) -> float:
        """Share of a micro-batch's tokens that are of pictures."""
        return self.picture_tokens / max(1, self.prompt_tokens + self.response_tokens)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank.

    Attributes:
        held: by part, what is there at any time of the stage.
        phases: by phase and part, what comes on top.
        host: by part, what waits in host memory.
    """

    held: Parts
    phases: dict[str, Parts]
    host: Parts = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each phase, what is held included."""
        held = sum(self.held.values())
        return {phase: held + sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.totals.values())


def estimate(
    recipe: Recipe,
    config: PreTrainedConfig,
    num_ranks: int,
    stage: str,
    load: Load | None = None,
    *,
    fused: bool = False,
) -> Estimate:
    """Bytes that a stage takes on one rank.

    Args:
        config: of the model.
        stage: pretrain, sft, grpo or eval.
        load: what a step has to do; None: prompts of 2,048 tokens, 1,536 of them of pictures, with responses
            of 512, or with as many and as long completions as may be sampled.
        fused: whether liger-kernel computes norms and MLPs.

    Raises:
        ValueError: the recipe cannot run so.
    """
    options: SFTConfig | GRPOConfig | EvalConfig = getattr(recipe, stage)
    if load is None:
        sampled = isinstance(options, GRPOConfig) and options.num_completions * recipe.rollout.max_new_tokens
        load = Load(response_tokens=sampled or Load.response_tokens)
    compute = WIDTH[recipe.model.dtype]
    if isinstance(options, EvalConfig):  # a finished model, whole and narrow on each rank
        held = {"weights": entries(model_weights(config, (), LoraConfig())) * compute}
        work = _Work(recipe, config, load, Numbers(compute, compute, fused=fused))
        return Estimate(held, {"evaluation": work.evaluation(num_ranks)})

    weights = model_weights(config, options.freeze, recipe.lora)
    own = Holdings(recipe, config, weights, options.optim, num_ranks)
    stream = own.width if own.casts else compute
    work = _Work(recipe, config, load, Numbers(stream, compute, own.casts, fused))
    held = own.always()
    tokens = options.optim.max_tokens
    if load.step_tokens is not None:
        tokens = min(tokens, -(-load.step_tokens // num_ranks))

    phases: dict[str, Parts] = {}
    if isinstance(options, GRPOConfig):
        if options.loss.beta and not recipe.lora.rank:  # with adapters it is the policy without them
            held |= own.reference()
        groups = -(-options.prompts_per_step // num_ranks)
        rollout = recipe.rollout
        sampling: Parts = {}
        if rollout.engine == "native":
            sampling = work.sampling(
                groups, options.num_completions, rollout.max_new_tokens, rollout.max_tokens
            )
            if rollout.max_staleness:  # beside all that a step does
                held |= {"copy that samples": own.plain(), **sampling}
            phases["rollout"] = {} if rollout.max_staleness else _to_sample_with(own) | sampling
        else:
            phases["rollout"] = {"a weight on its way": own.largest()}
        if options.loss.beta or options.num_iterations > 1 or rollout.importance_sampling != "none":
            phases["reference"] = own.at_work(backward=False) | work.forward(tokens)
    if recipe.eval.every:
        phases["evaluation"] = _to_sample_with(own) | work.evaluation(num_ranks)
    phases["update"] = own.at_work(backward=True) | own.gradients() | work.update(tokens, own)
    phases |= own.afterwards()
    return Estimate(held, phases, own.host)


def _to_sample_with(own: Holdings) -> Parts:
    if own.spread in ("fsdp2", "zero3"):
        return {"whole replica": own.plain()}
    head = {"head in bfloat16": own.head * own.compute} if own.casts else {}
    return own.at_work(backward=False) | head


@dataclass
class _Work:
    """What tokens take, whatever holds the weights."""

    recipe: Recipe
    config: PreTrainedConfig
    load: Load
    numbers: Numbers

    def __post_init__(self) -> None:
        self.text: Any = self.config.get_text_config()
        self.vision: Any = self.config.vision_config  # type: ignore[attr-defined]  # these families have one

    def patches(self, picture_tokens: float) -> int:
        return round(picture_tokens) * self.vision.spatial_merge_size**2

    def one_layer(self, tokens: int, patches: int) -> int:
        """The larger of a text layer and a vision block, forward."""
        text, vision = text_layer(self.config, self.numbers), vision_block(self.config, self.numbers)
        return max(text.working * tokens, vision.working * patches)

    def sampling(self, groups: int, completions: int, new_tokens: int, max_tokens: int) -> Parts:
        """Cache and work; groups that do not fit `max_tokens` at once are sampled in turns."""
        text, prompt = self.text, self.load.prompt_tokens
        group = prompt + completions * new_tokens
        groups = max(1, min(groups, max_tokens // group))
        token = cached_bytes(self.config, self.numbers.compute)
        logits = groups * completions * text.vocab_size * SAMPLED_LOGIT
        pictures = self.patches(groups * self.load.picture_tokens)
        return {
            "keys and values": CACHE_COPIES * token * min(groups * group, max_tokens),
            "prefill": self.one_layer(groups * prompt, pictures),
            "logits": logits,
        }

    def evaluation(self, num_ranks: int) -> Parts:
        config = self.recipe.eval
        samples = (config.every and config.every_num_samples) or config.num_samples
        groups = -(-samples // num_ranks) if samples else config.max_tokens
        return self.sampling(groups, 1, config.max_new_tokens, config.max_tokens)

    def forward(self, tokens: int) -> Parts:
        """Log-probabilities without gradients."""
        activations = self.one_layer(tokens, self.patches(tokens * self.load.picture_share))
        return {"activations": activations, "loss": self._scratch(self.rows(tokens), narrow_head=False)}

    def rows(self, tokens: int) -> int:
        """Completion tokens: at most all that are not of pictures."""
        return round(tokens * (1 - self.load.picture_share))

    def update(self, tokens: int, own: Holdings) -> Parts:
        """What forward keeps for backward, and the walk through the vocabulary."""
        kind, rows = self.recipe.model.checkpointing, self.rows(tokens)
        tower = any(weight.name.startswith(VISION) for weight in own.learning)
        patches = self.patches(tokens * self.load.picture_share)
        kept = kept_bytes(self.config, self.numbers, kind, tokens, patches, tower=tower)
        working = working_bytes(self.config, self.numbers, kind, tokens, patches if tower else 0)
        if self.recipe.model.offload_activations:
            own.host["activations"] = kept
            kept = 0
        loss = self._scratch(rows, narrow_head=own.casts)
        loss += rows * self.text.hidden_size * self.numbers.compute  # the gradient of its rows
        head_shape = (self.text.vocab_size, self.text.hidden_size)
        if any(weight.shape == head_shape for weight in own.learning):
            loss += self._head_gradient(rows, own)
        return {"activations": kept + working, "loss": loss}

    def _row_bytes(self) -> int:
        return KernelRows.row_bytes(self.text.vocab_size, getattr(torch, self.recipe.model.dtype))

    def _scratch(self, rows: int, *, narrow_head: bool) -> int:
        """Logits of a chunk, the rows themselves, and a head that autocast does not narrow."""
        head = self.text.vocab_size * self.text.hidden_size * self.numbers.compute * narrow_head
        own = rows * self.text.hidden_size * self.numbers.compute
        return min(SCRATCH_BYTES, rows * self._row_bytes()) + own + head

    def _head_gradient(self, rows: int, own: Holdings) -> int:
        """Of the language head: the sum over chunks, and its copy on the way to the weight."""
        compute = self.numbers.compute
        width = own.width if own.casts else compute
        chunks = -(-rows // max(1, SCRATCH_BYTES // self._row_bytes()))
        direct = width == compute and (compute >= 4 or chunks <= MAX_NARROW_SUMS)
        return own.head * ((width if direct else max(4, compute)) + width)
