"""Figures of a GRPO step over all ranks: rewards, lengths, and means over the tokens of the loss."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from geo_r1.train.group import Group
from geo_r1.train.parallel.micro_batches import StepBatches
from geo_r1.train.parallel.ranks import Ranks

# By then some of the hundreds of completions of even a small run should have earned something.
FIRST_STEPS = 10
BEST = {"accuracy": 1.0, "format": 1.0, "repetition": 0.0, "overlong": 0.0}  # where no more can be learned


class TokenSums:
    """Sums over the tokens of a step, by name, which stay on the device until `means` reads them once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, counts_R: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Add a micro-batch.

        Args:
            loss: scalar.
            counts_R: [R] bool, the tokens to sum over.
            rows: [R] by the name of the metric; the largest is kept of a name that ends in /max.
        """
        rows = {"tokens": torch.ones_like(counts_R), **rows}
        parts = {name: torch.where(counts_R, row, 0).double() for name, row in rows.items()}
        found = {name: row.max() if name.endswith("/max") else row.sum() for name, row in parts.items()}
        found["loss"] = loss.double()
        for name, value in found.items():
            if name not in self._sums:
                self._sums[name] = value
            elif name.endswith("/max"):
                self._sums[name] = torch.maximum(self._sums[name], value)
            else:
                self._sums[name] = self._sums[name] + value

    def means(self) -> dict[str, float]:
        """The summed `loss`, and of each metric the mean (or the largest) over all ranks' tokens.

        Without tokens there is only the loss.
        """
        names = [*self._sums]
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        everyone = self.ranks.gather(dict(zip(names, values, strict=True)))
        found = {
            name: max(own[name] for own in everyone)
            if name.endswith("/max")
            else sum(own[name] for own in everyone)
            for name in names
        }
        loss, tokens = found.pop("loss", 0.0), found.pop("tokens", 0.0)
        if not tokens:
            return {"loss": loss}
        return {"loss": loss} | {
            name: value if name.endswith("/max") else value / tokens for name, value in found.items()
        }


def reward_metrics(ranks: Ranks, groups: list[Group]) -> dict[str, float]:
    """Rewards of all groups of the step, those that dynamic sampling left out among them."""
    everyone = [
        pair
        for pairs in ranks.gather([(group.reward, group.by_function, group.reward_std) for group in groups])
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


def idle_rewards(file: Path, functions: Collection[str], most: int | None = None) -> list[str]:
    """A line for each reward that has told no completion of a step from another, in any step of GRPO.

    Built-in rewards that stand at their best value are left out.

    Args:
        file: metrics.jsonl.
        most: only the first steps; all without it.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["stage"] == "grpo"][:most]
    found = []
    for name in functions:
        if any(row.get(f"rewards/{name}/std") for row in rows):
            continue
        means = {row[f"rewards/{name}/mean"] for row in rows if f"rewards/{name}/mean" in row}
        if means == {BEST.get(name)}:
            continue
        what = "the same for all completions of each step" if means else "None for every completion"
        if len(means) == 1:
            what = f"{means.pop():g} for every completion"
        found.append(f"warning: reward {name} was {what}, in {len(rows)} steps of GRPO: it teaches nothing")
    return found if rows else []


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


def staleness(ranks: Ranks, step: int, groups: list[Group]) -> float:
    """Mean number of updates between the weights that answered and those of a step, over its groups."""
    ages = [age for ages in ranks.gather([step - group.version for group in groups]) for age in ages]
    return statistics.fmean(ages) if ages else 0.0
