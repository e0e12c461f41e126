"""The loop that every stage runs in: steps, checkpoints, validation, stopping and resuming."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geo_r1.errors import OutageError, UserError
from geo_r1.models import PackedVLM
from geo_r1.rollout.engine import EngineLost
from geo_r1.train.context import RunContext
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import Duration, OptimConfig
from geo_r1.train.report.log import Phases, peak_memory_mib
from geo_r1.train.report.transcripts import forget_after
from geo_r1.train.state.checkpoint import Checkpoints, DamagedCheckpointError
from geo_r1.train.updater import Updater

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_THOUGHT = 1.0  # seconds; within them, a terminal and torchrun both pass on one Ctrl-C


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop, and has written a checkpoint to go on from."""


# One step of a stage: updates the policy; returns the step's metrics and the tokens this rank computed.
Step = Callable[[Updater, Phases], tuple[dict[str, float], int]]
# Evaluates a whole model on held-out samples; returns its metrics and its accuracy.
Validate = Callable[[PackedVLM], tuple[dict[str, float], float]]


def run_stage(
    context: RunContext,
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
    pending: Callable[[int], list[dict[str, Any]]] = lambda step: [],
) -> None:
    """Run a stage from its newest checkpoint, or from the start, to its end, and export the model.

    A run that an error ends leaves a checkpoint of its last whole step.

    Args:
        step_fn: one step. A UserError or EngineLost comes on every rank, and leaves `Progress` as it was
            if no weight has changed.
        headline: name of the metric that the progress line shows.
        validate: called every `eval.every` steps.
        reference: a second model whose weights move, so checkpoints hold it too.
        pending: returns the value of `Progress.pending` after so many whole steps; all ranks call it
            together.

    Raises:
        Stopped: a stop signal arrived; the state is in a checkpoint.
        EngineLost: the rollout engine has gone.
        UserError: a checkpoint cannot be read or written, `step_fn` raised it, or too many steps went wrong.
    """
    ranks, recipe = context.ranks, context.recipe
    updater = Updater(context, stage, policy, optim, num_steps)
    checkpoints = Checkpoints(context.run_dir, stage, ranks, recipe.run.keep_checkpoints)
    progress = updater.progress

    def save(*, wait: bool) -> None:
        if not checkpoints.holds(progress.step):
            progress.pending = pending(progress.step) or progress.pending
            checkpoints.save(progress.step, _state(updater, reference), wait=wait)

    def advance(stop_requested: Callable[[], bool]) -> None:
        metrics, seconds = _timed_step(context, updater, step_fn)
        accuracy, mistake = None, None
        if recipe.eval.every and progress.step % recipe.eval.every == 0:
            try:
                figures, accuracy = _validated(policy, validate)
                metrics |= {f"eval/{name}": figure for name, figure in figures.items()}
            except UserError as error:  # the step's own figures are kept all the same
                mistake = error
        with ranks.together():
            context.log.write(stage, progress.step, metrics)
        if mistake is not None:
            raise mistake
        line = f"{headline} {metrics[headline]:.4f}  {seconds:.2f} s/step"
        context.log.advance(stage, progress.step, num_steps, line)
        best = checkpoints.best()
        better = recipe.eval.keep_best and accuracy is not None and (not best or accuracy > best[1])
        stop, failed = ranks.sum([stop_requested(), checkpoints.failed()])
        if failed:
            checkpoints.wait()
        if stop or better or progress.step % config.save_every == 0:
            save(wait=stop > 0)
        if better:
            assert accuracy is not None
            checkpoints.mark_best(progress.step, accuracy)
        if stop:
            context.log.stop()
            raise Stopped(
                f"{stage} stopped after step {progress.step} of {num_steps}; the same command goes on"
            )

    with closing(checkpoints), stop_requests(ranks.is_main) as stop_requested:
        _resume(context, checkpoints, updater, reference)
        size = sum(parameter.numel() for parameter in policy.vlm.model.parameters())
        checkpoints.check_room(_state(updater, reference), size * context.export_dtype.itemsize)
        policy.vlm.model.train()
        context.log.start(stage, num_steps, progress.step)
        while progress.step < num_steps:
            before = progress.step, updater.num_updates
            try:
                advance(stop_requested)
            except Stopped:
                raise
            except Exception as error:
                whole = progress.step > before[0] or updater.num_updates == before[1]
                # other ranks know of a mistake or an outage, but not of a defect
                together = ranks.size == 1 or isinstance(error, (UserError, EngineLost))
                if progress.step and whole and together:
                    _keep(checkpoints, stage, progress.step, save, error)
                raise
        context.log.stop()
        save(wait=True)  # whatever happens to the export
        checkpoints.wait()
        _load_best(context, checkpoints, updater, reference)
        context.export(stage, policy)
        checkpoints.finish()
        if ranks.any(stop_requested()):
            raise Stopped(f"{stage} is finished; the same command goes on")


