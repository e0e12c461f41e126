"""What a recipe would take, in text: parameters, memory a rank, steps, operations. It loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedConfig

from geo_r1.data import PromptEncoder
from geo_r1.data.prompt import OverlongPromptError
from geo_r1.data.source import Source
from geo_r1.models.cost import ModelCost
from geo_r1.train.estimate.holdings import WIDTH, spread_of
from geo_r1.train.estimate.memory import Estimate, Load, estimate
from geo_r1.train.estimate.model_weights import entries, model_weights
from geo_r1.train.models import encoder_of, without_weights, world_of
from geo_r1.train.recipe.sections import EvalConfig, GRPOConfig, LoraConfig, Recipe
from geo_r1.train.sources import open_source

NUM_SAMPLES = 32  # of a stage's data that are looked at
ASSUMED = 80 * 10**9  # bytes of a GPU where there is none
RESERVE = 4 << 30  # bytes of a GPU for CUDA's context, NCCL and what the allocator wastes
MOST_RANKS = 512
ASSUMED_LOAD = (
    f"assumed: prompts of {Load.prompt_tokens:,} tokens, {Load.picture_tokens:,} of them of pictures; "
    f"responses of {Load.response_tokens:,}, completions as long as may be"
)
ADAPTER_RANK = 32


def what_it_takes(recipe: Recipe, num_ranks: int) -> str:
    """Say what a recipe would take on a number of ranks. Writes nothing and reads no weights.

    Raises:
        ValueError: the recipe, its model's config or its samples are wrong, as in a run.
    """
    config, tokenizer, image_processor = without_weights(recipe)
    encoder = encoder_of(recipe, config, tokenizer, image_processor)
    capacity, device = _device()
    fused = recipe.model.liger and recipe.model.dtype != "float64" and find_spec("liger_kernel") is not None
    lines = [*_about_model(recipe, config), *_about_ranks(recipe, num_ranks), f"device     {device}"]
    computed = "liger-kernel" if fused else "transformers"
    lines.append(f"assumed    norms, SwiGLU and rotary positions by {computed} on that GPU")
    for stage in recipe.run.stages:
        work = _Measured.of(recipe, config, stage, encoder)
        found = _estimate(recipe, config, num_ranks, stage, work.load, fused, capacity)
        lines += ["", f"== {stage}: {work.headline}", *work.lines, "", *memory_table(found)]
        if stage == "grpo":
            lines += _about_sampler(recipe, config, capacity)
        if found.peak <= capacity:
            lines.append(f"fits: {_gib(found.peak)} of {_gib(capacity)}")
        else:
            lines.append(f"does not fit: {_gib(found.peak)}, but there are {_gib(capacity)}. Instead:")
            for change, other, counts in _remedies(recipe, num_ranks, stage):
                for ranks in counts:
                    peak = _estimate(other, config, ranks, stage, work.load, fused, capacity).peak
                    if peak <= capacity:
                        break
                verdict = ", fits" if peak <= capacity else ""
                lines.append(f"    {change.format(ranks=ranks)}: {_gib(peak)}{verdict}")
    return "\n".join(lines)


def _about_sampler(recipe: Recipe, config: PreTrainedConfig, capacity: int) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.engine == "native":
        return
    if rollout.server_url is not None:
        yield f"sampled by vLLM at {rollout.server_url}, whose memory is its own"
        return
    size = rollout.tensor_parallel_size
    share, weights = round(rollout.gpu_memory * capacity), model_weights(config, (), LoraConfig())
    own = entries(weights) * WIDTH[recipe.model.dtype] // size
    more = "" if own < share else ": too much; raise rollout.gpu_memory or rollout.tensor_parallel_size"
    yield f"sampled by vLLM, whose weights take {_gib(own)} of its {_gib(share)}{more}"


def _estimate(
    recipe: Recipe,
    config: PreTrainedConfig,
    num_ranks: int,
    stage: str,
    load: Load | None,
    fused: bool,
    capacity: int,
) -> Estimate:
    """`estimate`, and vLLM's share of a device of `capacity` bytes where it is inside the ranks."""
    found, rollout = estimate(recipe, config, num_ranks, stage, load, fused=fused), recipe.rollout
    if stage == "grpo" and rollout.engine == "vllm" and rollout.server_url is None:
        parts = found.held if rollout.max_staleness else found.phases["rollout"]
        parts["vLLM"] = round(rollout.gpu_memory * capacity)
    return found


