"""Completions for GRPO's steps, sampled when a step needs them or while the steps before it train.

A step's draw is its prompts, the weights that they are answered with, and the answers. With `max_staleness` 0
a step's draw is made when the step begins. Otherwise the draws of the next steps are made on a thread beside
the update, with the newest weights that the sampler had when they began. Weights are only replaced while
nothing is being sampled, so every completion comes from one policy. With 1, a draw is always one update old,
and a run has the same figures however long sampling takes; with more, what is how old depends on time.

What was drawn and is not used yet belongs to a checkpoint: `RolloutQueue.state`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from geo_r1.data.loader import Encoded, PromptLoader
from geo_r1.models.lora import DOWN, UP
from geo_r1.rollout import Completion, SamplingConfig
from geo_r1.rollout.engine import EngineLost, RolloutEngine, WeightsLost
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.report.log import Phases
from geo_r1.train.updater import Progress

RELOADS = 5  # in a row, of a server that loses its weights again and again


@dataclass
class Draw:
    """Prompts that are answered together.

    Attributes:
        step: whose they are.
        version: updates behind the weights that answer them.
        positions: in the training order, of all ranks.
        drawn: this rank's, those that are too long left out.
        num_skipped: of this rank's, how many those were.
        answers: the completions of each of `drawn`.
    """

    step: int
    version: int
    positions: list[int]
    drawn: list[Encoded] = field(default_factory=list)
    num_skipped: int = 0
    answers: Future[list[list[Completion]]] = field(default_factory=Future)


class RolloutQueue:
    """The draws of a stage's steps. All ranks call the same methods in the same order.

    Args:
        sampler: what answers; it is given weights only where it `loads`.
        loads: False where the sampler is the policy itself.
        shared: one sampler for all ranks, which rank 0 gives its weights.
        seed: of the random streams, with a prompt's position.
        num_steps, num_prompts, num_completions: of the stage, of a step over all ranks, of a prompt.
        max_staleness: the most updates that may lie between the weights of a draw and those of its step.
        budgets: options of the recipe that bound the tokens of a prompt with one completion.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: RolloutEngine,
        loader: PromptLoader,
        sampling: SamplingConfig,
        *,
        loads: bool,
        shared: bool,
        seed: int,
        num_steps: int,
        num_prompts: int,
        num_completions: int,
        max_staleness: int,
        budgets: Mapping[str, int],
    ) -> None:
        assert loads or not max_staleness, "an update would change the weights that sample"
        self.policy, self.sampler, self.loader, self.sampling = policy, sampler, loader, sampling
        self.loads, self.shared, self.seed = loads, shared, seed
        self.num_steps, self.num_prompts, self.num_completions = num_steps, num_prompts, num_completions
        self.max_staleness, self.budgets = max_staleness, budgets
        self.version = -1  # of the sampler's weights
        self._queue: deque[Draw] = deque()  # this step's first
        self._thread = ThreadPoolExecutor(1, "rollouts", self._on_device) if max_staleness else None

    def take(self, progress: Progress, phases: Phases) -> tuple[Draw, list[list[Completion]]]:
        """The draw of the step that begins, with this rank's answers."""
        if not self._queue:
            for kept in progress.pending:
                self._queue.append(self._restored(kept, progress.step, phases))
            progress.pending = []
        if not self._queue:
            self._load(progress.step, phases)
            self._queue.append(self._drawn(progress.step, progress, self.num_prompts, phases))
        draw = self._queue[0]
        assert draw.step == progress.step, (draw.step, progress.step)
        return draw, self._answers(draw, phases)

    def more(self, progress: Progress, count: int, phases: Phases) -> tuple[Draw, list[list[Completion]]]:
        """A further draw of `count` prompts for the step that `take` began, answered now."""
        self._renew(progress.step, phases)
        draw = self._drawn(progress.step, progress, count, phases)
        return draw, self._answers(draw, phases)

    def go_ahead(self, progress: Progress, phases: Phases) -> None:
        """The step has what it needs: begin with what the next ones may have by now.

        Raises:
            EngineLost: on every rank; the step's own draw is still there.
        """
        begun = self._queue[-1].step
        if self.max_staleness and begun + 1 < self.num_steps:
            self._renew(progress.step, phases)
            last = min(self.version + self.max_staleness, self.num_steps - 1)
            for step in range(begun + 1, last + 1):
                self._queue.append(self._drawn(step, progress, self.num_prompts, phases))
        elif not self.max_staleness:
            self.sampler.sleep()
        self._queue.popleft()

    def state(self) -> list[dict[str, Any]]:
        """The draws that wait for their steps, answered, for `Progress.pending`; of all ranks, on each.

        Where the sampler has gone, those that it did not answer are to be answered later.
        """
        states = []
        for draw in self._queue:
            answers: dict[int, list[dict[str, Any]]] = {}
            try:
                completions = draw.answers.result()
            except EngineLost:
                completions = []
            for item, group in zip(draw.drawn, completions, strict=False):
                answers[item.position] = [asdict(completion) for completion in group]
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
        """Let the sampler go; a server is not waited for, another sampler until it has said what it says."""
        if self.shared:
            self.sampler.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        if not self.shared:
            self.sampler.close()

    def _on_device(self) -> None:
        """A thread has a current GPU of its own, and shares the default stream unless it takes another."""
        device = self.policy.ranks.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def _drawn(self, step: int, progress: Progress, count: int, phases: Phases) -> Draw:
        """Draw the next `count` prompts, and begin to answer this rank's."""
        positions = [progress.drawn + i for i in range(count)]
        progress.drawn += count
        draw = Draw(step, self.version if self.loads else step, positions)
        self._encode(draw, progress.drawn, phases)
        draw.answers = self._begin(draw, phases)
        return draw

    def _encode(self, draw: Draw, following: int, phases: Phases) -> None:
        ranks = self.policy.ranks
        mine = [draw.positions[i] for i in ranks.share(len(draw.positions))]
        upcoming = [following + i for i in ranks.share(self.num_prompts)]
        with phases("data"):
            draw.drawn = [item for item in self.loader.load(mine, [upcoming]) if item is not None]
            for item in draw.drawn:
                for option, most in self.budgets.items():
                    item.prompt.check_budget(self.sampling.max_new_tokens, most, option)
        draw.num_skipped = len(mine) - len(draw.drawn)

    def _begin(self, draw: Draw, phases: Phases) -> Future[list[list[Completion]]]:
        def answer() -> list[list[Completion]]:
            prompts = [item.prompt for item in draw.drawn]
            streams = [f"{self.seed}/{item.position}" for item in draw.drawn]
            return self.sampler.sample(prompts, self.num_completions, self.sampling, streams)

        if self._thread is not None:
            return self._thread.submit(answer)
        with phases("rollout"):
            return _done(answer)

    def _answers(self, draw: Draw, phases: Phases) -> list[list[Completion]]:
        """Wait for a draw's answers; a sampler that lost its weights gets the policy's, and is asked again.

        Raises:
            EngineLost: on every rank, if on any.
            ValueError: a prompt cannot be answered.
        """
        for _ in range(RELOADS):
            answers: list[list[Completion]] = []
            failure: EngineLost | None = None
            with phases("rollout"):
                try:
                    answers = draw.answers.result()
                except EngineLost as error:
                    failure = error
            failures = [error for error in self.policy.ranks.gather(failure) if error is not None]
            if not failures:
                return answers
            if any(not isinstance(error, WeightsLost) for error in failures):
                break
            wait([other.answers for other in self._queue])  # weights change while nothing is sampled
            self._load(draw.step, phases, again=True)
            if failure is not None:
                draw.version = draw.step
                draw.answers = self._begin(draw, phases)
        raise EngineLost(_reason(failures))

    def _renew(self, version: int, phases: Phases) -> None:
        """Give the sampler the policy's weights of now, unless it is busy on some rank."""
        if not self.policy.ranks.any(any(not draw.answers.done() for draw in self._queue)):
            self._load(version, phases)

    def _load(self, version: int, phases: Phases, *, again: bool = False) -> None:
        """Give the sampler the policy's weights of now, which have so many updates behind them."""
        if not self.loads or (self.version == version and not again):
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
        """What went wrong with it, on any rank."""
        ranks = self.policy.ranks
        holds_base = ranks.gather(self.sampler.holds_base)
        adapters_alone = holds_base[0] if self.shared else all(holds_base)
        ends = (DOWN, UP) if adapters_alone else ("",)
        tensors = self.policy.full_tensors(self.policy.vlm.compute_dtype, ends)
        failure: EngineLost | None = None
        if not self.shared or ranks.is_main:
            try:
                self.sampler.load(tensors, alpha=self.policy.alpha)
            except EngineLost as error:
                failure = error
        for _ in tensors:  # the ranks gather them together, whoever wants them
            pass
        return [error for error in ranks.gather(failure) if error is not None]

    def _restored(self, kept: dict[str, Any], version: int, phases: Phases) -> Draw:
        """A draw from a checkpoint of a policy of this version, dealt to the ranks that there are now."""
        draw = Draw(kept["step"], kept["version"], kept["positions"])
        self._encode(draw, draw.positions[-1] + 1, phases)
        answers = kept["answers"]
        found = [answers.get(str(item.position)) for item in draw.drawn]
        if self.policy.ranks.any(None in found):  # the sampler had gone before it answered them
            self._load(version, phases)
            draw.version = version
            draw.answers = self._begin(draw, phases)
        else:
            draw.answers.set_result([[Completion(**values) for values in group] for group in found if group])
        return draw


def _reason(failures: Sequence[EngineLost]) -> str:
    """Of all ranks', the one that says most."""
    return str(next((error for error in failures if not isinstance(error, WeightsLost)), failures[0]))


def _done(function: Callable[[], Any]) -> Future[Any]:
    """What a function returned or raised, as if a thread had run it."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except EngineLost as error:
        future.set_exception(error)
    return future