def _keep(
    checkpoints: Checkpoints, stage: str, step: int, save: Callable[..., None], error: Exception
) -> None:
    """Leave a checkpoint of the last whole step before an error ends the run, and let the error say so."""
    try:
        save(wait=True)
        checkpoints.wait()
    except (UserError, OutageError) as failure:
        note = f"step {step} of {stage} could not be kept: {failure}"
    else:
        note = f"{stage} goes on after step {step}"
    if isinstance(error, (UserError, OutageError)):
        error.args = (f"{error}; {note}",)
    else:
        error.add_note(note)


def _resume(
    context: RunContext, checkpoints: Checkpoints, updater: Updater, reference: Policy | None
) -> None:
    """Go on from the newest checkpoint that is as it was written, and forget what came later."""
    stage, log = updater.stage, context.log
    while (newest := checkpoints.newest()) is not None:
        try:
            _load(checkpoints, newest, updater, reference)
        except DamagedCheckpointError as damage:
            log.say(f"{stage}: {damage}; it is now {checkpoints.set_aside(newest).name}, and is not used")
            continue
        log.say(f"{stage}: going on from {newest}")
        break
    log.rewind(stage, updater.progress.step)
    if context.ranks.is_main:
        forget_after(context.run_dir, stage, updater.progress.step)


def _load_best(
    context: RunContext, checkpoints: Checkpoints, updater: Updater, reference: Policy | None
) -> None:
    """Take the model of the best step, if one was marked; a damaged checkpoint counts for nothing."""
    last = updater.progress.step
    while (best := checkpoints.best()) is not None and best[0] != last:
        folder = checkpoints.folder(best[0])
        try:
            _load(checkpoints, folder, updater, reference)
        except DamagedCheckpointError as damage:
            aside = checkpoints.set_aside(folder).name
            context.log.say(f"{updater.stage}: {damage}; it is now {aside}, and is not the best")
            continue
        context.log.say(f"{updater.stage}: leaves the model of step {best[0]}, accuracy {best[1]:.1%}")
        return


def _validated(policy: Policy, validate: Validate) -> tuple[dict[str, float], float]:
    with policy.whole() as vlm:  # a copy, freed when this function returns
        return validate(vlm)


def _timed_step(context: RunContext, updater: Updater, step_fn: Step) -> tuple[dict[str, float], float]:
    """Run a step; returns its metrics, with times and memory, and its seconds."""
    ranks, progress = context.ranks, updater.progress
    # dropout draws from this generator, and a resumed run must draw the same
    torch.manual_seed(hash((context.recipe.run.seed, progress.step, ranks.rank)))
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
    kinds, expected = (
        {name: type(value) for name, value in table.items()}
        for table in (state["trainer"], asdict(updater.progress))
    )
    if kinds != expected:
        raise UserError(f"checkpoint {folder} cannot be read: trainer.json holds no trainer's state")
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
def stop_requests(aloud: bool = True) -> Iterator[Callable[[], bool]]:
    """Turn stop signals into a flag, so that the step in progress ends whole.

    A second Ctrl-C ends it at once.

    Args:
        aloud: say that the signal has come; True on the main rank.
    """
    received: list[float] = []
    process = os.getpid()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def receive(number: int, _: object) -> None:
        if os.getpid() != process:  # a child of a user's code inherits this handler, and must end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if number == signal.SIGINT and received and now - received[0] > SECOND_THOUGHT:
            raise KeyboardInterrupt
        if aloud and not received:  # not by print, which the signal may have interrupted
            os.write(2, b"geo_r1: stopping after this step, with a checkpoint; Ctrl-C again stops now\n")
        received.append(now)

    for number in before:
        signal.signal(number, receive)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
