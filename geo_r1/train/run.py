"""A run from its first stage to its report.

<run>/recipe.toml  metrics.jsonl  checkpoints/  models/<stage>/  eval/<row>/  summary.json  report.html
"""

from __future__ import annotations

import gc
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from geo_r1.data.source import Source
from geo_r1.errors import UserError
from geo_r1.files import write_text
from geo_r1.models import PackedVLM
from geo_r1.train.context import RunContext
from geo_r1.train.models import Models, check_model_exists, encoder_of, world_of
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.load import decisive, dump_recipe, first_difference
from geo_r1.train.recipe.run_sections import STAGES
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.report.log import Log
from geo_r1.train.report.page import write_report
from geo_r1.train.rl.rollout_engines import check_rollout_engine, look_for_server
from geo_r1.train.rl.scoring import load_rewards
from geo_r1.train.sources import open_source
from geo_r1.train.stages.evaluate import evaluate_model, validate, write_summary
from geo_r1.train.stages.grpo import loss_config_of, run_grpo
from geo_r1.train.stages.sft import run_sft
from geo_r1.train.state.checkpoint import newest_checkpoint, prune


def run_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Run a recipe's stages in order, continuing from what the run folder holds.

    Raises:
        UserError: the recipe, the data, the model or a reward function is wrong.
        Stopped: the run was asked to stop and left a checkpoint.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(recipe.run.seed)
    run_dir = recipe.run.dir
    world = world_of(recipe)
    needed = {*recipe.run.stages, *(("eval",) if recipe.eval.every else ())}
    sources = {stage: open_source(recipe, world, stage) for stage in needed}
    # wrong rewards and loss options fail now, not hours later when their stage begins
    load_rewards(recipe.rewards)
    loss_config_of(recipe)
    if "grpo" in recipe.run.stages:
        check_rollout_engine(recipe, ranks.size)
    _check_folder(recipe, run_dir)
    check_model_exists(recipe.model.path)
    models = Models(recipe, world, ranks)
    context = _start(recipe, ranks, run_dir, models)
    if "grpo" in recipe.run.stages and ranks.is_main:
        look_for_server(recipe.rollout, context.log.say)
    try:
        for stage in recipe.run.stages:
            # ask rank 0: on other machines a shared folder may lag by a minute
            finished = ranks.gather((run_dir / "models" / stage).exists())[0]
            if stage == "eval":
                _evaluate(context, models, sources["eval"])
            elif not finished:
                _check_later_stages(run_dir, stage)
                _train(context, models, stage, sources)
                _free(ranks.device)
            elif ranks.is_main:
                prune(run_dir, stage, 0)  # left over if the run was killed right after its export
        if ranks.is_main:
            context.log.say(f"report: {write_report(run_dir)}")
    finally:
        context.log.close()


def _train(context: RunContext, models: Models, stage: str, sources: Mapping[str, Source]) -> None:
    recipe = context.recipe
    config = getattr(recipe, stage)

    def check(vlm: PackedVLM) -> tuple[dict[str, float], float]:
        return validate(context, vlm, stage, sources["eval"])

    path = context.ranks.gather(_start_of(recipe, stage))[0]
    policy = models.policy(path, config)
    if stage == "grpo":
        reference = None
        if config.loss.beta and not recipe.lora.rank:
            reference = models.reference(path, moves=config.reference.sync_steps > 0)
        run_grpo(context, policy, reference, config, sources[stage], check)
    else:
        run_sft(context, stage, policy, config, sources[stage], check)
    policy.close()


def _free(device: torch.device) -> None:
    """Free the memory of a stage; sharding wrappers hold their models in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _start(recipe: Recipe, ranks: Ranks, run_dir: Path, models: Models) -> RunContext:
    """Load the model's parts, so that a broken one fails early, then set up the run folder and its log."""
    vlm, tokenizer, image_processor = models.load(recipe.model.path)
    ranks.barrier()  # every rank has checked the folder
    if ranks.is_main:
        if recipe.run.overwrite:
            shutil.rmtree(run_dir, ignore_errors=True)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text(run_dir / "recipe.toml", dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    ranks.barrier()
    log = Log(run_dir, recipe.log, ranks.is_main, recipe.model_dump(mode="json"))
    fused = ", ".join(vlm.fused_layers) or "none"
    log.say(f"layers that liger-kernel computes: {fused}" + f" ({vlm.unfused})" * bool(vlm.unfused))
    encoder = encoder_of(recipe, vlm.model.config, tokenizer, image_processor)
    return RunContext(recipe, ranks, run_dir, log, tokenizer, image_processor, encoder)


def _check_folder(recipe: Recipe, run_dir: Path) -> None:
    file = run_dir / "recipe.toml"
    if recipe.run.overwrite:
        if run_dir.is_dir() and any(run_dir.iterdir()) and not file.exists():
            raise UserError(f"{run_dir} is not the folder of a run; run.overwrite does not delete it")
        return
    if not file.exists():
        return
    try:  # keys that it leaves out have their defaults
        made = Recipe(**tomllib.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{file} is of another version of geo_r1; give another --run.dir, or --run.overwrite true"
        ) from error
    if changed := first_difference(decisive(made), decisive(recipe), ""):
        raise UserError(f"{run_dir} was made with {changed}; give another --run.dir, or --run.overwrite true")


def _check_later_stages(run_dir: Path, stage: str) -> None:
    """Refuse to run a stage before one that is already finished: that one did not start from it."""
    for later in STAGES[STAGES.index(stage) + 1 :]:
        if (run_dir / "models" / later).exists() or newest_checkpoint(run_dir, later) is not None:
            raise UserError(
                f"{run_dir} holds {later}, which did not start from the {stage} that is asked for now; "
                "give another --run.dir, or --run.overwrite true"
            )


def _start_of(recipe: Recipe, stage: str) -> str | Path:
    """The model of the last finished stage before this one, or else the recipe's model."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        folder = recipe.run.dir / "models" / earlier
        if folder.exists():
            return folder
    return recipe.model.path


def _evaluate(context: RunContext, models: Models, source: Source) -> None:
    """Evaluate the base model (from which SFT starts) and the model of each finished stage."""
    rows = {"base": _start_of(context.recipe, "sft")}
    rows |= {
        stage: folder for stage in ("sft", "grpo") if (folder := context.run_dir / "models" / stage).exists()
    }
    summaries = {}
    for name, path in context.ranks.gather(rows)[0].items():
        summaries[name] = evaluate_model(context, models.finished(path).vlm, name, source)
    if context.ranks.is_main:
        write_summary(context, summaries)
