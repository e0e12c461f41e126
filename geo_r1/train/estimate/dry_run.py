"""What a recipe would take, as text: parameters, steps, operations, memory per rank. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from geo_r1.data import PromptEncoder
from geo_r1.data.source import Source
from geo_r1.errors import UserError, one_line, printable
from geo_r1.models import EncodedPrompt
from geo_r1.models.cost import ModelCost
from geo_r1.train.estimate.memory import ASSUMED, WIDTH, Estimate, Load, estimate, spread_of
from geo_r1.train.estimate.readiness import disk, gib, missing, wall_time
from geo_r1.train.estimate.weights import entries, weights_of
from geo_r1.train.models import encoder_of, without_weights, world_of
from geo_r1.train.recipe.run_sections import EvalConfig, LoraConfig
from geo_r1.train.recipe.sections import GRPOConfig, Recipe
from geo_r1.train.sources import open_source

Group = tuple[EncodedPrompt, list[int]]
NUM_SAMPLES = 32  # of each stage's data
RESERVE = 4 << 30  # bytes of a GPU for CUDA's context, NCCL and what the allocator wastes
MOST_RANKS = 512
DEFAULT_LOAD = (
    f"assumed: prompts of {Load.prompt_tokens:,} tokens, {Load.image_tokens:,} of them of images; "
    f"responses of {Load.response_tokens:,}, completions of full length"
)


@dataclass(frozen=True)
class Work:
    """A stage's duration, lines about it, and its load; None if its data cannot be read."""

    headline: str
    lines: list[str]
    load: Load | None
    steps: int | None = None
    problem: str = ""


def what_it_takes(recipe: Recipe, num_ranks: int) -> tuple[str, list[str]]:
    """Say what a recipe would take on a number of ranks. Writes nothing and reads no weights.

    Returns:
        The text, which ends with READY or NOT READY, and what is missing for the recipe to start.
    """
    problems, lines = [*missing(recipe, num_ranks)], []
    steps: dict[str, int | None] = {}
    try:
        config, tokenizer, image_processor = without_weights(recipe)
    except UserError as error:
        problems.insert(0, str(error))
    else:
        encoder = encoder_of(recipe, config, tokenizer, image_processor)
        capacity, device = _device()
        fused = (
            recipe.model.liger and recipe.model.dtype != "float64" and find_spec("liger_kernel") is not None
        )
        library = "liger-kernel" if fused else "transformers"
        lines += [*_about_model(recipe, config), *_about_ranks(recipe, num_ranks), f"device     {device}"]
        lines.append(f"assumed    norms, SwiGLU and rotary positions by {library} on that GPU")
        for stage in recipe.run.stages:
            try:
                work = _work(recipe, config, stage, encoder)
                about, fits = _about_memory(recipe, config, num_ranks, stage, work.load, fused, capacity)
            except UserError as error:
                lines += ["", f"== {stage}: cannot run like this", str(error)]
                problems.append(f"{stage}: {error}")
                continue
            lines += ["", f"== {stage}: {work.headline}", *work.lines, *about]
            if stage != "eval":
                steps[stage] = work.steps
            if work.problem:
                problems.append(work.problem)
            if not fits:
                problems.append(f"{stage} does not fit on {device}")
        about, problem = disk(recipe, config, steps)
        lines += ["", *wall_time(recipe, steps), *about]
        problems += [problem] if problem else []
    problems = [*dict.fromkeys(one_line(problem) for problem in problems)]
    lines += [*["NOT READY:"] * bool(problems), *(f"    {problem}" for problem in problems)] or ["READY"]
    return "\n".join(printable(line) for line in lines), problems


def _about_memory(
    recipe: Recipe,
    config: PreTrainedConfig,
    num_ranks: int,
    stage: str,
    load: Load | None,
    fused: bool,
    capacity: int,
) -> tuple[list[str], bool]:
    """Lines about the memory of a stage, and whether it fits."""
    memory = partial(estimate, config=config, stage=stage, load=load, fused=fused, capacity=capacity)
    found = memory(recipe, num_ranks=num_ranks)
    lines = [*_about_trained(recipe, config, stage), "", *memory_table(found)]
    if stage == "grpo" and recipe.rollout.engine == "vllm":
        lines.append(_about_vllm(recipe, config, capacity))
    if found.peak <= capacity:
        return [*lines, f"fits: {gib(found.peak)} of {gib(capacity)}"], True
    lines.append(f"does not fit: {gib(found.peak)}, but there are {gib(capacity)}. Instead:")
    for changes, counts in _remedies(recipe, num_ranks, stage):
        try:
            changed = _changed(recipe, changes)
            peaks = {ranks: memory(changed, num_ranks=ranks).peak for ranks in counts}
        except UserError:  # of a kind that does not go with the rest of the recipe
            continue
        ranks = next((ranks for ranks, peak in peaks.items() if peak <= capacity), counts[-1])
        change = ", ".join(f"{key} = {value}" for key, value in changes.items())
        change += f", on {ranks} ranks" if ranks != num_ranks else ""
        lines.append(f"    {change}: {gib(peaks[ranks])}{', fits' if peaks[ranks] <= capacity else ''}")
    return lines, False