def memory_table(found: Estimate) -> list[str]:
    """Lines of a table: a part a row, a phase a column."""
    unit, name = (1 << 30, "GiB") if found.peak >= 1 << 30 else (1 << 20, "MiB")
    parts = [*found.held, *(part for phase in found.phases.values() for part in phase)]
    rows = [
        (part, [found.held.get(part, 0) + own.get(part, 0) for own in found.phases.values()])
        for part in dict.fromkeys(parts)
    ]
    rows.append(("together", list(found.totals.values())))
    lines = [f"{f'{name} on a rank':30}" + "".join(f"{phase:>12}" for phase in found.phases)]
    lines += [
        f"{part:30}" + "".join(f"{x / unit:12.2f}" if x else f"{'-':>12}" for x in sizes)
        for part, sizes in rows
    ]
    if found.host:
        held = ", ".join(f"{part} {size / unit:.2f}" for part, size in found.host.items())
        lines.append(f"in host memory, {name} a rank: {held}")
    return lines


@dataclass(frozen=True)
class _Measured:
    """A stage's work, from the first samples of its data."""

    headline: str
    lines: list[str]
    load: Load | None

    @classmethod
    def of(cls, recipe: Recipe, config: PreTrainedConfig, stage: str, encoder: PromptEncoder) -> _Measured:
        options = getattr(recipe, stage)
        try:
            source = open_source(recipe, world_of(recipe), stage)
        except ValueError as error:
            return cls("its data cannot be read", [str(error), ASSUMED_LOAD], None)
        shapes, num_skipped = _shapes(recipe, stage, source, encoder)
        if not shapes:
            return cls("none of the first samples of its data fits", [ASSUMED_LOAD], None)
        prompt, pictures, response = (fmean(column) for column in list(zip(*shapes, strict=True))[:3])
        per_step, duration = _duration(options, source)
        per_run = f"{duration:,} steps of {per_step:,} samples"
        if isinstance(options, EvalConfig):
            per_run = f"{per_step:,} samples"
        elif source.size is not None:
            per_run += f", {duration * per_step / source.size:.2f} epochs of {source.size:,}"
        tokens = round(per_step * (prompt + response))
        teraflop = _teraflop(recipe, config, stage, shapes, per_step)
        lines = [
            f"a sample: {prompt:,.0f} tokens of prompt, {pictures:,.0f} of them of pictures, and "
            f"{response:,.0f} {_kind(options)} (mean of the first {len(shapes)})",
            f"in all: {tokens * duration:,} tokens, {sum(teraflop.values()) * duration:,.4g} TFLOP",
        ]
        if not isinstance(options, EvalConfig):
            phases = ", ".join(f"{name} {value:,.3g}" for name, value in teraflop.items())
            lines.insert(1, f"a step: {tokens:,} tokens; TFLOP: {phases}")
        if num_skipped:
            lines.append(f"too long, and skipped: {num_skipped} of the first {len(shapes) + num_skipped}")
        return cls(per_run, lines, Load(round(prompt), round(pictures), round(response), tokens))


def _kind(options: BaseModel) -> str:
    if isinstance(options, GRPOConfig):
        return f"of {options.num_completions} completions, each as long as may be"
    return "of an answer as long as may be" if isinstance(options, EvalConfig) else "of the response"


# Of a sample: tokens of its prompt, of its pictures, of all responses; lengths of these; grids of pictures.
_Shape = tuple[int, int, int, list[int], tuple[tuple[int, int, int], ...]]


def _shapes(recipe: Recipe, stage: str, source: Source, encoder: PromptEncoder) -> tuple[list[_Shape], int]:
    options, found, num_skipped = getattr(recipe, stage), [], 0
    for position in range(min(NUM_SAMPLES, source.size or NUM_SAMPLES)):
        sample = source.draw(position, recipe.run.seed)
        try:
            prompt = encoder.encode(sample)
        except OverlongPromptError:
            if recipe.data.on_overlong == "error":
                raise
            num_skipped += 1
            continue
        if isinstance(options, GRPOConfig):
            lengths = [recipe.rollout.max_new_tokens] * options.num_completions
        elif isinstance(options, EvalConfig):
            lengths = [options.max_new_tokens]
        else:
            assert sample.response is not None, sample.id  # checked where the data was opened
            lengths = [len(encoder.encode_response(sample.response))]
        pictures = len(prompt.image_rows)
        found.append((len(prompt.token_ids), pictures, sum(lengths), lengths, prompt.image_grids))
    return found, num_skipped


def _duration(options: Any, source: Source) -> tuple[int, int]:
    """Samples a step, and steps."""
    if isinstance(options, EvalConfig):
        size = source.size or options.num_samples
        return min(options.num_samples or size, size), 1
    per_step = options.prompts_per_step if isinstance(options, GRPOConfig) else options.batch_size
    return per_step, source.num_steps(options.steps, options.epochs, per_step)


