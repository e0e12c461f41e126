"""Models with random weights on one rank or several, and the bytes that they really hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from saved_states import rank_of
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from geo_r1.data.prompt import mrope_positions
from geo_r1.kernels import linear_cross_entropy
from geo_r1.models import EncodedPrompt, PackedBatch, PackedVLM, pack
from geo_r1.models.lora import add_lora
from geo_r1.models.tiny import build_tiny
from geo_r1.train.parallel.optim import build_optimizer
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.parallel.strategy import shard_model
from geo_r1.train.recipe.sections import Recipe

TEXTS = ["Which tile shows the place?", "north and south of the tower"]
WIDTHS = {"tiny": (64, 2), "rows of blocks": (256, 1), "20 million": (512, 6)}  # hidden size, text layers


def config_of(size: str):
    hidden, layers = WIDTHS[size]
    return build_tiny(TEXTS, 0, hidden, layers, weights=False)[0].config


def batch_of(config, rows: int, columns: int, completions: list[int]) -> PackedBatch:
    """A prompt with one image of so many patches, and completions of so many tokens."""
    merge = config.vision_config.spatial_merge_size
    count = rows * columns // merge**2
    ids = [7, *[config.image_token_id] * count, 8, 9]
    positions = mrope_positions(ids, config.image_token_id, ((1, rows, columns),), merge)
    vision = config.vision_config
    pixels = torch.zeros(rows * columns, 3 * vision.temporal_patch_size * vision.patch_size**2)
    prompt = EncodedPrompt("s", ids, positions, list(range(1, count + 1)), pixels, ((1, rows, columns),))
    return pack([prompt], [[[10] * length for length in completions]])


def bytes_held(recipe: Recipe, size: str, ranks: Ranks) -> dict[str, int]:
    """Bytes on this rank: of weights and gradients after a backward, of the optimiser after a step."""
    options = recipe.sft
    compute = getattr(torch, recipe.model.dtype)
    bare = options.optim.optimizer == "adamw_bf16"
    hidden, layers = WIDTHS[size]
    model, *_ = build_tiny(TEXTS, 0, hidden, layers)
    vlm = PackedVLM(model.to(torch.bfloat16 if bare else torch.float32), compute, liger=False)
    vlm.freeze(options.freeze)
    if recipe.lora.rank:
        add_lora(vlm.model, **recipe.lora.model_dump())
    alpha = recipe.lora.alpha if recipe.lora.rank else None
    policy = shard_model(vlm, ranks, recipe.parallel, alpha=alpha)
    optimizer = policy.attach(build_optimizer(policy.vlm.model, options.optim), 1.0)
    batch = batch_of(vlm.model.config, 4, 4, [3])
    policy.learn(_loss, batch, last=True)
    parameters = list(policy.vlm.model.parameters())
    found = {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes([p.grad for p in parameters if p.grad is not None]),
    }
    torch.compiler.set_stance("force_eager")  # torchao compiles its update: seconds a shape on a CPU
    policy.update(optimizer, 1.0, True)
    torch.compiler.set_stance("default")
    return found | {"optimizer state": storage_bytes([dict(own) for own in optimizer.state.values()])}


def bytes_on_a_rank(rank: int, size: int, store: str, recipe: Recipe, model: str) -> dict[str, int]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    try:
        return bytes_held(recipe, model, rank_of(rank, size))
    finally:
        dist.destroy_process_group()


def _loss(vlm: PackedVLM, batch: PackedBatch) -> tuple[Tensor]:
    weight = torch.full(batch.target_R.shape, 1 / len(batch.target_R))
    return (linear_cross_entropy(vlm.loss_rows(batch), vlm.lm_head, batch.target_R, weight),)


def storage_bytes(tree) -> int:
    """Bytes of memory under all tensors of a tree, what they share once."""
    return sum({id: count for tensor in tree_iter(tree) for id, count in _storages(tensor)}.values())


def _storages(value) -> list[tuple[int, int]]:
    if isinstance(value, DTensor):
        return _storages(value.to_local())
    if hasattr(value, "tensor_attrs"):  # torchao's, of several tensors
        return [pair for name in value.tensor_attrs for pair in _storages(getattr(value, name))]
    if not isinstance(value, Tensor):
        return []
    return [(value.untyped_storage()._cdata, value.untyped_storage().nbytes())]
