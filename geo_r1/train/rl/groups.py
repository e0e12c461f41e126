"""Collect the groups of a GRPO step: sampled, scored, and those that teach nothing replaced."""

from __future__ import annotations

from geo_r1.data.turn import completion_text
from geo_r1.errors import UserError
from geo_r1.rewards import RewardTable
from geo_r1.rollout.engine import EngineLost
from geo_r1.train.context import RunContext
from geo_r1.train.group import Group
from geo_r1.train.recipe.sections import GRPOConfig
from geo_r1.train.report.log import Phases
from geo_r1.train.report.transcripts import Transcript
from geo_r1.train.rl.rollout_queue import RolloutQueue
from geo_r1.train.rl.scoring import Scorer
from geo_r1.train.updater import Progress


class GroupCollector:
    """Takes sampled groups from the queue and scores them, until a step has enough.

    Attributes:
        num_skipped: prompts of this rank that the last step left out as too long or bad.
    """

    def __init__(self, context: RunContext, config: GRPOConfig, queue: RolloutQueue, scorer: Scorer) -> None:
        self.context, self.config, self.queue, self.scorer = context, config, queue, scorer
        self.num_skipped = 0

    def collect(self, progress: Progress, phases: Phases) -> tuple[list[Group], list[Group]]:
        """This rank's groups of a step: all that were sampled, and those that it learns from.

        With dynamic sampling, groups with equal rewards are replaced by those of the next prompts, at most
        `max_resamples` times; the step may then be short of groups.

        If it raises, prompts drawn beyond the step's own are given back.

        Raises:
            EngineLost: the rollout engine has gone; on every rank.
            UserError: a sample or a reward is wrong; on every rank.
        """
        sampled = self._scored(self.queue.take(progress, phases), phases)
        self.num_skipped = self.queue.num_skipped
        kept = self._kept(sampled)
        first = progress.drawn
        try:
            for _ in range(self.config.max_resamples):
                missing = self.config.prompts_per_step - round(self.context.ranks.sum([len(kept)])[0])
                if not missing:
                    break
                groups = self._scored(self.queue.more(progress, missing, phases), phases)
                self.num_skipped += self.queue.num_skipped
                sampled += groups
                kept += self._kept(groups)
            self.queue.go_ahead(progress, phases)
        except (EngineLost, UserError):
            progress.drawn = first
            raise
        return sampled, kept

    def _kept(self, groups: list[Group]) -> list[Group]:
        return [group for group in groups if group.reward_std or not self.config.max_resamples]

    def _scored(self, groups: list[Group], phases: Phases) -> list[Group]:
        samples = [group.sample for group in groups if group.sample is not None]
        completions = [group.completions for group in groups]
        table = RewardTable({}, [])
        with phases("reward"), self.context.ranks.together():
            if groups:  # a rank may have none, and a user's reward function need not expect that
                texts = [_texts(self.context, group) for group in groups]
                table = self.scorer.score(samples, completions, texts)
        first = 0
        for group in groups:
            part = slice(first, first + len(group.completions))
            group.reward = table.total[part]
            group.by_function = {name: values[part] for name, values in table.per_function.items()}
            first = part.stop
        return groups


def transcripts(context: RunContext, sampled: list[Group]) -> list[Transcript]:
    """Transcripts of the step's first groups, on the main rank; nothing on the others."""
    count = context.recipe.log.rollouts_prompts
    mine = [
        Transcript(
            group.position,
            group.sample,
            group.completions,
            _texts(context, group),
            group.reward,
            group.by_function,
            None if group.advantage_N is None else group.advantage_N.tolist(),
        )
        for group in sampled[:count]
        if group.sample is not None
    ]
    everyone = [item for items in context.ranks.gather(mine) for item in items]
    return sorted(everyone, key=lambda item: item.position)[:count] if context.ranks.is_main else []


def _texts(context: RunContext, group: Group) -> list[str]:
    opening = group.prompt.opening
    return [completion_text(context.tokenizer, opening, c.token_ids) for c in group.completions]
