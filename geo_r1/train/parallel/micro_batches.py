"""A step's micro-batches: who computes which, as many on every rank, and something in each for all.

A prompt is encoded, and its completions sampled, on its home rank. The plan may move it, pictures and all, to
a rank that has less to do. Sharded weights are gathered by all ranks together, so none may sit a micro-batch
out: where a rank has nothing, or nothing with pictures, a placeholder of one small picture and one token of
weight zero takes its place; its gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geo_r1.data.prompt import mrope_positions
from geo_r1.models import EncodedPrompt, PackedBatch, pack
from geo_r1.models.cost import ModelCost
from geo_r1.models.packed import to_device
from geo_r1.train.parallel.plan import StepPlan, plan_step
from geo_r1.train.parallel.policy import Policy

# The lengths of a batch's completions to the weight of each of their tokens, [R].
WeightsOf = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Work:
    """A prompt and those of its completions that reach the gradient.

    Attributes:
        completions: token ids of each.
        advantage: of each; 1 where there is no such thing.
        sampled_logp: of each token of each, under the distribution it was drawn from; empty where nothing was
            sampled.
    """

    prompt: EncodedPrompt
    completions: list[list[int]]
    advantage: list[float] = field(default_factory=list)
    sampled_logp: list[list[float]] = field(default_factory=list)

    def part(self, indices: Sequence[int]) -> Work:
        return Work(
            self.prompt,
            [self.completions[i] for i in indices],
            [self.advantage[i] for i in indices] if self.advantage else [],
            [self.sampled_logp[i] for i in indices] if self.sampled_logp else [],
        )


@dataclass
class MicroBatch:
    """One packed batch with what the losses take, [R] a row; rows of a placeholder weigh nothing."""

    batch: PackedBatch
    advantage: Tensor
    sequence: Tensor
    weight: Tensor
    sampled_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    importance: Tensor | None = None

    @property
    def record(self) -> dict[str, Tensor]:
        """What is needed to look at it again, on the host."""
        batch = self.batch
        tensors = {
            "token_ids": batch.token_ids,
            "position_ids": batch.position_ids,
            "image_rows": batch.image_rows,
            "image_grids": torch.tensor(batch.image_grids),
            "pixel_values": batch.pixel_values,
            "prompt_len": torch.tensor(batch.layout.prompt_len),
            "completion_len": torch.tensor(batch.completion_len),
            "target": batch.target,
            "advantage": self.advantage,
            "weight": self.weight,
            "sampled_logp": self.sampled_logp,
            "ref_logp": self.ref_logp,
            "old_logp": self.old_logp,
            "importance": self.importance,
        }
        return {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of a step, and the plan of all ranks.

    Attributes:
        num_tokens: tokens that this rank computes, placeholders left out.
    """

    micro_batches: list[MicroBatch]
    plan: StepPlan
    num_tokens: int

    @property
    def figures(self) -> dict[str, float]:
        """Of the step, over all ranks, for the log."""
        figures = {
            "num_micro_batches": self.plan.num_batches,
            "plan/teraflop": 1e-12 * sum(map(sum, self.plan.cost)),
            "plan/waiting": self.plan.waiting,
            "plan/moved_prompts": len(self.plan.moved),
        }
        return {name: float(value) for name, value in figures.items()}


def share_out(policy: Policy, work: Sequence[Work], max_tokens: int, weights: WeightsOf) -> StepBatches:
    """Plan the micro-batches of all ranks' work, move what another rank does, and pack this rank's.

    Args:
        work: this rank's, whose completions exist.
        max_tokens: the most tokens of a micro-batch.
        weights: completion lengths to the weight of each of their tokens [R].

    Raises:
        ValueError: a prompt with one completion is over `max_tokens`; names the sample.
    """
    ranks, device = policy.ranks, policy.ranks.device
    cost = ModelCost.of(policy.vlm.model.config)
    sizes = [(len(w.prompt.token_ids), [len(c) for c in w.completions], w.prompt.image_grids) for w in work]
    everyone = [(rank, size) for rank, sizes in enumerate(ranks.gather(sizes)) for size in sizes]
    plan = plan_step(
        [prompt for _, (prompt, _, _) in everyone],
        [completions for _, (_, completions, _) in everyone],
        lambda prompt, lengths, group: cost.flops(prompt, lengths, everyone[group][1][2], backward=True),
        [home for home, _ in everyone],
        ranks.size,
        max_tokens,
    )
    first = sum(home < ranks.rank for home, _ in everyone)
    mine = {first + i: w for i, w in enumerate(work)}
    moves = [(home, owner) for _, home, owner in plan.moved]
    outgoing = {i: mine[g] for i, (g, home, _) in enumerate(plan.moved) if home == ranks.rank}
    incoming = ranks.exchange(moves, outgoing)
    mine |= {plan.moved[i][0]: w for i, w in incoming.items()}

    pieces = [[mine[g].part(indices) for g, indices in batch] for batch in plan.batches[ranks.rank]]
    tokens = sum(len(w.prompt.token_ids) + sum(map(len, w.completions)) for batch in pieces for w in batch)
    if policy.everyone and not pieces:  # no rank has anything: engines want a backward all the same
        pieces = [[]]
    fill = placeholder(policy.vlm.model.config) if policy.everyone else None
    return StepBatches([_pack(batch, fill, weights, device) for batch in pieces], plan, tokens)


def placeholder(config) -> EncodedPrompt:
    """A prompt of one picture of one token."""
    vision, image = config.vision_config, config.image_token_id
    merge = vision.spatial_merge_size
    token_ids = [config.vision_start_token_id, image, config.vision_end_token_id]
    grids = ((1, merge, merge),)
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    positions = mrope_positions(token_ids, image, grids, merge)
    return EncodedPrompt("placeholder", token_ids, positions, [1], torch.zeros(merge**2, patch_size), grids)


def _pack(
    batch: Sequence[Work], fill: EncodedPrompt | None, weights: WeightsOf, device: torch.device
) -> MicroBatch:
    lengths = [len(c) for w in batch for c in w.completions]
    advantage = torch.tensor([a for w in batch for a in (w.advantage or [1.0] * len(w.completions))])
    weight = weights(lengths)
    sampled = torch.tensor([logp for w in batch for tokens in w.sampled_logp for logp in tokens])
    prompts, completions = [w.prompt for w in batch], [w.completions for w in batch]
    if fill is not None and not any(prompt.image_grids for prompt in prompts):
        prompts, completions = [*prompts, fill], [*completions, [[fill.token_ids[0]]]]
        lengths, weight = [*lengths, 1], torch.cat([weight, weight.new_zeros(1)])
        advantage, sampled = (torch.cat([rows, rows.new_zeros(1)]) for rows in (advantage, sampled))
    return MicroBatch(
        pack(prompts, completions, device),
        to_device(rows_of(advantage, lengths), device),
        to_device(rows_of(torch.arange(len(lengths)), lengths), device),
        to_device(weight, device),
        to_device(sampled, device) if len(sampled) == sum(lengths) else None,
    )


def rows_of(values_N: Tensor, completion_len: list[int]) -> Tensor:
    """Spread one value a completion [N] over its tokens [R]."""
    return values_N.repeat_interleave(torch.tensor(completion_len, device=values_N.device))
