"""Group relative policy optimisation: sample a group a prompt, score it against itself, update.

Source: GRPO, arXiv:2402.03300; its variants as in TRL, whose metric names these are.
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from geo_r1.data.loader import PromptLoader
from geo_r1.data.source import Source
from geo_r1.kernels import (
    GRPOLossConfig,
    group_advantage,
    linear_grpo_loss,
    linear_logprob,
    token_weights,
)
from geo_r1.models import PackedBatch, PackedVLM
from geo_r1.models.lora import adapters_off
from geo_r1.train.context import RunContext
from geo_r1.train.parallel.micro_batches import MicroBatch, StepBatches, Work, share_out
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import GRPOConfig, Recipe
from geo_r1.train.report.log import Phases
from geo_r1.train.report.transcripts import write_transcripts
from geo_r1.train.rl.groups import (
    Group,
    GroupCollector,
    reward_metrics,
    staleness,
    token_metrics,
    transcripts,
)
from geo_r1.train.rl.mismatch import (
    check_mismatch,
    differences,
    importance_metrics,
    importance_weights,
    mismatch_metrics,
)
from geo_r1.train.rl.rollout_engines import open_rollout_queue
from geo_r1.train.stages.loop import Validate, run_stage
from geo_r1.train.updater import Updater


def run_grpo(
    context: RunContext,
    policy: Policy,
    reference: Policy | None,
    config: GRPOConfig,
    source: Source,
    validate: Validate,
) -> None:
    """Run the GRPO stage to its end.

    Args:
        reference: what the KL is measured against; None where there is no KL, or where it is the policy
            without its adapters.

    Raises:
        ValueError: a reward is unknown or fails, or a group does not fit the token budget; names it.
    """
    num_steps = source.num_steps(config.steps, config.epochs, config.prompts_per_step)
    recipe = context.recipe
    loss_config = loss_config_of(recipe)
    temperature = recipe.rollout.temperature
    moves = reference is not None and config.reference.sync_steps > 0
    corrects = recipe.rollout.importance_sampling != "none"

    def step(updater: Updater, phases: Phases) -> tuple[dict[str, float], int]:
        sampled, kept = sampler.sample(updater, phases)
        metrics = reward_metrics(context.ranks, sampled)
        num_kept, num_sampled, num_skipped = context.ranks.sum([len(kept), len(sampled), sampler.num_skipped])
        if config.max_resamples:
            metrics |= {"sampling/kept_groups": num_kept, "sampling/groups": num_sampled}
        if num_skipped:
            metrics["num_skipped"] = num_skipped
        if recipe.rollout.max_staleness:
            metrics["sampling/staleness"] = staleness(context.ranks, updater.progress.step, sampled)
        with phases("plan"):
            advantages = _advantages(context, config, kept)
            work = _work(config, kept, advantages)
            batches = share_out(policy, work, config.optim.max_tokens, _weights(context, config, kept))
        with phases("reference"):
            for micro in batches.micro_batches:
                if reference is not None:
                    micro.ref_logp = reference.run(_logp, micro.batch, temperature)
                elif config.loss.beta:
                    micro.ref_logp = policy.run(_logp_without_adapters, micro.batch, temperature)
                if config.num_iterations > 1 or corrects:
                    micro.old_logp = policy.run(_logp, micro.batch, temperature)
                if corrects:
                    micro.importance = importance_weights(micro, recipe.rollout)
                if config.num_iterations == 1:  # the ratio is 1
                    micro.old_logp = None
        if corrects:
            metrics |= importance_metrics(context.ranks, batches.micro_batches, recipe.rollout)
        with phases("update"):
            for iteration in range(config.num_iterations):
                metrics |= _update(policy, loss_config, batches, updater, iteration == 0)
        if moves and (updater.progress.step + 1) % config.reference.sync_steps == 0:
            assert reference is not None
            with phases("reference"):
                reference.move_towards(policy, config.reference.sync_share)
        number, every = updater.progress.step + 1, recipe.log.rollouts_every
        if every and (number == 1 or number % every == 0):
            of = {group.position: own for group, own in zip(kept, advantages, strict=True)}
            write_transcripts(context.run_dir, "grpo", number, transcripts(context, sampled, of))
        metrics |= token_metrics(context.ranks, kept, batches) | batches.figures
        return metrics, batches.num_tokens * config.num_iterations

    with (
        PromptLoader.of(recipe.data, source, context.encoder, recipe.run.seed) as loader,
        closing(open_rollout_queue(context, policy, config, loader, num_steps)) as rollouts,
    ):
        sampler = GroupCollector(context, config, rollouts)
        run_stage(
            context,
            "grpo",
            policy,
            config,
            config.optim,
            num_steps,
            step,
            "reward",
            validate=validate,
            reference=reference if moves else None,
            pending=rollouts.state,
        )


def loss_config_of(recipe: Recipe) -> GRPOLossConfig:
    """The token loss that a recipe asks for; raises ValueError if its options do not go together."""
    return GRPOLossConfig(
        **recipe.grpo.loss.model_dump(exclude={"type"}), temperature=recipe.rollout.temperature
    )


def _counted(config: GRPOConfig, group: Group) -> list[bool]:
    """Which completions count in the loss: scored ones, and whole ones where truncated ones are masked."""
    return [
        reward is not None and (completion.ended or not config.mask_truncated)
        for completion, reward in zip(group.completions, group.reward, strict=True)
    ]


def _advantages(context: RunContext, config: GRPOConfig, kept: list[Group]) -> list[list[float]]:
    """Of this rank's groups, a number a completion; by batch they are those of all ranks together."""
    shared = context.ranks.gather([group.reward for group in kept])
    rewards = [reward for groups in shared for reward in groups]
    flat = [value for reward in rewards for value in reward]
    advantage = group_advantage(
        torch.tensor([value or 0.0 for value in flat], dtype=torch.float32),
        torch.arange(0, len(flat) + 1, config.num_completions, dtype=torch.int32),
        valid_N=torch.tensor([value is not None for value in flat], dtype=torch.bool),
        baseline=config.advantage.baseline,
        scale=config.advantage.scale,
        eps=config.advantage.eps,
    )
    first = sum(map(len, shared[: context.ranks.rank]))
    return advantage.view(-1, config.num_completions)[first : first + len(kept)].tolist()


