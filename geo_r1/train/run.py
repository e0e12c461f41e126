"""A run from its first stage to its report.

<run>/recipe.toml  metrics.jsonl  checkpoints/  models/<stage>/  eval/<row>/  summary.json  report.html
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from geo_r1.data.source import Source
from geo_r1.errors import UserError, say
from geo_r1.files import write_text
from geo_r1.models import PackedVLM
from geo_r1.train.context import RunContext
from geo_r1.train.models import Models, check_model_exists, encoder_of, export_dtype_of, world_of
from geo_r1.train.parallel.agreement import check_ranks_agree
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.load import dump_recipe
from geo_r1.train.recipe.run_sections import STAGES
from geo_r1.train.recipe.sections import GRPOConfig, Recipe, SFTConfig
from geo_r1.train.report.about import facts_of
from geo_r1.train.report.log import Log
from geo_r1.train.report.page import write_report
from geo_r1.train.rl.rehearsal import check_answers
from geo_r1.train.rl.rollout_engines import check_rollout_engine, look_for_server
from geo_r1.train.rl.scoring import load_rewards
from geo_r1.train.sources import open_sources
from geo_r1.train.stages.evaluate import evaluate_model, validate, write_summary
from geo_r1.train.stages.grpo import loss_config_of, run_grpo
from geo_r1.train.stages.sft import run_sft
from geo_r1.train.state.checkpoint import newest_checkpoint, prune
from geo_r1.train.state.run_folder import RECIPE, check_recipe, claimed, clear, finished_model

# Parameters below which threads wait for each other longer than they work.
SMALL = 4_000_000


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
    check_ranks_agree(recipe, ranks)
    needed = {*recipe.run.stages, *(("eval",) if recipe.eval.every else ())}
    sources = open_sources(recipe, world, needed, ranks)
    # wrong rewards and loss options fail now, not hours later when their stage begins
    load_rewards(recipe.rewards)
    loss_config_of(recipe)
    if "grpo" in recipe.run.stages:
        check_answers(recipe, sources["grpo"])
        check_rollout_engine(recipe, ranks.size)
    check_model_exists(recipe.model.path)
    longer: list[str] = []
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(claimed(run_dir, say))
                if not recipe.run.overwrite:
                    longer = check_recipe(run_dir, recipe)
        models = Models(recipe, world, ranks)
        context = _start(recipe, ranks, run_dir, models, longer)
        stack.callback(context.log.close)
        if "grpo" in recipe.run.stages and ranks.is_main:
            look_for_server(recipe.rollout, context.log.say)
        for stage in recipe.run.stages:
            # ask rank 0: on other machines a shared folder may lag by a minute
            finished = ranks.gather(finished_model(run_dir, stage))[0]
            if stage == "eval":
                _evaluate(context, models, sources["eval"])
            elif finished is None:
                _check_later_stages(run_dir, stage)
                _train(context, models, stage, sources)
                _free(ranks.device)
            elif ranks.is_main:
                prune(run_dir, stage, 1)  # left over if the run was killed right after its export
        if ranks.is_main:
            report = run_dir / "report.html"
            if context.log.optional("report", report, lambda: write_report(run_dir)):
                context.log.say(f"report: {report}")


def _train(context: RunContext, models: Models, stage: str, sources: Mapping[str, Source]) -> None:
    recipe = context.recipe
    config = getattr(recipe, stage)

    def check(vlm: PackedVLM) -> tuple[dict[str, float], float]:
        return validate(context, vlm, stage, sources["eval"])

    if context.ranks.is_main:  # no earlier stage can be extended from now on
        for earlier in STAGES[: STAGES.index(stage)]:
            prune(context.run_dir, earlier, 0)
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


def _start(recipe: Recipe, ranks: Ranks, run_dir: Path, models: Models, longer: Sequence[str]) -> RunContext:
    """Load the model's parts, so that a broken one fails early, then set up the run folder and its log.

    Args:
        longer: stages that have more steps than when the folder was made, on the main rank.
    """
    vlm, tokenizer, image_processor = models.load(recipe.model.path)
    if not recipe.run.threads and vlm.model.num_parameters() < SMALL and ranks.device.type == "cpu":
        torch.set_num_threads(1)
    with ranks.together():
        if ranks.is_main:
            if recipe.run.overwrite:
                clear(run_dir, recipe)
            for stage in longer:
                _extend(run_dir, stage, getattr(recipe, stage))
            write_text(run_dir / RECIPE, dump_recipe(recipe))
    log = Log(run_dir, recipe.log, ranks.is_main, recipe.model_dump(mode="json"))
    if ranks.is_main:
        log.describe(facts_of(ranks.size, ranks.device))
    fused = ", ".join(vlm.fused_layers) or "none"
    log.say(f"layers that liger-kernel computes: {fused}" + f" ({vlm.unfused})" * bool(vlm.unfused))
    encoder = encoder_of(recipe, vlm.model.config, tokenizer, image_processor)
    dtype = export_dtype_of(recipe.model)
    return RunContext(recipe, ranks, run_dir, log, tokenizer, image_processor, encoder, dtype)


def _extend(run_dir: Path, stage: str, config: SFTConfig | GRPOConfig) -> None:
    """Let a stage that has more steps than before go on; a finished one's model is set aside.

    Raises:
        UserError: a later stage has started from that model, or the checkpoint to go on from is gone.
    """
    model = finished_model(run_dir, stage)
    if model is not None:
        _check_later_stages(run_dir, stage)
        last = newest_checkpoint(run_dir, stage)
        if last is None:
            raise UserError(
                f"{stage} in {run_dir} is finished, and its last checkpoint, from which it would go on, is "
                f"gone; start another run from its model: --model.path {model} --run.dir <another>"
            )
        aside = model.with_name(last.name)
        if aside.exists():  # the model of the same step
            shutil.rmtree(aside)
        model.rename(aside)
        say(f"{stage} goes on; the model that it had left is now {aside}")
    optim = config.optim
    if optim.schedule != "constant" or optim.warmup_ratio:
        say(f"{stage}: the learning rate is now that of the longer schedule ({optim.schedule})")


def _check_later_stages(run_dir: Path, stage: str) -> None:
    """Refuse to run a stage before one that is already finished: that one did not start from it."""
    for later in STAGES[STAGES.index(stage) + 1 :]:
        if finished_model(run_dir, later) or newest_checkpoint(run_dir, later) is not None:
            raise UserError(
                f"{run_dir} holds {later}, which did not start from the {stage} that is asked for now; "
                "give another --run.dir, or --run.overwrite true"
            )


def _start_of(recipe: Recipe, stage: str) -> str | Path:
    """The model of the last finished stage before this one, or else the recipe's model."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        if (folder := finished_model(recipe.run.dir, earlier)) is not None:
            return folder
    return recipe.model.path


def _evaluate(context: RunContext, models: Models, source: Source) -> None:
    """Evaluate the base model (from which SFT starts) and the model of each finished stage."""
    rows = {"base": _start_of(context.recipe, "sft")}
    rows |= {stage: folder for stage in ("sft", "grpo") if (folder := finished_model(context.run_dir, stage))}
    summaries = {}
    for name, path in context.ranks.gather(rows)[0].items():
        summaries[name] = evaluate_model(context, models.finished(path).vlm, name, source)
    if context.ranks.is_main:
        write_summary(context, summaries)