def _teraflop(
    recipe: Recipe, config: PreTrainedConfig, stage: str, shapes: list[_Shape], per_step: int
) -> dict[str, float]:
    """Of a step, by phase; adapters as if all weights were trained, and nothing recomputed."""
    cost, options = ModelCost.of(config), getattr(recipe, stage)
    frozen = () if isinstance(options, EvalConfig) or recipe.lora.rank else options.freeze
    forward = fmean(cost.flops(prompt, lengths, grids) for prompt, _, _, lengths, grids in shapes)
    both = fmean(
        cost.flops(prompt, lengths, grids, backward=True, frozen=frozen)
        for prompt, _, _, lengths, grids in shapes
    )
    if isinstance(options, EvalConfig):
        phases = {"sampling": forward}
    elif isinstance(options, GRPOConfig):
        old = options.num_iterations > 1 or recipe.rollout.importance_sampling != "none"
        again = bool(options.loss.beta) + old
        phases = {"rollout": forward, "reference": again * forward, "update": options.num_iterations * both}
    else:
        phases = {"update": both}
    return {name: 1e-12 * per_step * value for name, value in phases.items() if value}


def _about_model(recipe: Recipe, config: PreTrainedConfig) -> Iterator[str]:
    parameters = ModelCost.of(config).parameters
    yield f"model      {recipe.model.path}: {config.model_type}, {sum(parameters.values()):,} parameters"
    yield "           " + ", ".join(f"{part} {count:,}" for part, count in parameters.items())
    for stage in recipe.run.stages:
        if stage != "eval":
            weights = model_weights(config, getattr(recipe, stage).freeze, recipe.lora)
            trained = entries([weight for weight in weights if weight.trained])
            kind = f"adapters of rank {recipe.lora.rank}" if recipe.lora.rank else "weights"
            yield f"           {stage} trains {trained:,} ({kind}), {entries(weights) - trained:,} are frozen"


def _about_ranks(recipe: Recipe, num_ranks: int) -> Iterator[str]:
    strategy, parallel = spread_of(recipe, num_ranks), recipe.parallel
    more = ", shards in host memory" if parallel.cpu_offload and strategy != "ddp" else ""
    if strategy == "fsdp2":
        more = f", weights in {parallel.shard_size or num_ranks} shards{more}"
    kind = f"layers compute in {recipe.model.dtype}, checkpointing {recipe.model.checkpointing}"
    yield f"ranks      {num_ranks}, {strategy}{more}; {kind}"


def _device() -> tuple[int, str]:
    """Bytes that a rank may use, and where."""
    if not torch.cuda.is_available():
        return ASSUMED, "no GPU here; one of 80 GB is assumed"
    properties = torch.cuda.get_device_properties(0)
    return properties.total_memory - RESERVE, f"{properties.name}, {_gib(properties.total_memory)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.1f} MiB"


def _remedies(recipe: Recipe, num_ranks: int, stage: str) -> Iterator[tuple[str, Recipe, list[int]]]:
    """Changes that may leave less on a rank: in words, the recipe with it, and ranks to try."""
    same = [num_ranks]
    if stage == "eval":
        most = recipe.eval.max_tokens // 4
        yield f"eval.max_tokens = {most}", _changed(recipe, "eval", max_tokens=most), same
        return
    spread, options = spread_of(recipe, num_ranks), getattr(recipe, stage)
    full = _changed(recipe, "model", checkpointing="full")
    if recipe.model.checkpointing != "full":
        yield "model.checkpointing = full", full, same
    fsdp2 = _changed(recipe, "parallel", strategy="fsdp2", shard_size=None)
    more = [num_ranks << i for i in range(1, 10) if num_ranks << i <= MOST_RANKS]
    if more:
        yield "parallel.strategy = fsdp2, on {ranks} ranks", fsdp2, more
    away = _changed(fsdp2 if spread == "ddp" else recipe, "parallel", cpu_offload=True)
    if not recipe.parallel.cpu_offload or spread == "ddp":
        yield f"parallel.strategy = {away.parallel.strategy}, parallel.cpu_offload = true", away, same
    if options.optim.optimizer == "adamw" and not spread.startswith("zero"):
        optim = options.optim.model_copy(update={"optimizer": "adamw_8bit"})
        yield f"{stage}.optim.optimizer = adamw_8bit", _changed(recipe, stage, optim=optim), same
    if not recipe.lora.rank:
        yield f"lora.rank = {ADAPTER_RANK}", _changed(recipe, "lora", rank=ADAPTER_RANK), same
    if stage == "grpo":
        most = recipe.rollout.max_tokens // 4
        yield f"rollout.max_tokens = {most}", _changed(recipe, "rollout", max_tokens=most), same
    both = _changed(away, "model", checkpointing="full")
    yield "model.checkpointing = full with parallel.cpu_offload = true", both, same


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
