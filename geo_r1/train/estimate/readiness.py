"""The end of a dry run: wall time, disk, and what is missing for a recipe to start."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib.util import find_spec
from statistics import median

from transformers import PreTrainedConfig

from geo_r1.errors import UserError
from geo_r1.train.estimate.memory import WIDTH
from geo_r1.train.estimate.weights import entries, weights_of
from geo_r1.train.models import world_of
from geo_r1.train.recipe.sections import GRPOConfig, Recipe
from geo_r1.train.report.metrics import read_metrics
from geo_r1.train.rl.rollout_engines import check_rollout_engine
from geo_r1.train.rl.scoring import load_rewards
from geo_r1.train.sources import open_source
from geo_r1.train.stages.grpo import loss_config_of
from geo_r1.train.state.run_folder import check_recipe

Steps = Mapping[str, int | None]  # of each trained stage; None if unknown


def trained_stages(recipe: Recipe) -> list[str]:
    """The recipe's stages that train a model."""
    return [stage for stage in recipe.run.stages if stage != "eval"]


def missing(recipe: Recipe, num_ranks: int) -> Iterator[str]:
    """Why the recipe cannot start here, apart from its model, and from the data and memory of its stages."""
    checks: list[Callable[[], object]] = [
        lambda: load_rewards(recipe.rewards),
        lambda: loss_config_of(recipe),
    ]
    if not recipe.run.overwrite:
        checks.append(lambda: check_recipe(recipe.run.dir, recipe))
    if "grpo" in recipe.run.stages:
        checks.append(lambda: check_rollout_engine(recipe, num_ranks))
    if recipe.eval.every and "eval" not in recipe.run.stages:
        checks.append(lambda: open_source(recipe, world_of(recipe), "eval"))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)
    optimizers = {getattr(recipe, stage).optim.optimizer for stage in trained_stages(recipe)}
    packages = {
        "deepspeed": ("parallel.strategy = deepspeed", recipe.parallel.strategy == "deepspeed"),
        "torchao": ("optim.optimizer", bool(optimizers - {"adamw"})),
        "peft": ("lora.rank > 0", recipe.lora.rank > 0),
        "wandb": ("log.wandb", recipe.log.wandb),
    }
    for package, (key, is_used) in packages.items():
        if is_used and find_spec(package) is None:
            extra = "lora" if package == "peft" else package
            yield f"{key} needs {package}, which is not installed: pip install '.[{extra}]'"


def sizes(recipe: Recipe, config: PreTrainedConfig, stage: str) -> tuple[int, int]:
    """Bytes of a checkpoint of a stage, and of the model that it exports; their other files are small."""
    options = getattr(recipe, stage)
    weights = weights_of(config, options.freeze, recipe.lora)
    trained = entries(weight for weight in weights if weight.trained)
    width = 2 if options.optim.optimizer == "adamw_bf16" else max(4, WIDTH[recipe.model.dtype])
    state = 2 * trained * (1 if options.optim.optimizer == "adamw_8bit" else width)
    held = trained if recipe.lora.rank else entries(weights)
    if isinstance(options, GRPOConfig) and options.reference.sync_steps:
        held += entries(weights)
    whole = entries(weight for weight in weights if not (recipe.lora.rank and weight.trained))
    return held * width + state, whole * width


def disk(recipe: Recipe, config: PreTrainedConfig, steps: Steps) -> tuple[list[str], str]:
    """Lines about the disk, and what is wrong with it: empty if it has room."""
    checkpoints, models, lines = 0, 0, []
    for stage, num_steps in steps.items():
        options = getattr(recipe, stage)
        checkpoint, model = sizes(recipe, config, stage)
        saved = (
            recipe.run.keep_checkpoints + 1 if num_steps is None else max(1, num_steps // options.save_every)
        )
        count = min(recipe.run.keep_checkpoints + 1, saved)  # an old one goes when a new one is there
        count += recipe.eval.keep_best
        checkpoints, models = max(checkpoints, count * checkpoint), models + model
        lines.append(
            f"           {stage}: {count} x {gib(checkpoint)} for checkpoints, and a model of {gib(model)}"
        )
    folder = recipe.run.dir.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return lines, f"run.dir {folder}: {there} is no folder"
    needed, free = checkpoints + models, shutil.disk_usage(there).free
    total = f"disk       {gib(needed)} besides logs and rollouts; free in {there}: {gib(free)}"
    short = f"run.dir {folder}: the disk has {gib(free)} free, checkpoints and models take {gib(needed)}"
    return [total, *lines], short if free < needed else ""


def wall_time(recipe: Recipe, steps: Steps) -> Iterator[str]:
    """Lines about the time that the stages will take, from the steps that the run's folder has recorded."""
    folder = recipe.run.dir
    metrics, _ = read_metrics(folder / "metrics.jsonl")
    unknown = []
    for stage, count in steps.items():
        seconds = [row["time/step"] for row in metrics.get(stage, {}).values() if "time/step" in row]
        if not seconds or count is None:
            unknown.append(stage)
            continue
        left, each = max(0, count - max(metrics[stage])), median(seconds)
        yield (
            f"time       {stage}: about {timedelta(seconds=round(left * each))} for {left:,} of {count:,} "
            f"steps, {each:.3g} s each (median of {len(seconds):,} in {folder})"
        )
    if unknown:
        yield (
            f"time       {', '.join(unknown)}: no basis, since {folder} has no step of it; start the run, "
            "stop it after some steps, and ask again"
        )


def gib(size: int) -> str:
    """Bytes as GiB, or as MiB below one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.1f} MiB"
