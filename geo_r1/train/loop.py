"""What every stage shares: the engine it runs on, the optimiser's step, the loop that can stop and go on."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from geo_r1.data import PromptEncoder
from geo_r1.files import written_beside
from geo_r1.models import PackedVLM
from geo_r1.rewards import RewardFunction, load_reward
from geo_r1.rollout.engine import EngineLost
from geo_r1.train.batches import MicroBatch
from geo_r1.train.checkpoint import Checkpoints, save_folder
from geo_r1.train.config import Duration, OptimConfig, Recipe, RewardConfig
from geo_r1.train.log import Log
from geo_r1.train.optim import build_optimizer, set_learning_rate
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.phases import Phases, peak_memory_mib
from geo_r1.train.shards import State
from geo_r1.train.transcripts import forget_after

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop, and has written a checkpoint to go on from."""


@dataclass
class Engine:
    """What a run has besides its policy, and where it writes."""

    recipe: Recipe
    ranks: Ranks
    run_dir: Path
    log: Log
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder

    def export(self, folder: Path, policy: Policy) -> None:
        """Write the policy as a transformers folder, on the main rank; the others take part, and wait."""
        with policy.exported() as model:
            if model is not None:
                save_folder(folder, model, [self.tokenizer, self.image_processor])
        self.ranks.barrier()


