"""A run from its first stage to its report.

<run>/recipe.toml  metrics.jsonl  checkpoints/  models/<stage>/  eval/<row>/  summary.json  report.html
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers.utils import logging as transformers_logging

from geo_r1.data import PromptEncoder, World, exemplars, read_samples
from geo_r1.data.source import Source
from geo_r1.eval.cross_view import question_of
from geo_r1.models import PackedVLM, load_model
from geo_r1.models.tiny import build_tiny
from geo_r1.train.checkpoint import newest_checkpoint, prune
from geo_r1.train.config import STAGES, Recipe
from geo_r1.train.distributed import Ranks
from geo_r1.train.evaluate import evaluate, write_summary, write_text
from geo_r1.train.grpo import loss_config_of, run_grpo
from geo_r1.train.log import Log
from geo_r1.train.loop import Engine, load_rewards
from geo_r1.train.recipe import dump_recipe
from geo_r1.train.report import write_report
from geo_r1.train.sft import run_sft

# Sections that may change when a run goes on in its folder; the others, and the seed, decide the result.
FREE_TO_CHANGE = ("run", "eval", "log")
TINY = "tiny"
TOKENIZER_SAMPLES = 200


def run(recipe: Recipe, ranks: Ranks) -> None:
    """Run a recipe's stages in order, going on from whatever its folder holds.

    Raises:
        ValueError: the user's recipe, data, model or reward is wrong; the message says how.
        Stopped: the run was asked to stop and left a checkpoint.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(recipe.run.seed)
    run_dir = recipe.run.dir
    world = World(**recipe.world.model_dump(exclude={"careless", "slip"}))
    sources = {stage: open_source(recipe, world, stage) for stage in recipe.run.stages}
    # Wrong rewards and loss options are errors now, not when their stage comes.
    load_rewards(recipe.rewards)
    loss_config_of(recipe)
    engine = _start(recipe, ranks, run_dir, world)
    try:
        for stage in recipe.run.stages:
            if stage == "eval":
                _evaluate(engine, world, sources["eval"])
            elif not (run_dir / "models" / stage).exists():
                _check_later_stages(run_dir, stage)
                _use_model(engine, world, _start_of(recipe, stage))
                engine.vlm.model.model.visual.requires_grad_(not getattr(recipe, stage).freeze_vision)
                if stage == "grpo":
                    run_grpo(engine, recipe.grpo, sources[stage])
                else:
                    run_sft(engine, stage, getattr(recipe, stage), sources[stage])
            elif ranks.is_main:
                prune(run_dir, stage, 0)  # what a run that was killed right after its export left
        if ranks.is_main:
            engine.log.say(f"report: {write_report(run_dir)}")
    finally:
        engine.log.close()


def open_source(recipe: Recipe, world: World, stage: str) -> Source:
    """The samples of a stage: of the world, or of the file that its `data` names."""
    data = getattr(recipe, stage).data
    if data != "world":
        samples = read_samples(data, recipe.data.image_root)
        for sample in samples:
            if stage == "eval":
                question_of(sample)
            elif stage != "grpo" and sample.response is None:
                raise ValueError(f"sample {sample.id} of {data} has no response, which {stage} needs")
        return Source.of(samples)
    if stage == "pretrain":
        return Source(lambda i: exemplars.pretraining(world, "train", i), None)
    if stage == "sft":
        return Source(
            lambda i: exemplars.chain_of_thought(
                world, "train", 1_000_000 + i, recipe.world.careless, recipe.world.slip
            ),
            None,
        )
    if stage == "grpo":
        return Source(lambda i: exemplars.question(world, "train", 2_000_000 + i), None)
    return Source(lambda i: exemplars.question(world, "test", i), None)


def _start(recipe: Recipe, ranks: Ranks, run_dir: Path, world: World) -> Engine:
    """Take possession of the run's folder and load the model that the recipe names."""
    _check_folder(recipe, run_dir)
    _check_model_exists(recipe.model.path)
    loaded = _load(recipe, world, recipe.model.path, ranks.device)  # before anything is written or deleted
    ranks.barrier()  # every rank has looked
    if ranks.is_main:
        if recipe.run.overwrite:
            shutil.rmtree(run_dir, ignore_errors=True)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text(run_dir / "recipe.toml", dump_recipe(recipe))
        except OSError as error:
            raise ValueError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    ranks.barrier()
    log = Log(run_dir, recipe.log, ranks.is_main, recipe.model_dump(mode="json"))
    vlm = loaded[0]
    fused = ", ".join(vlm.fused_layers) or f"none ({vlm.unfused})"
    log.say(f"layers that liger-kernel computes: {fused}")
    return _engine(recipe, ranks, run_dir, log, recipe.model.path, *loaded)


