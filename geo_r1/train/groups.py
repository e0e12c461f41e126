"""The groups of a GRPO step: prompts drawn, completions sampled and scored, those without signal replaced."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from geo_r1.data.loader import PromptLoader
from geo_r1.models import EncodedPrompt
from geo_r1.rewards import RewardFunction
from geo_r1.rollout import Completion, SamplingConfig, generate, score_groups
from geo_r1.train.config import GRPOConfig
from geo_r1.train.loop import Engine, Phases, Updater, load_rewards
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks


@dataclass(frozen=True)
class Group:
    """A prompt's completions and what they earn.

    Attributes:
        reward: the total of each completion; None where nothing scored it.
        by_function: the same of each reward function.
    """

    prompt: EncodedPrompt
    completions: list[Completion]
    reward: list[float | None]
    by_function: Mapping[str, list[float | None]]

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards; exactly 0 where they are equal: such a group teaches nothing."""
        scores = [value for value in self.reward if value is not None]
        return statistics.stdev(scores) if len(scores) > 1 and min(scores) < max(scores) else 0.0


class Sampler:
    """Draws prompts, samples their groups and scores them, until a step has what it needs."""

    def __init__(self, engine: Engine, policy: Policy, config: GRPOConfig, loader: PromptLoader) -> None:
        self.engine, self.policy, self.config, self.loader = engine, policy, config, loader
        rollout = engine.recipe.rollout
        self.sampling = SamplingConfig(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens
        )
        self.functions: dict[str, RewardFunction] = load_rewards(engine.recipe.rewards)
        self.num_skipped = 0  # prompts of this rank's in the last step that were too long

    def sample(self, updater: Updater, phases: Phases) -> tuple[list[Group], list[Group]]:
        """This rank's groups of a step: all that were sampled, and those that it learns from.

        With dynamic sampling, groups with equal rewards are replaced by those of the next prompts, as often
        as allowed; what then is missing stays missing.
        """
        wanted, progress, ranks = self.config.prompts_per_step, updater.progress, self.engine.ranks
        sampled: list[Group] = []
        kept: list[Group] = []
        missing = wanted
        self.num_skipped = 0
        for _ in range(1 + self.config.max_resamples):
            positions = [progress.drawn + i for i in ranks.share(missing)]
            progress.drawn += missing
            groups = self._groups(positions, [progress.drawn + i for i in ranks.share(wanted)], phases)
            sampled += groups
            kept += [group for group in groups if group.spread or not self.config.max_resamples]
            missing = wanted - round(ranks.sum([len(kept)])[0])
            if not missing:
                break
        return sampled, kept

    def _groups(self, positions: list[int], upcoming: list[int], phases: Phases) -> list[Group]:
        engine, recipe = self.engine, self.engine.recipe
        with phases("data"):
            drawn = [item for item in self.loader.load(positions, [upcoming]) if item is not None]
            self.num_skipped += len(positions) - len(drawn)
            prompts, samples = [item.prompt for item in drawn], [item.sample for item in drawn]
            for prompt in prompts:
                room = self.sampling.max_new_tokens
                prompt.check_budget(room, recipe.rollout.max_tokens, "rollout.max_tokens")
                prompt.check_budget(room, self.config.optim.max_tokens, "grpo.optim.max_tokens")
        with phases("rollout"), self.policy.whole() as vlm:
            groups = generate(
                vlm,
                prompts,
                self.config.num_completions,
                sampling=self.sampling,
                eos_token_id={engine.tokenizer.eos_token_id, *vlm.end_token_ids},
                streams=[f"{recipe.run.seed}/{item.position}" for item in drawn],
                max_tokens=recipe.rollout.max_tokens,
            )
        with phases("reward"):
            if not groups:  # a rank may have none; a user's function need not expect that
                return []
            table = score_groups(self.functions, recipe.rewards.weights, engine.tokenizer, samples, groups)
        size = self.config.num_completions
        parts = [slice(i * size, (i + 1) * size) for i in range(len(groups))]
        return [
            Group(
                prompt,
                completions,
                table.total[part],
                {name: values[part] for name, values in table.per_function.items()},
            )
            for prompt, completions, part in zip(prompts, groups, parts, strict=True)
        ]


def reward_metrics(ranks: Ranks, sampled: list[Group]) -> dict[str, float]:
    """Rewards of all groups of the step, those that dynamic sampling left out among them."""
    everyone = [
        pair
        for pairs in ranks.gather([(group.reward, group.by_function, group.spread) for group in sampled])
        for pair in pairs
    ]
    totals = [value for rewards, *_ in everyone for value in rewards if value is not None]
    spreads = [spread for *_, spread in everyone]
    metrics = {
        "reward": statistics.fmean(totals) if totals else 0.0,
        "reward_std": statistics.fmean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": statistics.fmean(s == 0 for s in spreads) if spreads else 0.0,
    }
    for name in everyone[0][1] if everyone else ():
        values = [value for _, table, _ in everyone for value in table[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    return metrics
