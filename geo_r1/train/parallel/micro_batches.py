"""A step's micro-batches: who computes which, as many on every rank, and something in each for all.

A prompt is encoded, and its completions sampled, on its home rank. The plan may move it, images and all, to
a rank that has less to do. Sharded weights are gathered by all ranks together, so none may sit a micro-batch
out: where a rank has nothing, or nothing with images, a placeholder of one small image and one token of
weight zero takes its place; its gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geo_r1.data.prompt import mrope_positions
from geo_r1.models import EncodedPrompt, PackedBatch, pack
from geo_r1.models.cost import ModelCost
from geo_r1.models.packed import to_device
from geo_r1.rollout import Completion
from geo_r1.train.group import Group
from geo_r1.train.parallel.plan import StepPlan, plan_step
from geo_r1.train.parallel.policy import Policy

# From the lengths of a batch's completions to the weight of each of their tokens, [R].
WeightsOf = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of a step, and the plan of all ranks.

    Attributes:
        num_tokens: tokens that this rank computes, placeholders left out.
    """

    micro_batches: list[PackedBatch]
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


def share_out(policy: Policy, groups: Sequence[Group], max_tokens: int, weights_of: WeightsOf) -> StepBatches:
    """Plan the micro-batches of all ranks, move groups to the ranks that compute them, and pack this rank's.

    Args:
        groups: this rank's, each with the completions that reach the gradient.
        max_tokens: the most tokens of a micro-batch.
        weights_of: completion lengths to the weight of each of their tokens [R].
    """
    ranks, config = policy.ranks, policy.vlm.model.config
    cost = ModelCost.of(config)
    sizes = [
        (len(group.prompt.token_ids), group.completion_len, group.prompt.image_grids) for group in groups
    ]
    everyone = [(rank, size) for rank, sizes in enumerate(ranks.gather(sizes)) for size in sizes]
    plan = plan_step(
        [prompt_len for _, (prompt_len, _, _) in everyone],
        [completion_len for _, (_, completion_len, _) in everyone],
        lambda prompt, lengths, group: cost.flops(prompt, lengths, everyone[group][1][2], backward=True),
        [home for home, _ in everyone],
        ranks.size,
        max_tokens,
    )
    first = sum(home < ranks.rank for home, _ in everyone)
    mine = {first + i: group for i, group in enumerate(groups)}
    moves = [(home, owner) for _, home, owner in plan.moved]
    outgoing = {
        i: replace(mine[g], sample=None)  # the other rank needs tokens and pixels only
        for i, (g, home, _) in enumerate(plan.moved)
        if home == ranks.rank
    }
    incoming = ranks.exchange(moves, outgoing)
    mine |= {plan.moved[i][0]: group for i, group in incoming.items()}

    batches = [[mine[g].part(indices) for g, indices in batch] for batch in plan.batches[ranks.rank]]
    num_tokens = sum(
        len(group.prompt.token_ids) + sum(group.completion_len) for batch in batches for group in batch
    )
    if policy.everyone and not batches:  # no rank has anything, and backward is collective all the same
        batches = [[]]
    fill = placeholder(config) if policy.everyone else None
    return StepBatches([_pack(batch, fill, weights_of, ranks.device) for batch in batches], plan, num_tokens)


def placeholder(config) -> Group:
    """A prompt of one image of one token, with one completion of one token."""
    vision, image = config.vision_config, config.image_token_id
    merge = vision.spatial_merge_size
    token_ids = [config.vision_start_token_id, image, config.vision_end_token_id]
    grids = ((1, merge, merge),)
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    positions = mrope_positions(token_ids, image, grids, merge)
    pixels = torch.zeros(merge**2, patch_size)
    prompt = EncodedPrompt("placeholder", token_ids, positions, [1], pixels, grids)
    return Group(None, prompt, [Completion(token_ids[:1], [0.0], True)], advantage_N=torch.zeros(1))


def _pack(
    groups: list[Group], fill: Group | None, weights_of: WeightsOf, device: torch.device
) -> PackedBatch:
    weight_R = weights_of([length for group in groups for length in group.completion_len])
    if fill is not None and not any(group.prompt.image_grids for group in groups):
        groups, weight_R = [*groups, fill], torch.cat([weight_R, weight_R.new_zeros(1)])
    completions = [completion for group in groups for completion in group.completions]
    batch = pack(
        [group.prompt for group in groups],
        [[completion.token_ids for completion in group.completions] for group in groups],
        device,
    )
    batch.token_weight_R = to_device(weight_R, device)
    batch.sequence_R = to_device(rows_of(torch.arange(len(completions)), batch.completion_len), device)
    advantages = [group.advantage_N for group in groups if group.advantage_N is not None]
    if len(advantages) == len(groups):
        batch.advantage_R = to_device(rows_of(torch.cat(advantages), batch.completion_len), device)
        logp = torch.tensor([logp for completion in completions for logp in completion.logp])
        batch.sampled_logp_R = to_device(logp, device)
    return batch


def rows_of(values_N: Tensor, completion_len: list[int]) -> Tensor:
    """Repeat one value a completion [N] over its tokens [R]."""
    return values_N.repeat_interleave(torch.tensor(completion_len, device=values_N.device))