def memory_table(found: Estimate) -> list[str]:
    """Lines of a table with a row for each part and a column for each phase."""
    unit, name = (1 << 30, "GiB") if found.peak >= 1 << 30 else (1 << 20, "MiB")
    columns = [found.held | own for own in found.phases.values()]
    rows = {
        part: [column.get(part, 0) for column in columns]
        for part in dict.fromkeys(p for c in columns for p in c)
    }
    rows["together"] = [*found.totals.values()]
    lines = [f"{f'{name} on a rank':30}" + "".join(f"{phase:>12}" for phase in found.phases)]
    for part, sizes in rows.items():
        lines.append(f"{part:30}" + "".join(f"{x / unit:12.2f}" if x else f"{'-':>12}" for x in sizes))
    if found.host:
        held = ", ".join(f"{part} {size / unit:.2f}" for part, size in found.host.items())
        lines.append(f"in host memory, {name} a rank: {held}")
    return lines


def _work(recipe: Recipe, config: PreTrainedConfig, stage: str, encoder: PromptEncoder) -> Work:
    """A stage's work, from the first samples of its data."""
    options: Any = getattr(recipe, stage)
    try:
        source = open_source(recipe, world_of(recipe), stage)
    except UserError as error:
        problem = str(error) if f"{stage}.data" in str(error) else f"{stage}.data: {error}"
        return Work(
            "its data cannot be read",
            [str(error), DEFAULT_LOAD],
            None,
            getattr(options, "steps", None),
            problem,
        )
    groups, num_skipped = _groups(recipe, options, source, encoder)
    if not groups:
        headline = "none of the first samples of its data fits"
        return Work(
            headline, [DEFAULT_LOAD], None, getattr(options, "steps", None), f"{stage}.data: {headline}"
        )
    prompt = fmean(len(prompt.token_ids) for prompt, _ in groups)
    images = fmean(len(prompt.image_rows) for prompt, _ in groups)
    response = fmean(sum(lengths) for _, lengths in groups)
    if isinstance(options, EvalConfig):
        size, steps, kind = source.size or options.num_samples, 1, "of a completion, as long as may be"
        per_step = min(options.num_samples or size, size)
        headline = f"{per_step:,} samples"
    else:
        per_step = options.prompts_per_step if isinstance(options, GRPOConfig) else options.batch_size
        steps, kind = source.num_steps(options.steps, options.epochs, per_step), "of the response"
        headline = f"{steps:,} steps of {per_step:,} samples"
        if source.size is not None:
            headline += f", {steps * per_step / source.size:.2f} epochs of {source.size:,}"
    if isinstance(options, GRPOConfig):
        kind = f"of {options.num_completions} completions, each as long as may be"
    tokens, teraflop = (
        round(per_step * (prompt + response)),
        _teraflop(recipe, config, options, groups, per_step),
    )
    phases = ", ".join(f"{name} {value:,.3g}" for name, value in teraflop.items())
    lines = [
        f"a sample: {prompt:,.0f} tokens of prompt, {images:,.0f} of them of images, and "
        f"{response:,.0f} {kind} (mean of the first {len(groups)})",
        f"a step: {tokens:,} tokens; TFLOP: {phases}",
        f"in all: {tokens * steps:,} tokens, {sum(teraflop.values()) * steps:,.4g} TFLOP",
    ]
    if num_skipped:
        lines.append(f"too long or bad, and skipped: {num_skipped} of the first {len(groups) + num_skipped}")
    load = Load(round(prompt), round(images), round(response), tokens)
    return Work(headline, lines, load, steps)


def _groups(recipe: Recipe, options: Any, source: Source, encoder: PromptEncoder) -> tuple[list[Group], int]:
    """Prompts with the lengths of their responses, and the number of samples that are skipped."""
    found, num_skipped = [], 0
    for position in range(min(NUM_SAMPLES, source.size or NUM_SAMPLES)):
        sample = source.draw(position, recipe.run.seed)
        prompt = encoder.encode_or_skip(sample)
        if not isinstance(prompt, EncodedPrompt):
            num_skipped += 1
            continue
        if isinstance(options, GRPOConfig):
            lengths = [recipe.rollout.max_new_tokens] * options.num_completions
        elif isinstance(options, EvalConfig):
            lengths = [options.max_new_tokens]
        else:
            assert sample.response is not None, sample.id  # checked where the data was opened
            lengths = [len(encoder.encode_response(sample.response, prompt.opening))]
        found.append((prompt, lengths))
    return found, num_skipped