def _check_folder(recipe: Recipe, run_dir: Path) -> None:
    file = run_dir / "recipe.toml"
    if recipe.run.overwrite:
        if run_dir.is_dir() and any(run_dir.iterdir()) and not file.exists():
            raise ValueError(f"{run_dir} is not the folder of a run; run.overwrite does not delete it")
        return
    if not file.exists():
        return
    before, now = tomllib.loads(file.read_text(encoding="utf-8")), tomllib.loads(dump_recipe(recipe))
    for values in (before, now):
        seed = values["run"]["seed"]
        for section in FREE_TO_CHANGE:
            del values[section]
        values["run"] = {"seed": seed}
    if changed := _first_difference(before, now, ""):
        raise ValueError(
            f"{run_dir} was made with {changed}; give another --run.dir, or --run.overwrite true"
        )


def _first_difference(before: Any, now: Any, key: str) -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if found := _first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip(".")):
                return found
        return None
    return None if before == now else f"{key} = {before}, now {now}"


def _check_model_exists(path: str) -> None:
    """Answer a mistyped path at once; transformers would ask the hub for half a minute."""
    if path == TINY or Path(path).is_dir():
        return
    try:
        if not try_to_load_from_cache(path, "config.json"):
            model_info(path, timeout=10)
    except HFValidationError:
        raise ValueError(f"model folder {path} does not exist") from None
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"model {path}: no such folder, and the hub does not answer for it: {error}"
        ) from error


def _load(recipe: Recipe, world: World, path: str | Path, device: torch.device) -> tuple[PackedVLM, Any, Any]:
    compute_dtype = getattr(torch, recipe.model.dtype)
    # an update of 1e-6 is lost in bfloat16 weights
    dtype = torch.float32 if compute_dtype == torch.bfloat16 else compute_dtype
    if path != TINY:
        return load_model(path, dtype, compute_dtype, device=device, liger=recipe.model.liger)
    model, tokenizer, image_processor = build_tiny(_tokenizer_texts(world), recipe.run.seed)
    torch.nn.Module.to(model, device, dtype)
    return PackedVLM(model, compute_dtype, recipe.model.liger), tokenizer, image_processor


def _tokenizer_texts(world: World) -> list[str]:
    samples = [
        write(world, "train", index)
        for index in range(TOKENIZER_SAMPLES)
        for write in (exemplars.chain_of_thought, exemplars.caption)
    ]
    prompts = [part["text"] for s in samples for part in s.messages[0]["content"] if part["type"] == "text"]
    return ["user\n", "assistant\n", *prompts, *(s.response or "" for s in samples)]


def _engine(recipe, ranks, run_dir, log, path, vlm, tokenizer, image_processor) -> Engine:
    model = vlm.model
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    encoder = PromptEncoder(
        tokenizer,
        image_processor,
        model.config.image_token_id,
        max_pixels=recipe.data.max_pixels,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
    )
    return Engine(recipe, ranks, run_dir, log, vlm, tokenizer, image_processor, encoder, path)


def _use_model(engine: Engine, world: World, path: str | Path) -> None:
    """Give the engine another model, a stage's start or a row of the table, unless it holds it already."""
    if engine.holds != path:
        del engine.vlm  # never two in memory
        loaded = _load(engine.recipe, world, path, engine.ranks.device)
        fresh = _engine(engine.recipe, engine.ranks, engine.run_dir, engine.log, path, *loaded)
        vars(engine).update(vars(fresh))


def _check_later_stages(run_dir: Path, stage: str) -> None:
    """A later stage that is there already did not start from this one."""
    for later in STAGES[STAGES.index(stage) + 1 :]:
        if (run_dir / "models" / later).exists() or newest_checkpoint(run_dir, later) is not None:
            raise ValueError(
                f"{run_dir} holds {later}, which did not start from the {stage} that is asked for now; "
                "give another --run.dir, or --run.overwrite true"
            )


def _start_of(recipe: Recipe, stage: str) -> str | Path:
    """The newest model of the stages before this one, in this run's folder; else the recipe's model."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        folder = recipe.run.dir / "models" / earlier
        if folder.exists():
            return folder
    return recipe.model.path


def _evaluate(engine: Engine, world: World, source: Source) -> None:
    """Evaluate every model of the run: base (what fine-tuning starts from), then each finished stage."""
    rows = {"base": _start_of(engine.recipe, "sft")}
    rows |= {
        stage: folder for stage in ("sft", "grpo") if (folder := engine.run_dir / "models" / stage).exists()
    }
    summaries = {}
    for name, path in rows.items():
        _use_model(engine, world, path)
        summaries[name] = evaluate(engine, name, source)
    if engine.ranks.is_main:
        write_summary(engine, summaries)