def _work(config: GRPOConfig, kept: list[Group], advantages: list[list[float]]) -> list[Work]:
    """This rank's groups with the completions that reach the gradient, and their advantages.

    One that does not count weighs nothing. Without a KL or an entropy term a completion's advantage is a
    factor of its whole loss, whatever the policy term or the level of the ratio: where it is zero, so is the
    gradient. A group of which none contributes is left out with its prompt and pictures.
    """
    always = bool(config.loss.beta or config.loss.entropy_coef)
    work = []
    for group, own in zip(kept, advantages, strict=True):
        indices = [
            i
            for i, (counts, value) in enumerate(zip(_counted(config, group), own, strict=True))
            if counts and (value or always)
        ]
        if indices:
            completions = [completion.token_ids for completion in group.completions]
            sampled_logp = [completion.logp for completion in group.completions]
            work.append(Work(group.prompt, completions, own, sampled_logp).part(indices))
    return work


def _weights(context: RunContext, config: GRPOConfig, kept: list[Group]):
    """Completion lengths to token weights; the averages are over the whole step, on all ranks."""
    lengths = [
        len(completion.token_ids)
        for group in kept
        for completion, counts in zip(group.completions, _counted(config, group), strict=True)
        if counts
    ]
    num_tokens, num_sequences = (max(n, 1) for n in context.ranks.sum([sum(lengths), len(lengths)]))
    return lambda completion_len: token_weights(
        completion_len,
        config.loss.type,
        num_items=num_tokens if config.loss.type in ("bnpo", "dapo") else num_sequences,
        max_completion_length=context.recipe.rollout.max_new_tokens,
    )


def _update(
    policy: Policy, config: GRPOLossConfig, batches: StepBatches, updater: Updater, first: bool
) -> dict[str, float]:
    """One optimiser step over all micro-batches.

    Entropy, KL, clipping and what the sampler differs by are means over the tokens in them, the whole step's:
    those of completions that reach the gradient (see `_work`). Where there are none, there are no means.

    Args:
        first: whether the policy is still the one whose log-probabilities the sampler's are compared with.

    Raises:
        ValueError: the sampler differs by more than `rollout.max_mismatch`.
    """
    ranks = policy.ranks
    sums = torch.zeros(7, dtype=torch.float64, device=ranks.device)  # read once, at the end
    apart = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    largest = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, micro in enumerate(batches.micro_batches):
        last = index + 1 == len(batches.micro_batches)
        part, columns, differs, most = policy.learn(_loss, micro, config, last=last)
        sums += torch.cat([part.double().reshape(1), columns])
        apart += differs
        largest = torch.maximum(largest, most)
    loss, tokens, *totals = ranks.sum(sums.tolist())
    names = ("entropy", "kl", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")
    means = {name: total / tokens for name, total in zip(names, totals, strict=True) if tokens}
    if config.beta == 0:
        means.pop("kl", None)
    if first and tokens:
        means |= mismatch_metrics(ranks, tokens, apart, largest)
        check_mismatch(updater.progress.step + 1, means, updater.context.recipe.rollout.max_mismatch)
    return {"loss": loss, **means, **updater.apply(loss, batches.micro_batches)}


def _loss(vlm: PackedVLM, micro: MicroBatch, config: GRPOLossConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and float64 figures of its rows that count.

    [6] sums: how many, entropy, KL, clipped, clipped low and high; what `differences` returns.
    """
    out = linear_grpo_loss(
        vlm.loss_rows(micro.batch),
        vlm.lm_head,
        micro.batch.target,
        micro.advantage,
        micro.weight,
        old_logp_R=micro.old_logp,
        ref_logp_R=micro.ref_logp,
        importance_weight_R=micro.importance,
        sequence_R=micro.sequence,
        config=config,
    )
    counts = micro.weight != 0
    low = out.clipped_R & (micro.advantage < 0)
    high = out.clipped_R & (micro.advantage > 0)
    columns = (torch.ones_like(low), out.entropy_R, out.kl_R, out.clipped_R, low, high)
    sums = torch.stack([torch.where(counts, column, 0).double().sum() for column in columns])
    assert micro.sampled_logp is not None
    return out.loss, sums, *differences(out.logp_R, micro.sampled_logp, counts)


def _logp(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    return linear_logprob(vlm.loss_rows(batch), vlm.lm_head, batch.target, temperature=temperature)[0]


def _logp_without_adapters(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    with adapters_off(vlm.model):
        return _logp(vlm, batch, temperature)
