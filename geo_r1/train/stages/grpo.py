"""Group relative policy optimisation: sample a group for each prompt, score it against itself, update.

Source: GRPO, arXiv:2402.03300; its variants as in TRL, whose metric names these are.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields

import torch
from torch import Tensor

from geo_r1.data.source import Source
from geo_r1.errors import UserError
from geo_r1.kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    group_advantage,
    linear_grpo_loss,
    linear_logprob,
    token_weights,
)
from geo_r1.models import PackedBatch, PackedVLM
from geo_r1.models.lora import adapters_off
from geo_r1.train.context import RunContext
from geo_r1.train.group import Group
from geo_r1.train.parallel.micro_batches import StepBatches, share_out
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.sections import GRPOConfig, Recipe
from geo_r1.train.report.log import Phases
from geo_r1.train.rl.groups import GroupCollector, transcripts
from geo_r1.train.rl.metrics import (
    FIRST_STEPS,
    TokenSums,
    idle_rewards,
    reward_metrics,
    staleness,
    token_metrics,
)
from geo_r1.train.rl.mismatch import check_mismatch, differences, importance_metrics, importance_weights
from geo_r1.train.rl.rehearsal import has_answers, rehearse
from geo_r1.train.rl.rollout_engines import open_rollout_queue
from geo_r1.train.rl.scoring import Scorer
from geo_r1.train.sources import BadSamples
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
        reference: the model that the KL is measured against; None without a KL, or if the policy without its
            adapters is the reference.

    Raises:
        UserError: a reward function is unknown or fails, or a group does not fit the token budget.
    """
    num_steps = source.num_steps(config.steps, config.epochs, config.prompts_per_step)
    recipe, ranks = context.recipe, context.ranks
    loss_config = loss_config_of(recipe)
    temperature = recipe.rollout.temperature
    moves = reference is not None and config.reference.sync_steps > 0
    corrects = recipe.rollout.importance_sampling != "none"

    def warn(most: int | None = None) -> None:
        if ranks.is_main:
            used = [name for name in recipe.rewards.functions if recipe.rewards.weights.get(name, 1.0)]
            for line in idle_rewards(context.log.path, used, most):
                context.log.say(line)

    def step(updater: Updater, phases: Phases) -> tuple[dict[str, float], int]:
        if updater.progress.step == FIRST_STEPS:
            warn(FIRST_STEPS)
        sampled, kept = collector.collect(updater.progress, phases)
        metrics = reward_metrics(ranks, sampled)
        num_kept, num_sampled, num_skipped = ranks.sum([len(kept), len(sampled), collector.num_skipped])
        if config.max_resamples:
            metrics |= {"sampling/kept_groups": num_kept, "sampling/groups": num_sampled}
        if num_skipped:
            metrics |= {"num_skipped": num_skipped, "num_bad_samples": bad.count()}
        if recipe.rollout.max_staleness:
            metrics["sampling/staleness"] = staleness(ranks, updater.progress.step, sampled)
        with phases("plan"):
            set_advantages(ranks, config, kept)
            contributing = contributing_parts(config, kept)
            batches = share_out(
                policy, contributing, config.optim.max_tokens, _weights(context, config, kept)
            )
        with phases("reference"):
            for batch in batches.micro_batches:
                if reference is not None:
                    batch.ref_logp_R = reference.run(_logp, batch, temperature)
                elif config.loss.beta:
                    batch.ref_logp_R = policy.run(_logp_without_adapters, batch, temperature)
                if config.num_iterations > 1 or corrects:
                    batch.old_logp_R = policy.run(_logp, batch, temperature)
                if corrects:
                    batch.importance_weight_R = importance_weights(batch, recipe.rollout)
                if config.num_iterations == 1:  # the ratio is 1
                    batch.old_logp_R = None
        if corrects:
            metrics |= importance_metrics(ranks, batches.micro_batches, recipe.rollout)
        with phases("update"):
            for iteration in range(config.num_iterations):
                found = _learn(policy, loss_config, batches, first=iteration == 0)
                if iteration == 0:
                    check_mismatch(updater.progress.step + 1, found, recipe.rollout.max_mismatch)
                metrics |= found | updater.apply(found["loss"], batches.micro_batches)
        if moves and (updater.progress.step + 1) % config.reference.sync_steps == 0:
            assert reference is not None
            with phases("reference"):
                reference.move_towards(policy, config.reference.sync_share)
        number, every = updater.progress.step + 1, recipe.log.rollouts_every
        if every and (number == 1 or number % every == 0):
            context.log.rollouts("grpo", number, transcripts(context, sampled))
        metrics |= token_metrics(ranks, kept, batches) | batches.figures
        return metrics, batches.num_tokens * config.num_iterations

    with (
        closing(Scorer(context, has_answers(source))) as scorer,
        context.loader(source) as loader,
        closing(open_rollout_queue(context, policy, config, loader, num_steps)) as queue,
    ):
        with ranks.together():
            rehearse(context, source, scorer)
        collector = GroupCollector(context, config, queue, scorer)
        bad = BadSamples(recipe.data, ranks, source, loader)
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
            pending=queue.state,
        )
        if bad.found:
            context.log.say(f"grpo: {bad}")
    warn()  # again, where it is still on the screen when the run has ended


