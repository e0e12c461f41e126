"""What an engine holds on rank 0 of weights, gradients and the optimiser's state, in bytes.

    ddp      weights, gradients and state whole, and copies that autocast makes of the weights
    fsdp2    shards; whole layers while they run; gradients on their way to their shards
    zero2    weights whole and narrow; shards of gradients, float32 weights and state; a bucket of gradients
    zero3    shards of all; whole weights up to a number; a bucket of gradients

Sources: the code of FSDP2 (torch 2.13) and DeepSpeed (0.19). What is a matter of timing is taken at its most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from geo_r1.train.estimate.model_weights import Weight, entries
from geo_r1.train.parallel.optim import BLOCK, SMALLEST
from geo_r1.train.parallel.zero import engine_settings
from geo_r1.train.recipe.sections import OptimConfig, Recipe

Parts = dict[str, int]
Spread = Literal["ddp", "fsdp2", "zero2", "zero3"]
WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2}
# Gathered layers at once, forward and backward: the one at work, its gather's buffer until the next layer's
# is copied out, and, since backward gathers ahead, that one's buffer.
GATHERED, GATHERED_AHEAD = 2, 3
# Gradients of layers that are being summed over the ranks while the next layer's are made.
REDUCING = 2
# DeepSpeed's own choices, where the user's JSON makes none; in numbers, not bytes.
ZERO: dict[str, Any] = {
    "reduce_bucket_size": 5e8,
    "overlap_comm": False,  # of ZeRO 2, which then has a second bucket
    "allgather_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_param_persistence_threshold": 1e5,
}


def spread_of(recipe: Recipe, num_ranks: int) -> Spread:
    """How a recipe spreads the model over a number of ranks."""
    strategy = recipe.parallel.strategy
    if strategy == "deepspeed":
        return "zero3" if recipe.parallel.zero_stage == 3 else "zero2"
    if strategy == "auto":
        return "fsdp2" if num_ranks > 1 else "ddp"
    return strategy


@dataclass
class Holdings:
    """What rank 0 holds of a model that is trained.

    Attributes:
        compute: bytes of a number in products.
        width: bytes of a number of the weights that this rank holds.
        casts: whether autocast narrows weights; the other engines hand out narrow ones.
        host: what waits in host memory.

    Raises:
        ValueError: the recipe cannot run so.
    """

    recipe: Recipe
    config: PreTrainedConfig
    weights: Sequence[Weight]
    optim: OptimConfig
    num_ranks: int
    host: Parts = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spread = spread_of(self.recipe, self.num_ranks)
        self.compute = WIDTH[self.recipe.model.dtype]
        self.offload = self.recipe.parallel.cpu_offload and self.spread != "ddp"
        zero = self.spread.startswith("zero")
        if zero and self.optim.optimizer != "adamw":
            raise ValueError(
                "DeepSpeed flattens weights, which torchao's optimisers cannot update: use adamw"
            )
        # In bfloat16 small updates would be lost; DeepSpeed keeps wide weights of its own.
        bare = self.optim.optimizer == "adamw_bf16"
        self.width = self.compute if zero else 2 if bare else max(self.compute, 4)
        self.casts = self.spread == "ddp" and self.width > self.compute
        self.shards = self.num_ranks
        if self.spread == "fsdp2" and self.recipe.parallel.shard_size is not None:
            self.shards = self.recipe.parallel.shard_size
            if self.num_ranks % self.shards:
                raise ValueError(
                    f"parallel.shard_size = {self.shards} does not divide the {self.num_ranks} ranks"
                )
        self.zero: dict[str, Any] = dict(ZERO)
        if zero:
            settings = engine_settings(self.recipe.parallel, self.optim.max_grad_norm, self.compute == 2)
            self.zero |= settings["zero_optimization"]
        self.learning = [weight for weight in self.weights if weight.trained]
        text: Any = self.config.get_text_config()
        self.head = text.vocab_size * text.hidden_size  # entries

    def shard(self, weights: Sequence[Weight]) -> int:
        """Entries of rank 0's share."""
        if self.spread == "fsdp2":
            return sum(weight.row_shard(self.shards) for weight in weights)
        return sum(-(-weight.numel // self.shards) for weight in weights)

    def plain(self) -> int:
        """Bytes of a whole model as layers compute with it, adapters merged."""
        return entries([weight for weight in self.weights if ".lora_" not in weight.name]) * self.compute

    def largest(self) -> int:
        """Bytes of the largest of those weights."""
        return max(weight.numel for weight in self.weights) * self.compute

    def always(self) -> Parts:
        """What is there in every phase."""
        parts: Parts = {}
        away = self.host if self.offload else parts
        if self.spread == "ddp":
            parts["weights"] = entries(self.weights) * self.width
            if self.num_ranks > 1:  # their buckets stay
                parts["gradients"] = entries(self.learning) * self.width
        elif self.spread == "fsdp2":
            away["weights"] = self.shard(self.weights) * self.width
        else:
            self._zero_always(parts, away)
        away["optimizer state"] = sum(map(self._state, self.learning))
        return parts

    def _zero_always(self, parts: Parts, away: Parts) -> None:
        threshold = float(self.zero["stage3_param_persistence_threshold"])
        if self.spread == "zero2":
            parts["weights"] = entries(self.weights) * self.width
        else:
            away["weights"] = self.shard(self.weights) * self.width
            small = [weight for weight in self.weights if weight.numel < threshold]
            parts["weights that stay whole"] = entries(small) * self.width
            away["gradients"] = self.shard(self.learning) * 4
            parts["bucket of gradients"] = self._bucket()
        if self.spread == "zero2" or self.width < 4:
            away["weights in float32"] = 4 * self.shard(self.learning)

    def _bucket(self) -> int:
        """Gradients on their way to their shards; it is as large whatever there is to train."""
        return int(float(self.zero["reduce_bucket_size"])) * self.width

    def _state(self, weight: Weight) -> int:
        """Bytes of the optimiser's state of a weight: two averages and a count."""
        if self.spread.startswith("zero"):
            return 2 * 4 * self.shard([weight])
        held = weight.row_shard(self.shards) if self.spread == "fsdp2" else weight.numel
        whole_blocks = len(weight.shape) > 1 and math.prod(weight.shape[1:]) % BLOCK == 0
        if self.optim.optimizer == "adamw_8bit" and whole_blocks and weight.numel >= SMALLEST:
            return 4 + 2 * (held + 4 * (held // BLOCK) + 4 * 256)  # codes, scales, what each code stands for
        return 4 + 2 * self.width * held

    def reference(self) -> Parts:
        """A second model of the same weights, spread as the policy; with ZeRO 2 it is whole."""
        wide = self.spread == "ddp" or self.recipe.grpo.reference.sync_steps
        sharded = self.spread in ("fsdp2", "zero3")
        share = sum(w.row_shard(self.shards) for w in self.weights) if sharded else entries(self.weights)
        parts = {"reference model": share * (max(self.compute, 4) if wide else self.compute)}
        if not (sharded and self.offload):
            return parts
        self.host |= parts
        return {}

    def at_work(self, *, backward: bool) -> Parts:
        """Whole weights, as wide as products, while a batch goes through them."""
        if self.spread == "ddp":
            if not self.casts:
                return {}
            # Autocast keeps copies of trained weights. Backward needs copies of all, or makes them again.
            every = backward and self.recipe.model.checkpointing == "none"
            cast = [w for w in self.weights if w.product and (w.trained or every)]
            return {"weights in bfloat16": entries(cast) * self.compute}
        if self.spread == "zero2":
            return {}
        if self.spread == "zero3":
            live = min(entries(self.weights), int(float(self.zero["stage3_max_live_parameters"])) + self.head)
            return {"gathered weights": live * self.width}
        layers = _by_layer(self.weights)
        root, largest = layers.pop(None), max(layers.values())
        gathered = root + (GATHERED_AHEAD if backward else GATHERED) * largest
        if backward and not self.recipe.parallel.reshard_after_forward:
            gathered = root + sum(layers.values()) + largest
        return {"gathered weights": gathered * self.compute}

    def gradients(self) -> Parts:
        """While the layers run backward, those of earlier micro-batches among them."""
        share = self.shard(self.learning) * max(self.width, 4 if self.spread == "zero2" else 0)
        if self.spread == "ddp":
            return {"gradients": entries(self.learning) * self.width} if self.num_ranks == 1 else {}
        if self.spread == "zero3":
            return {}
        parts: Parts = {}
        (self.host if self.offload else parts)["gradients"] = share
        if self.spread == "zero2":
            parts["buckets of gradients"] = self._bucket() * (1 + bool(self.zero["overlap_comm"]))
        if self.spread == "fsdp2":
            layers = _by_layer(self.learning)
            layers.pop(None, None)
            most = max(layers.values(), default=0)
            parts["gradients on their way"] = most * (self.compute + REDUCING * self.width)
        return parts

    def afterwards(self) -> dict[str, Parts]:
        """Phases behind the layers' backward, by name."""
        if self.spread == "ddp":
            return {}
        parts: Parts = {}
        if self.spread == "fsdp2":  # embeddings, head, norms and projector: one group of weights
            root = [weight for weight in self.weights if weight.layer is None]
            trained = entries([weight for weight in root if weight.trained])
            parts["gathered weights"] = entries(root) * self.compute
            parts["gradients on their way"] = trained * (self.compute + self.width)
            if not self.offload:
                parts["gradients"] = self.shard(self.learning) * self.width
            return {"reduce": parts}
        share = self.shard(self.learning)
        if not self.offload:
            at_once = share if self.spread == "zero2" else min(share, int(float(self.zero["sub_group_size"])))
            parts["gradients in float32"] = 4 * at_once
        if self.spread == "zero2":
            bucket = min(int(float(self.zero["allgather_bucket_size"])), entries(self.learning))
            parts["gathered weights"] = bucket * self.width
            if not self.offload:
                parts["gradients"] = share * 4
        return {"step": parts}


def _by_layer(weights: Sequence[Weight]) -> dict[str | None, int]:
    """Entries by layer; None: of all that is in no layer."""
    found: dict[str | None, int] = {}
    for weight in weights:
        found[weight.layer] = found.get(weight.layer, 0) + weight.numel
    return found
