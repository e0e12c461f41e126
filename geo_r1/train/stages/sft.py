"""Supervised fine-tuning on responses: the mean cross-entropy of a step's response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from geo_r1.data import Sample
from geo_r1.data.source import Source
from geo_r1.kernels import linear_cross_entropy
from geo_r1.models import EncodedPrompt, PackedBatch, PackedVLM
from geo_r1.rollout import Completion
from geo_r1.train.context import RunContext
from geo_r1.train.group import Group
from geo_r1.train.parallel.micro_batches import share_out
from geo_r1.train.parallel.policy import Policy
from geo_r1.train.recipe.sections import SFTConfig
from geo_r1.train.report.log import Phases
from geo_r1.train.sources import BadSamples
from geo_r1.train.stages.loop import Validate, run_stage
from geo_r1.train.updater import Updater


def run_sft(
    context: RunContext, stage: str, policy: Policy, config: SFTConfig, source: Source, validate: Validate
) -> None:
    """Run a supervised stage to its end.

    Raises:
        UserError: a sample does not fit the token budget.
    """
    ranks = context.ranks
    num_steps = source.num_steps(config.steps, config.epochs, config.batch_size)

    def response_of(sample: Sample, prompt: EncodedPrompt) -> Completion:
        assert sample.response is not None, sample.id  # checked where the data was opened
        return Completion(context.encoder.encode_response(sample.response, prompt.opening), [], True)

    def positions(first: int) -> list[int]:
        return [first + i for i in ranks.share(config.batch_size)]

    def step(updater: Updater, phases: Phases) -> tuple[dict[str, float], int]:
        progress = updater.progress
        first, following = progress.drawn, progress.drawn + config.batch_size
        with phases("data"), ranks.together():
            drawn = loader.load(positions(first), [positions(following)])
            groups = [
                Group(*item, [response_of(*item)], position)
                for position, item in zip(positions(first), drawn, strict=True)
                if item is not None
            ]
            option = f"{stage}.optim.max_tokens"
            for group in groups:
                group.prompt.check_budget(group.completion_len[0], config.optim.max_tokens, option)
        with phases("plan"):
            num_targets, num_samples = ranks.sum(
                [sum(group.completion_len[0] for group in groups), len(groups)]
            )
            weight = 1 / max(num_targets, 1)
            batches = share_out(
                policy, groups, config.optim.max_tokens, lambda lengths: torch.full((sum(lengths),), weight)
            )
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)  # read once, at the end
        with phases("update"):
            for index, batch in enumerate(batches.micro_batches):
                last = index + 1 == len(batches.micro_batches)
                [loss] = policy.learn(_loss, batch, last=last)
                loss_sum += loss
            [total] = ranks.sum([loss_sum.item()])
            metrics = {"loss": total, **updater.apply(total, batches.micro_batches)}
        metrics |= {"num_tokens": num_targets, **batches.figures}
        progress.drawn = following
        if num_samples < config.batch_size:
            metrics |= {"num_skipped": config.batch_size - num_samples, "num_bad_samples": bad.count()}
        return metrics, batches.num_tokens

    with context.loader(source) as loader:
        bad = BadSamples(context.recipe.data, ranks, source, loader)
        run_stage(context, stage, policy, config, config.optim, num_steps, step, "loss", validate=validate)
        if bad.found:
            context.log.say(f"{stage}: {bad}")


def _loss(vlm: PackedVLM, batch: PackedBatch) -> tuple[Tensor]:
    assert batch.token_weight_R is not None
    rows_RC = vlm.loss_rows(batch)
    return (linear_cross_entropy(rows_RC, vlm.lm_head, batch.target_R, batch.token_weight_R),)
