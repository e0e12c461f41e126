"""What every stage shares: the engine it runs on, the optimiser's step, the loop that can stop and go on."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo_r1.data import PromptEncoder
from geo_r1.models import PackedVLM
from geo_r1.rewards import RewardFunction, load_reward
from geo_r1.train.checkpoint import checkpoint_folder, newest_checkpoint, prune, restore, save_folder
from geo_r1.train.config import OptimConfig, Recipe, RewardConfig
from geo_r1.train.distributed import Ranks
from geo_r1.train.log import Log

KEPT_CHECKPOINTS = 2


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop, and has written a checkpoint to go on from."""


@dataclass
class Engine:
    """A policy with its tokenizer and image processor, on this rank, and where the run writes.

    `holds` says which weights the policy has: the path they were loaded from, or of a stage's export.
    """

    recipe: Recipe
    ranks: Ranks
    run_dir: Path
    log: Log
    vlm: PackedVLM
    tokenizer: Any
    image_processor: Any
    encoder: PromptEncoder
    holds: str | Path

    def save(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Write the policy, on the main rank; the others wait."""
        if self.ranks.is_main:
            save_folder(folder, self.vlm.model, [self.tokenizer, self.image_processor], state)
        self.ranks.barrier()


class Updater:
    """AdamW over the policy's trainable parameters, with its schedule and clipping."""

    def __init__(self, engine: Engine, config: OptimConfig, num_steps: int) -> None:
        self.ranks, self.config, self.num_steps = engine.ranks, config, num_steps
        self.parameters = [p for p in engine.vlm.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            # one pass; torch's default on a GPU holds temporaries as large as the weights
            fused=self.parameters[0].device.type == "cuda" or None,
        )

    def learning_rate(self, step: int) -> float:
        """The rate at a step: it rises over the warm-up, then follows the schedule to the last step."""
        config = self.config
        warmup = math.ceil(config.warmup_ratio * self.num_steps)
        if step < warmup:
            return config.lr * (step + 1) / warmup
        left = 1 - (step - warmup) / max(1, self.num_steps - warmup)
        fall = {"constant": 1.0, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2}[
            config.schedule
        ]
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)

    def apply(self, step: int) -> dict[str, float]:
        """Sum gradients over ranks, clip, update; returns `grad_norm` and `learning_rate`.

        Raises:
            ValueError: the gradient is not finite.
        """
        self.ranks.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"step {step}: the gradient's norm is {norm}; lower the learning rate or check the rewards"
            )
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm, "learning_rate": rate}


@dataclass
class Phases:
    """Seconds a step spends in each of its phases, the device's work included that a phase asked for."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":  # once a phase: the gap is far below what a phase takes
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# One step of a stage: updates the policy, returns the step's figures and the tokens it computed on this rank.
Step = Callable[[int, Updater, Phases], tuple[dict[str, float], int]]


def run_stage(
    engine: Engine,
    stage: str,
    config: OptimConfig,
    num_steps: int,
    save_every: int,
    step_fn: Step,
    headline: str,
) -> None:
    """Run a stage from its newest checkpoint, or from the start, to its end, and export the model.

    Args:
        step_fn: one step.
        headline: the figure that the progress line shows.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is in a checkpoint.
    """
    updater = Updater(engine, config, num_steps)
    first = 0
    if (newest := newest_checkpoint(engine.run_dir, stage)) is not None:
        state = restore(newest, engine.vlm.model)
        try:
            updater.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(f"checkpoint {newest} is of another model: {error}") from error
        first = state["step"]
        engine.log.say(f"{stage}: going on from {newest}")
    engine.log.rewind(stage, first)
    engine.vlm.model.train()
    engine.log.start(stage, num_steps, first)
    with stop_requests() as stop_requested:
        for step in range(first, num_steps):
            phases = Phases(engine.ranks.device)
            start = time.perf_counter()
            metrics, tokens = step_fn(step, updater, phases)
            seconds = time.perf_counter() - start
            metrics |= {f"time/{name}": value for name, value in phases.seconds.items()}
            metrics |= {
                "time/step": seconds,
                "tokens_per_second": engine.ranks.sum([tokens])[0] / seconds,
                "memory/peak_mib": peak_memory_mib(engine.ranks.device),
            }
            engine.log.write(stage, step + 1, metrics)
            figures = f"{headline} {metrics[headline]:.4f}  {seconds:.2f} s/step"
            engine.log.advance(stage, step + 1, num_steps, figures)
            stop = engine.ranks.any(stop_requested())
            if stop or (step + 1) % save_every == 0:
                state = {"step": step + 1, "optimizer": updater.optimizer.state_dict()}
                engine.save(checkpoint_folder(engine.run_dir, stage, step + 1), state)
                if engine.ranks.is_main:
                    prune(engine.run_dir, stage, KEPT_CHECKPOINTS)
            if stop:
                engine.log.stop()
                raise Stopped(
                    f"{stage} stopped after step {step + 1} of {num_steps}; the same command goes on"
                )
        engine.log.stop()
        engine.holds = engine.run_dir / "models" / stage
        engine.save(engine.holds)
        if engine.ranks.is_main:
            prune(engine.run_dir, stage, 0)
        if engine.ranks.any(stop_requested()):
            raise Stopped(f"{stage} is finished; the same command goes on")


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and SIGINT only set a flag; the step in progress ends whole."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far, MiB: of the GPU's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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


def rows_of(values_N: Tensor, completion_len: list[int]) -> Tensor:
    """Spread one value a completion [N] over its tokens [R]."""
    return values_N.repeat_interleave(torch.tensor(completion_len, device=values_N.device))
