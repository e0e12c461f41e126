"""Supervised fine-tuning on responses: the mean cross-entropy of a step's response tokens."""

from __future__ import annotations

import torch

from geo_r1.data import Sample
from geo_r1.data.source import Source
from geo_r1.kernels import linear_cross_entropy
from geo_r1.kernels.layout import plan_batches
from geo_r1.models import pack
from geo_r1.train.config import SFTConfig
from geo_r1.train.loop import Engine, Phases, Updater, run_stage


def run_sft(engine: Engine, stage: str, config: SFTConfig, source: Source) -> None:
    """Run a supervised stage to its end.

    Raises:
        ValueError: a sample does not fit the token budget; names it.
    """
    num_steps = source.num_steps(config.steps, config.epochs, config.batch_size)
    seed = engine.recipe.run.seed

    def step(step: int, updater: Updater, phases: Phases) -> tuple[dict[str, float], int]:
        with phases("data"):
            positions = [step * config.batch_size + i for i in engine.ranks.share(config.batch_size)]
            samples = [source.draw(position, seed) for position in positions]
            prompts = [engine.encoder.encode(sample) for sample in samples]
            responses = [[engine.encoder.encode_response(_response(sample))] for sample in samples]
            lengths = [[len(response[0])] for response in responses]
            for prompt, [length] in zip(prompts, lengths, strict=True):
                prompt.check_budget(length, config.optim.max_tokens, f"{stage}.optim.max_tokens")
            plan = plan_batches([len(p.token_ids) for p in prompts], lengths, config.optim.max_tokens)
        [num_targets] = engine.ranks.sum([sum(length for [length] in lengths)])
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.ranks.device)  # read once, at the end
        with phases("update"):
            for groups in plan.batches:
                batch = pack(
                    [prompts[i] for i, _ in groups], [responses[i] for i, _ in groups], engine.ranks.device
                )
                weight = torch.full((len(batch.target),), 1 / num_targets, device=engine.ranks.device)
                loss = linear_cross_entropy(
                    engine.vlm.loss_rows(batch), engine.vlm.lm_head, batch.target, weight
                )
                loss.backward()
                loss_sum += loss.detach()
            [total] = engine.ranks.sum([loss_sum.item()])
            metrics = {"loss": total, **updater.apply(step)}
        return metrics | {"num_tokens": num_targets, "num_micro_batches": len(plan.batches)}, plan.num_tokens

    run_stage(engine, stage, config.optim, num_steps, config.save_every, step, "loss")


def _response(sample: Sample) -> str:
    assert sample.response is not None, sample.id  # checked where the data was opened
    return sample.response