@dataclass
class Progress:
    """What a stage has behind it. With weights and optimiser, all that its future depends on: samples and
    random streams are functions of these numbers and the seed."""

    step: int = 0
    drawn: int = 0
    """Positions of the training order that were used."""
    bad_steps: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Drawn for steps to come, as `geo_r1.train.rollouts` keeps it; up to date in a checkpoint."""


class Updater:
    """A policy's optimiser, with its schedule, and what happens when a step goes wrong."""

    def __init__(
        self, engine: Engine, stage: str, policy: Policy, config: OptimConfig, num_steps: int
    ) -> None:
        self.engine, self.stage, self.policy = engine, stage, policy
        self.config, self.num_steps = config, num_steps
        self.progress = Progress()
        self.optimizer = policy.attach(build_optimizer(policy.vlm.model, config), config.max_grad_norm)

    def apply(self, loss: float, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Clip and update; returns `grad_norm` and `learning_rate`.

        A loss or a gradient that is not finite changes nothing: the step is counted, its batch kept.

        Args:
            loss: of the step, over all ranks.
            micro_batches: what this rank's gradient came from.

        Raises:
            ValueError: there were too many such steps.
        """
        rate = set_learning_rate(self.optimizer, self.config, self.progress.step, self.num_steps)
        norm = self.policy.update(self.optimizer, self.config.max_grad_norm, math.isfinite(loss))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._count_bad_step(loss, norm, micro_batches)
        figures = {"grad_norm": norm, "learning_rate": rate}
        return figures | ({"bad_steps": float(self.progress.bad_steps)} if self.progress.bad_steps else {})

    def _count_bad_step(self, loss: float, norm: float, micro_batches: Sequence[MicroBatch]) -> None:
        engine, step = self.engine, self.progress.step + 1
        self.progress.bad_steps += 1
        folder = engine.run_dir / "bad"
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.stage}-{step:06d}-rank{engine.ranks.rank}.pt"
        with written_beside(file) as partial:
            torch.save([micro.record for micro in micro_batches], partial)
        what = f"step {step}: loss {loss}, gradient {norm}"
        engine.log.say(f"{self.stage} {what}: skipped; its batch is in {folder}")
        if self.progress.bad_steps > engine.recipe.run.max_bad_steps:
            raise ValueError(
                f"{self.stage} {what}: {self.progress.bad_steps} steps were not finite, run.max_bad_steps is "
                f"{engine.recipe.run.max_bad_steps}; lower the learning rate or check the rewards. Their "
                f"batches are in {folder}"
            )


# One step of a stage: updates the policy, returns the step's figures and the tokens it computed on this rank.
Step = Callable[[Updater, Phases], tuple[dict[str, float], int]]
# Figures of a whole model on held-out samples, and the one of them by which a model is better.
Validate = Callable[[PackedVLM], tuple[dict[str, float], float]]


def run_stage(
    engine: Engine,
    stage: str,
    policy: Policy,
    config: Duration,
    optim: OptimConfig,
    num_steps: int,
    step_fn: Step,
    headline: str,
    *,
    validate: Validate,
    reference: Policy | None = None,
    pending: Callable[[], list[dict[str, Any]]] = list,
) -> None:
    """Run a stage from its newest checkpoint, or from the start, to its end, and export the model.

    Args:
        step_fn: one step.
        headline: the figure that the progress line shows.
        validate: run every `eval.every` steps.
        reference: a second model that moves, and so belongs to the checkpoint.
        pending: what `Progress.pending` is to hold now, on all ranks together.

    Raises:
        Stopped: SIGTERM, SIGINT or SIGUSR1 came; the state is in a checkpoint.
        EngineLost: what samples has gone; the state of the last whole step is in a checkpoint.
        ValueError: a checkpoint cannot be read or written, or too many steps went wrong.
    """
    ranks, recipe = engine.ranks, engine.recipe
    updater = Updater(engine, stage, policy, optim, num_steps)
    checkpoints = Checkpoints(engine.run_dir, stage, ranks, recipe.run.keep_checkpoints)

    def state() -> State:
        updater.progress.pending = pending()
        return _state(updater, reference)

    with closing(checkpoints), stop_requests() as stop_requested:
        progress = updater.progress
        if (newest := checkpoints.newest()) is not None:
            _load(checkpoints, newest, updater, reference)
            engine.log.say(f"{stage}: going on from {newest}")
        engine.log.rewind(stage, progress.step)
        if ranks.is_main:
            forget_after(engine.run_dir, stage, progress.step)
        policy.vlm.model.train()
        engine.log.start(stage, num_steps, progress.step)
        while progress.step < num_steps:
            try:
                metrics, seconds = _timed_step(engine, updater, step_fn)
            except EngineLost as error:
                checkpoints.wait()
                if checkpoints.newest() != checkpoints.folder(progress.step):
                    checkpoints.save(progress.step, state(), wait=True)
                raise EngineLost(f"{error}; {stage} goes on after step {progress.step}") from error
            accuracy = None
            if recipe.eval.every and progress.step % recipe.eval.every == 0:
                figures, accuracy = _validated(policy, validate)
                metrics |= {f"eval/{name}": figure for name, figure in figures.items()}
            engine.log.write(stage, progress.step, metrics)
            line = f"{headline} {metrics[headline]:.4f}  {seconds:.2f} s/step"
            engine.log.advance(stage, progress.step, num_steps, line)
            best = checkpoints.best()
            better = recipe.eval.keep_best and accuracy is not None and (not best or accuracy > best[1])
            stop = ranks.any(stop_requested())
            if stop or better or progress.step % config.save_every == 0:
                checkpoints.save(progress.step, state(), wait=stop)
            if better:
                assert accuracy is not None
                checkpoints.mark_best(progress.step, accuracy)
            if stop:
                engine.log.stop()
                raise Stopped(
                    f"{stage} stopped after step {progress.step} of {num_steps}; the same command goes on"
                )
        engine.log.stop()
        checkpoints.wait()
        if (best := checkpoints.best()) is not None and best[0] != progress.step:
            _load(checkpoints, checkpoints.folder(best[0]), updater, reference)
            engine.log.say(f"{stage}: leaves the model of step {best[0]}, accuracy {best[1]:.1%}")
        engine.export(engine.run_dir / "models" / stage, policy)
        checkpoints.clear()
        if ranks.any(stop_requested()):
            raise Stopped(f"{stage} is finished; the same command goes on")


def _validated(policy: Policy, validate: Validate) -> tuple[dict[str, float], float]:
    with policy.whole() as vlm:  # a copy that must not outlive this function
        return validate(vlm)


def _timed_step(engine: Engine, updater: Updater, step_fn: Step) -> tuple[dict[str, float], float]:
    """Run a step; its figures with times and memory, and its seconds."""
    ranks, progress = engine.ranks, updater.progress
    # dropout draws from it, and what it draws is to be the same when a run goes on
    torch.manual_seed(hash((engine.recipe.run.seed, progress.step, ranks.rank)))
    phases = Phases(ranks.device)
    start = time.perf_counter()
    metrics, tokens = step_fn(updater, phases)
    seconds = time.perf_counter() - start
    progress.step += 1
    metrics |= {f"time/{name}": value for name, value in phases.seconds.items()}
    metrics |= {
        "time/step": seconds,
        "tokens_per_second": ranks.sum([tokens])[0] / seconds,
        "memory/peak_mib": peak_memory_mib(ranks.device),
    }
    return metrics, seconds


def _state(updater: Updater, reference: Policy | None) -> dict[str, dict[str, Any]]:
    state = updater.policy.state(updater.optimizer)
    if reference is not None:
        state["model"] |= {
            f"reference.{name}": tensor for name, tensor in reference.state(None)["model"].items()
        }
    return state | {"trainer": asdict(updater.progress)}


def _load(checkpoints: Checkpoints, folder: Path, updater: Updater, reference: Policy | None) -> None:
    state = checkpoints.load(folder, _state(updater, reference))
    if state["trainer"].keys() != asdict(updater.progress).keys():
        raise ValueError(f"checkpoint {folder} cannot be read: trainer.json holds no trainer's state")
    weights = {name: tensor for name, tensor in state["model"].items() if not name.startswith("reference.")}
    updater.policy.load_state(updater.optimizer, {"model": weights, "optim": state["optim"]})
    if reference is not None:
        moved = {
            name.removeprefix("reference."): t for name, t in state["model"].items() if name not in weights
        }
        reference.load_state(None, {"model": moved, "optim": {}})
    for name, value in state["trainer"].items():
        setattr(updater.progress, name, value)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, a request to stop only sets a flag; the step in progress ends whole."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_rewards(config: RewardConfig) -> dict[str, RewardFunction]:
    """The recipe's reward functions by name.

    Raises:
        ValueError: a function or an option is unknown, or options and weights name a function not in use.
    """
    for table, names in (("options", config.options), ("weights", config.weights)):
        for name in names:
            if name not in config.functions:
                raise ValueError(
                    f"rewards.{table} names {name}, but rewards.functions has {', '.join(config.functions)}"
                )
    return {name: load_reward(name, **config.options.get(name, {})) for name in config.functions}