def loss_config_of(recipe: Recipe) -> GRPOLossConfig:
    """The token loss that a recipe asks for.

    Raises:
        UserError: its options contradict each other.
    """
    options = recipe.grpo.loss.model_dump(exclude={"type"})
    try:
        return GRPOLossConfig(**options, temperature=recipe.rollout.temperature)
    except ValueError as error:
        raise UserError(f"grpo.loss: {error}") from error


def _counted(config: GRPOConfig, group: Group) -> list[bool]:
    """Which completions count in the loss: scored ones, without truncated ones if `mask_truncated`."""
    return [
        reward is not None and (completion.ended or not config.mask_truncated)
        for completion, reward in zip(group.completions, group.reward, strict=True)
    ]


def set_advantages(ranks: Ranks, config: GRPOConfig, groups: list[Group]) -> None:
    """Score each completion of this rank's groups against the others of its group.

    The scale "batch" is over the groups of all ranks.
    """
    shared = ranks.gather([group.reward for group in groups])
    rewards = [reward for per_rank in shared for reward in per_rank]
    flat = [value for reward in rewards for value in reward]
    advantage_N = group_advantage(
        torch.tensor([value or 0.0 for value in flat], dtype=torch.float32),
        torch.arange(0, len(flat) + 1, config.num_completions, dtype=torch.int32),
        valid_N=torch.tensor([value is not None for value in flat], dtype=torch.bool),
        baseline=config.advantage.baseline,
        scale=config.advantage.scale,
        eps=config.advantage.eps,
    )
    first = sum(map(len, shared[: ranks.rank]))
    own = advantage_N.view(-1, config.num_completions)[first : first + len(groups)]
    for group, advantage in zip(groups, own, strict=True):
        group.advantage_N = advantage


def contributing_parts(config: GRPOConfig, groups: list[Group]) -> list[Group]:
    """Groups with only the completions that reach the gradient.

    A completion that does not count weighs nothing. Without a KL or an entropy term a completion's advantage
    is a factor of its whole loss, whatever the policy term or the level of the ratio: if it is zero, so is
    the gradient. A group of which none contributes is left out with its prompt and images.
    """
    always = bool(config.loss.beta or config.loss.entropy_coef)
    parts = []
    for group in groups:
        assert group.advantage_N is not None
        reaches = torch.tensor(_counted(config, group)) & (always | (group.advantage_N != 0))
        if reaches.any():
            parts.append(group.part(reaches.nonzero().flatten().tolist()))
    return parts


def _weights(context: RunContext, config: GRPOConfig, kept: list[Group]):
    """Completion lengths to token weights; the averages are over the whole step, on all ranks."""
    lengths = [
        length
        for group in kept
        for length, counts in zip(group.completion_len, _counted(config, group), strict=True)
        if counts
    ]
    num_tokens, num_sequences = (max(n, 1) for n in context.ranks.sum([sum(lengths), len(lengths)]))
    return lambda completion_len: token_weights(
        completion_len,
        config.loss.type,
        num_items=num_tokens if config.loss.type in ("bnpo", "dapo") else num_sequences,
        max_completion_length=context.recipe.rollout.max_new_tokens,
    )


def _learn(policy: Policy, config: GRPOLossConfig, batches: StepBatches, *, first: bool) -> dict[str, float]:
    """Add the gradients of all micro-batches; returns the loss and means over their tokens, of all ranks.

    The tokens are those of completions that reach the gradient (see `contributing_parts`). If there are none,
    there are no means.

    Args:
        first: True if the policy is still the one that the sampler's log-probabilities are compared with.
    """
    sums = TokenSums(policy.ranks)
    for index, batch in enumerate(batches.micro_batches):
        last = index + 1 == len(batches.micro_batches)
        out = GRPOLossOutput(*policy.learn(_loss, batch, config, last=last))
        assert batch.advantage_R is not None and batch.token_weight_R is not None
        sums.add(
            out.loss,
            batch.token_weight_R != 0,
            {
                "entropy": out.entropy_R,
                "kl": out.kl_R,
                "clip_ratio/region_mean": out.clipped_R,
                "clip_ratio/low_mean": out.clipped_R & (batch.advantage_R < 0),
                "clip_ratio/high_mean": out.clipped_R & (batch.advantage_R > 0),
                **(differences(out.logp_R, batch.sampled_logp_R) if first else {}),
            },
        )
    found = sums.means()
    if config.beta == 0:
        found.pop("kl", None)
    return found


def _loss(vlm: PackedVLM, batch: PackedBatch, config: GRPOLossConfig) -> tuple[Tensor, ...]:
    """The fields of a `GRPOLossOutput`, in order."""
    assert batch.advantage_R is not None and batch.token_weight_R is not None
    out = linear_grpo_loss(
        vlm.loss_rows(batch),
        vlm.lm_head,
        batch.target_R,
        batch.advantage_R,
        batch.token_weight_R,
        old_logp_R=batch.old_logp_R,
        ref_logp_R=batch.ref_logp_R,
        importance_weight_R=batch.importance_weight_R,
        sequence_R=batch.sequence_R,
        config=config,
    )
    return tuple(getattr(out, field.name) for field in fields(out))


def _logp(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    return linear_logprob(vlm.loss_rows(batch), vlm.lm_head, batch.target_R, temperature=temperature)[0]


def _logp_without_adapters(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    with adapters_off(vlm.model):
        return _logp(vlm, batch, temperature)