def _teraflop(
    recipe: Recipe, config: PreTrainedConfig, options: Any, groups: list[Group], per_step: int
) -> dict[str, float]:
    """Operations of a step by phase, as if adapters were whole weights; recomputation is not counted."""
    cost = ModelCost.of(config)

    def mean(**how: Any) -> float:
        each = (cost.flops(len(p.token_ids), lengths, p.image_grids, **how) for p, lengths in groups)
        return 1e-12 * per_step * fmean(each)

    if isinstance(options, EvalConfig):
        return {"sampling": mean()}
    update = mean(backward=True, frozen=() if recipe.lora.rank else options.freeze)
    if not isinstance(options, GRPOConfig):
        return {"update": update}
    passes = int(bool(options.loss.beta))
    passes += options.num_iterations > 1 or recipe.rollout.importance_sampling != "none"
    again = {"reference": passes * mean()} if passes else {}
    return {"rollout": mean(), **again, "update": options.num_iterations * update}


def _about_model(recipe: Recipe, config: PreTrainedConfig) -> Iterator[str]:
    parameters = ModelCost.of(config).parameters
    yield f"model      {recipe.model.path}: {config.model_type}, {sum(parameters.values()):,} parameters"
    yield "           " + ", ".join(f"{part} {count:,}" for part, count in parameters.items())


def _about_trained(recipe: Recipe, config: PreTrainedConfig, stage: str) -> Iterator[str]:
    if stage != "eval":
        weights = weights_of(config, getattr(recipe, stage).freeze, recipe.lora)
        trained = entries(weight for weight in weights if weight.trained)
        kind = f"adapters of rank {recipe.lora.rank}" if recipe.lora.rank else "weights"
        yield f"{stage} trains {trained:,} ({kind}), {entries(weights) - trained:,} are frozen"


def _about_ranks(recipe: Recipe, num_ranks: int) -> Iterator[str]:
    strategy, parallel = spread_of(recipe, num_ranks), recipe.parallel
    shards = f", weights in {parallel.shard_size or num_ranks} shards" if strategy == "fsdp2" else ""
    shards += ", shards in host memory" if parallel.cpu_offload and strategy != "ddp" else ""
    kind = f"layers compute in {recipe.model.dtype}, checkpointing {recipe.model.checkpointing}"
    yield f"ranks      {num_ranks}, {strategy}{shards}; {kind}"


def _about_vllm(recipe: Recipe, config: PreTrainedConfig, capacity: int) -> str:
    rollout = recipe.rollout
    if rollout.server_url is not None:
        return f"sampled by vLLM at {rollout.server_url}, whose memory is its own"
    weights = entries(weights_of(config, (), LoraConfig())) * WIDTH[recipe.model.dtype]
    own, share = weights // rollout.tensor_parallel_size, round(rollout.gpu_memory * capacity)
    more = "" if own < share else ": too much; raise rollout.gpu_memory or rollout.tensor_parallel_size"
    return f"sampled by vLLM, whose weights take {gib(own)} of its {gib(share)}{more}"


def _device() -> tuple[int, str]:
    """Bytes that a rank may use, and where."""
    if not torch.cuda.is_available():
        return ASSUMED, "no GPU here; one of 80 GB is assumed"
    properties = torch.cuda.get_device_properties(0)
    return properties.total_memory - RESERVE, f"{properties.name}, {gib(properties.total_memory)}"


def _remedies(recipe: Recipe, num_ranks: int, stage: str) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Changes that may leave less on a rank, and numbers of ranks to try each on."""
    same, more = [num_ranks], [num_ranks << i for i in range(1, 10) if num_ranks << i <= MOST_RANKS]
    if stage == "eval":
        yield {"eval.max_tokens": recipe.eval.max_tokens // 4}, same
        return
    full: dict[str, Any] = {"model.checkpointing": "full"}
    fsdp2 = {"parallel.strategy": "fsdp2"}
    away = (fsdp2 if spread_of(recipe, num_ranks) == "ddp" else {}) | {"parallel.cpu_offload": True}
    yield full, same
    if more:
        yield fsdp2, more
    yield away, same
    yield {f"{stage}.optim.optimizer": "adamw_8bit"}, same
    yield {"lora.rank": 32}, same
    if stage == "grpo":
        yield {"rollout.max_tokens": recipe.rollout.max_tokens // 4}, same
    yield full | away, same


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values; a UserError if they change nothing or do not go with the rest."""
    values = recipe.model_dump()
    for key, value in changes.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    try:
        changed = Recipe(**values)
    except ValidationError as error:
        raise UserError(str(error)) from error
    if changed == recipe:
        raise UserError("nothing changes")
    return changed
