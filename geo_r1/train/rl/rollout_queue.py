"""Rollouts of GRPO's steps, sampled when a step needs them or while earlier steps train.

A draw is the prompts of a step, the version of the weights that sample for them, and the completions. With
`max_staleness` 0 a step's draw begins with the step. Otherwise a thread samples the next steps' draws beside
the update, with the newest weights that the engine has. Weights change only while nothing is being sampled,
so every completion comes from one policy. With `max_staleness` 1, a draw is always one update old, and a run
has the same metrics however long sampling takes; with more, the age of a draw depends on timing.

Draws that no step has used yet belong in a checkpoint: `RolloutQueue.state`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from geo_r1.data.loader import PromptLoader
from geo_r1.errors import UserError
from geo_r1.models.lora import DOWN, UP
from geo_r1.rollout import Completion, SamplingConfig
from geo_r1.rollout.engine import EngineLost, RolloutEngine, WeightsLost
from geo_r1.train.group import Group
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import GRPOConfig, RolloutConfig
from geo_r1.train.report.log import Phases
from geo_r1.train.updater import Progress

RELOADS = 5  # in a row, for a server that keeps losing its weights


@dataclass
class _Draw:
    """Prompts that are sampled for together.

    Attributes:
        step: the step that they are for.
        version: number of updates behind the weights that sample.
        positions: in the training order, of all ranks.
        groups: this rank's, without completions; prompts that are too long or bad are left out.
        answers: the completions of each group.
    """

    step: int
    version: int
    positions: list[int]
    groups: list[Group] = field(default_factory=list)
    answers: Future[list[list[Completion]]] = field(default_factory=Future)


class RolloutQueue:
    """Samples the groups of a stage's steps. All ranks call the same methods in the same order.

    Args:
        engine: samples completions; it gets weights unless it samples with the policy itself.
        rollout, grpo: sections of the recipe.
        seed: of the random streams, together with a prompt's position.
        num_steps: of the stage.

    Attributes:
        num_skipped: prompts of this rank that the last `take` or `more` left out as too long or bad.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        loader: PromptLoader,
        rollout: RolloutConfig,
        grpo: GRPOConfig,
        *,
        seed: int,
        num_steps: int,
    ) -> None:
        self.policy, self.engine, self.loader = policy, engine, loader
        self.sampling = sampling_of(rollout)
        self.num_prompts, self.num_completions = grpo.prompts_per_step, grpo.num_completions
        self.max_staleness = rollout.max_staleness
        self.budgets = {
            "rollout.max_tokens": rollout.max_tokens,
            "grpo.optim.max_tokens": grpo.optim.max_tokens,
        }
        self.seed, self.num_steps = seed, num_steps
        assert engine.copies != "none" or not self.max_staleness, "updates would change sampling weights"
        self.version = -1  # of the engine's weights
        self.num_skipped = 0
        self._queue: deque[_Draw] = deque()  # this step's first
        self._current: _Draw | None = None  # of the step that is training, and no longer in the queue
        self._thread = ThreadPoolExecutor(1, "rollouts", self._on_device) if self.max_staleness else None

    def take(self, progress: Progress, phases: Phases) -> list[Group]:
        """This rank's sampled groups of the step that begins."""
        if not self._queue:
            restored = [self._restored(kept, progress.step, phases) for kept in progress.pending]
            self._queue.extend(restored)
            progress.pending = []
        if not self._queue:
            self._load(progress.step, phases)
            self._queue.append(self._drawn(progress.step, progress, self.num_prompts, phases))
        draw = self._queue[0]
        assert draw.step == progress.step, (draw.step, progress.step)
        return self._sampled(draw, phases)

    def more(self, progress: Progress, count: int, phases: Phases) -> list[Group]:
        """This rank's share of `count` more groups for the step that `take` began, sampled now."""
        self._renew(progress.step, phases)
        return self._sampled(self._drawn(progress.step, progress, count, phases), phases)

    def go_ahead(self, progress: Progress, phases: Phases) -> None:
        """Begin to sample for later steps, as far as `max_staleness` allows.

        Raises:
            EngineLost: on every rank; the step's own draw stays in the queue.
        """
        begun = self._queue[-1].step
        if self.max_staleness and begun + 1 < self.num_steps:
            self._renew(progress.step, phases)
            last = min(self.version + self.max_staleness, self.num_steps - 1)
            for step in range(begun + 1, last + 1):
                self._queue.append(self._drawn(step, progress, self.num_prompts, phases))
        elif not self.max_staleness:
            self.engine.sleep()
        self._current = self._queue.popleft()

    def state(self, step: int) -> list[dict[str, Any]]:
        """Draws of all ranks with their completions, for `Progress.pending`.

        If sampling failed, draws without completions are sampled again after a resume.

        Args:
            step: the number of whole steps. A draw that a later step has taken is still needed: it failed.
        """
        states = []
        current = self._current
        unfinished = [current] if current is not None and current.step == step else []
        for draw in (*unfinished, *self._queue):
            answers: dict[int, list[dict[str, Any]]] = {}
            try:
                completions = draw.answers.result()
            except (EngineLost, UserError):
                completions = []
            for group, answer in zip(draw.groups, completions, strict=False):
                answers[group.position] = [asdict(completion) for completion in answer]
            everyone = {
                str(p): group for part in self.policy.ranks.gather(answers) for p, group in part.items()
            }
            states.append(
                {
                    "step": draw.step,
                    "version": min(self.policy.ranks.gather(draw.version)),
                    "positions": draw.positions,
                    "answers": everyone,
                }
            )
        return states

    def close(self) -> None:
        """Close the engine: a server at once, an engine in this process after it has finished sampling."""
        if self.engine.copies == "one":
            self.engine.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if self.engine.copies != "one":
            self.engine.close()

    def _on_device(self) -> None:
        """Give the thread this rank's GPU and a stream of its own."""
        device = self.policy.ranks.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def _drawn(self, step: int, progress: Progress, count: int, phases: Phases) -> _Draw:
        """Draw the next `count` prompts, and begin to sample for this rank's share."""
        positions = [progress.drawn + i for i in range(count)]
        following = progress.drawn + count
        draw = _Draw(step, step if self.engine.copies == "none" else self.version, positions)
        self._encode(draw, following, phases)
        draw.answers = self._begin(draw, phases)
        progress.drawn = following
        return draw

    def _encode(self, draw: _Draw, following: int, phases: Phases) -> None:
        ranks = self.policy.ranks
        mine = [draw.positions[i] for i in ranks.share(len(draw.positions))]
        upcoming = [following + i for i in ranks.share(self.num_prompts)]
        with phases("data"), ranks.together():
            for position, item in zip(mine, self.loader.load(mine, [upcoming]), strict=True):
                if item is not None:
                    draw.groups.append(Group(*item, position=position))
            for group in draw.groups:
                for option, most in self.budgets.items():
                    group.prompt.check_budget(self.sampling.max_new_tokens, most, option)

    def _begin(self, draw: _Draw, phases: Phases) -> Future[list[list[Completion]]]:
        def answer() -> list[list[Completion]]:
            prompts = [group.prompt for group in draw.groups]
            streams = [f"{self.seed}/{group.position}" for group in draw.groups]
            return self.engine.sample(prompts, self.num_completions, self.sampling, streams)

        if self._thread is not None:
            return self._thread.submit(answer)
        with phases("rollout"):
            return _done(answer)

    def _sampled(self, draw: _Draw, phases: Phases) -> list[Group]:
        answers = self._answers(draw, phases)
        self.num_skipped = len(self.policy.ranks.share(len(draw.positions))) - len(draw.groups)
        return [
            replace(
                group,
                prompt=replace(group.prompt, images=()),  # only the engine needed them
                completions=completions,
                version=draw.version,
            )
            for group, completions in zip(draw.groups, answers, strict=True)
        ]

    def _answers(self, draw: _Draw, phases: Phases) -> list[list[Completion]]:
        """Wait for a draw's completions; an engine that lost its weights gets the policy's and samples again.

        Raises:
            EngineLost: on every rank, if on any.
            UserError: a prompt cannot be sampled for; on every rank.
        """
        for _ in range(RELOADS):
            answers: list[list[Completion]] = []
            failure: EngineLost | None = None
            with phases("rollout"), self.policy.ranks.together():
                try:
                    answers = draw.answers.result()
                except EngineLost as error:
                    failure = error
            failures = [error for error in self.policy.ranks.gather(failure) if error is not None]
            if not failures:
                return answers
            if any(not isinstance(error, WeightsLost) for error in failures):
                break
            wait([other.answers for other in self._queue])  # weights change only while nothing is sampled
            self._load(draw.step, phases, again=True)
            if failure is not None:
                draw.version = draw.step
                draw.answers = self._begin(draw, phases)
        raise EngineLost(_reason(failures))

    def _renew(self, version: int, phases: Phases) -> None:
        """Give the engine the policy's current weights, unless it is sampling on some rank."""
        if not self.policy.ranks.any(any(not draw.answers.done() for draw in self._queue)):
            self._load(version, phases)

    def _load(self, version: int, phases: Phases, *, again: bool = False) -> None:
        """Give the engine the policy's current weights, which have `version` updates behind them."""
        if self.engine.copies == "none" or (self.version == version and not again):
            return
        with phases("sync"):
            for _ in range(RELOADS):
                failures = self._load_once()
                if not failures:
                    self.version = version
                    return
                if any(not isinstance(error, WeightsLost) for error in failures):
                    break
        raise EngineLost(_reason(failures))

    def _load_once(self) -> list[EngineLost]:
        """Load once; returns the failures of all ranks."""
        ranks, shared = self.policy.ranks, self.engine.copies == "one"
        holds_base = ranks.gather(self.engine.holds_base)
        adapters_alone = holds_base[0] if shared else all(holds_base)
        ends = (DOWN, UP) if adapters_alone else ("",)
        tensors = self.policy.full_tensors(self.policy.vlm.compute_dtype, ends)
        failure: EngineLost | None = None
        if not shared or ranks.is_main:
            try:
                self.engine.load(tensors, alpha=self.policy.alpha)
            except EngineLost as error:
                failure = error
        for _ in tensors:  # gathering is collective, also on ranks that need nothing
            pass
        return [error for error in ranks.gather(failure) if error is not None]

    def _restored(self, kept: dict[str, Any], version: int, phases: Phases) -> _Draw:
        """A draw from a checkpoint, dealt to the ranks of this run; `version` is the policy's."""
        draw = _Draw(kept["step"], kept["version"], kept["positions"])
        self._encode(draw, draw.positions[-1] + 1, phases)
        answers = kept["answers"]
        found = [answers.get(str(group.position)) for group in draw.groups]
        if self.policy.ranks.any(None in found):  # the engine was lost before it sampled them
            self._load(version, phases)
            draw.version = version
            draw.answers = self._begin(draw, phases)
        else:
            draw.answers.set_result([[Completion(**values) for values in group] for group in found if group])
        return draw


def sampling_of(rollout: RolloutConfig) -> SamplingConfig:
    """How the recipe wants tokens drawn."""
    return SamplingConfig(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def _reason(failures: Sequence[EngineLost]) -> str:
    """The most informative of all ranks' failures."""
    return str(next((error for error in failures if not isinstance(error, WeightsLost)), failures[0]))


def _done(function: Callable[[], Any]) -> Future[Any]:
    """A finished future with what the function returned or raised."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except (EngineLost, UserError) as error:
        future.set_exception(error)
    return future
