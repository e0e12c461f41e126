"""The groups of a GRPO step: prompts drawn, completions sampled and scored, those without signal replaced."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from geo_r1.data import Sample
from geo_r1.models import EncodedPrompt
from geo_r1.rewards import RewardFunction
from geo_r1.rollout import Completion, score_groups
from geo_r1.rollout.engine import EngineLost
from geo_r1.train.context import RunContext
from geo_r1.train.parallel.micro_batches import StepBatches
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import GRPOConfig
from geo_r1.train.report.log import Phases
from geo_r1.train.report.transcripts import Transcript
from geo_r1.train.rl.rollout_queue import Draw, RolloutQueue
from geo_r1.train.rl.scoring import load_rewards
from geo_r1.train.updater import Updater


@dataclass(frozen=True)
class Group:
    """A prompt's completions and what they earn.

    Attributes:
        position: in the training order.
        reward: the total of each completion; None where nothing scored it.
        by_function: the same of each reward function.
        version: updates behind the weights that answered.
    """

    position: int
    sample: Sample
    prompt: EncodedPrompt
    completions: list[Completion]
    reward: list[float | None]
    by_function: Mapping[str, list[float | None]]
    version: int

    @property
    def reward_std(self) -> float:
        """Standard deviation of the rewards; exactly 0 where they are equal: such a group teaches nothing."""
        scores = [value for value in self.reward if value is not None]
        return statistics.stdev(scores) if len(scores) > 1 and min(scores) < max(scores) else 0.0


class GroupCollector:
    """Draws prompts, has them answered and scores the answers, until a step has what it needs."""

    def __init__(self, context: RunContext, config: GRPOConfig, rollouts: RolloutQueue) -> None:
        self.context, self.config, self.rollouts = context, config, rollouts
        self.functions: dict[str, RewardFunction] = load_rewards(context.recipe.rewards)
        self.num_skipped = 0  # prompts of this rank's in the last step that were too long

    def sample(self, updater: Updater, phases: Phases) -> tuple[list[Group], list[Group]]:
        """This rank's groups of a step: all that were sampled, and those that it learns from.

        With dynamic sampling, groups with equal rewards are replaced by those of the next prompts, as often
        as allowed; what then is missing stays missing.

        Raises:
            EngineLost: the sampler has gone; what the step had drawn besides is forgotten.
        """
        wanted, progress, ranks = self.config.prompts_per_step, updater.progress, self.context.ranks
        draw, answers = self.rollouts.take(progress, phases)
        sampled = self._scored(draw, answers, phases)
        self.num_skipped = draw.num_skipped
        kept = self._kept(sampled)
        first = progress.drawn
        try:
            for _ in range(self.config.max_resamples):
                missing = wanted - round(ranks.sum([len(kept)])[0])
                if not missing:
                    break
                draw, answers = self.rollouts.more(progress, missing, phases)
                groups = self._scored(draw, answers, phases)
                self.num_skipped += draw.num_skipped
                sampled += groups
                kept += self._kept(groups)
            self.rollouts.go_ahead(progress, phases)
        except EngineLost:
            progress.drawn = first
            raise
        return sampled, kept

    def _kept(self, groups: list[Group]) -> list[Group]:
        return [group for group in groups if group.reward_std or not self.config.max_resamples]

    def _scored(self, draw: Draw, answers: list[list[Completion]], phases: Phases) -> list[Group]:
        if not answers:  # a rank may have none; a user's function need not expect that
            return []
        samples = [item.sample for item in draw.drawn]
        with phases("reward"):
            weights, tokenizer = self.context.recipe.rewards.weights, self.context.tokenizer
            table = score_groups(self.functions, weights, tokenizer, samples, answers)
        size = self.config.num_completions
        parts = [slice(i * size, (i + 1) * size) for i in range(len(answers))]
        return [
            Group(
                item.position,
                item.sample,
                replace(item.prompt, pictures=()),
                completions,
                table.total[part],
                {name: values[part] for name, values in table.per_function.items()},
                draw.version,
            )
            for item, completions, part in zip(draw.drawn, answers, parts, strict=True)
        ]


def reward_metrics(ranks: Ranks, sampled: list[Group]) -> dict[str, float]:
    """Rewards of all groups of the step, those that dynamic sampling left out among them."""
    everyone = [
        pair
        for pairs in ranks.gather([(group.reward, group.by_function, group.reward_std) for group in sampled])
        for pair in pairs
    ]
    totals = [value for rewards, *_ in everyone for value in rewards if value is not None]
    stds = [std for *_, std in everyone]
    metrics = {
        "reward": statistics.fmean(totals) if totals else 0.0,
        "reward_std": statistics.fmean(stds) if stds else 0.0,
        "frac_reward_zero_std": statistics.fmean(s == 0 for s in stds) if stds else 0.0,
    }
    for name in everyone[0][1] if everyone else ():
        values = [value for _, table, _ in everyone for value in table[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    return metrics


def token_metrics(ranks: Ranks, kept: list[Group], batches: StepBatches) -> dict[str, float]:
    """Lengths of the step's completions, and what its update computed of them, in tokens.

    A step that pads every completion and its own copy of the prompt to the longest ones would compute
    tokens/computed + saved_by_sharing + saved_by_packing + dropped_zero_advantage.
    """
    pairs = [(len(c.token_ids), c.ended) for group in kept for c in group.completions]
    prompt_len = [len(group.prompt.token_ids) for group in kept]
    copies = sum(length * len(group.completions) for length, group in zip(prompt_len, kept, strict=True))
    everyone = ranks.gather((pairs, prompt_len, copies))
    lengths = [length for pairs, *_ in everyone for length, _ in pairs]
    if not lengths:
        return {}
    ended = [length for pairs, *_ in everyone for length, done in pairs if done]
    longest_prompt = max(length for _, prompt_len, _ in everyone for length in prompt_len)
    unshared = sum(lengths) + sum(copies for *_, copies in everyone)
    plan = batches.plan
    packed = sum(len(indices) for rank in plan.batches for batch in rank for _, indices in batch)
    # left out: completions that do not reach the gradient, and the prompts of groups that have no others
    needed = plan.num_tokens - plan.repeated_tokens
    left_out = sum(lengths) + sum(sum(prompt_len) for _, prompt_len, _ in everyone) - needed
    metrics = {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended) if ended else 0.0,
        "num_tokens": sum(lengths),
        "completions/dropped_zero_advantage": len(lengths) - packed,
        "tokens/dropped_zero_advantage": left_out,
        "tokens/computed": plan.num_tokens,
        "tokens/saved_by_sharing": unshared - left_out - plan.num_tokens,
        "tokens/saved_by_packing": len(lengths) * (longest_prompt + max(lengths)) - unshared,
        "tokens/repeated_prompt": plan.repeated_tokens,
    }
    return {name: float(value) for name, value in metrics.items()}


def transcripts(
    context: RunContext, sampled: list[Group], advantages: Mapping[int, list[float]]
) -> list[Transcript]:
    """What the first groups of a step say, for the main rank to keep; on the others, nothing.

    Args:
        advantages: by position; groups that dynamic sampling left out have none.
    """
    decode, count = context.tokenizer.decode, context.recipe.log.rollouts_prompts
    mine = [
        Transcript(
            group.position,
            group.sample,
            group.completions,
            [decode(c.token_ids, skip_special_tokens=True) for c in group.completions],
            group.reward,
            group.by_function,
            advantages.get(group.position),
        )
        for group in sampled[:count]
    ]
    everyone = [item for items in context.ranks.gather(mine) for item in items]
    return sorted(everyone, key=lambda item: item.position)[:count] if context.ranks.is_main else []


def staleness(ranks: Ranks, step: int, sampled: list[Group]) -> float:
    """Mean number of updates between the weights that answered and those of a step, over its groups."""
    ages = [age for ages in ranks.gather([step - group.version for group in sampled]) for age in ages]
    return statistics.fmean(ages) if ages else 0.0
