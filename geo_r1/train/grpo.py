"""Group relative policy optimisation: sample a group a prompt, score it against itself, update.

Source: GRPO, arXiv:2402.03300; its variants as in TRL, whose metric names these are.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from geo_r1.data.source import Source
from geo_r1.kernels import (
    GRPOLossConfig,
    group_advantage,
    linear_grpo_loss,
    linear_logprob,
    token_weights,
)
from geo_r1.kernels.layout import PackedPlan, plan_batches
from geo_r1.models import EncodedPrompt, PackedBatch, PackedVLM, pack
from geo_r1.rewards import RewardTable
from geo_r1.rollout import Completion, SamplingConfig, generate, score_groups
from geo_r1.train.config import GRPOConfig, Recipe
from geo_r1.train.loop import Engine, Phases, Updater, load_rewards, rows_of, run_stage


@dataclass(frozen=True)
class Scored:
    """This rank's groups of one step, and the advantage of each of their completions."""

    prompts: list[EncodedPrompt]
    groups: list[list[Completion]]
    advantage: Tensor  # [groups, M] float32
    valid: Tensor  # [groups, M] bool: some reward function scored the completion


@dataclass
class MicroBatch:
    """One packed batch of completions with everything the loss takes, [R] a row."""

    batch: PackedBatch
    advantage: Tensor
    weight: Tensor
    sequence: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None


def run_grpo(engine: Engine, config: GRPOConfig, source: Source) -> None:
    """Run the GRPO stage to its end.

    Raises:
        ValueError: a reward is unknown or fails, or a group does not fit the token budget; names it.
    """
    num_steps = source.num_steps(config.steps, config.epochs, config.prompts_per_step)
    recipe = engine.recipe
    sampling = SamplingConfig(
        recipe.rollout.temperature, recipe.rollout.top_p, recipe.rollout.top_k, recipe.rollout.max_new_tokens
    )
    loss_config = loss_config_of(recipe)
    functions = load_rewards(recipe.rewards)
    reference = _frozen_copy(engine.vlm) if config.loss.beta > 0 else None

    def step(step: int, updater: Updater, phases: Phases) -> tuple[dict[str, float], int]:
        with phases("data"):
            first = step * config.prompts_per_step
            positions = [first + i for i in engine.ranks.share(config.prompts_per_step)]
            samples = [source.draw(position, recipe.run.seed) for position in positions]
            prompts = [engine.encoder.encode(sample) for sample in samples]
            for prompt in prompts:
                prompt.check_budget(sampling.max_new_tokens, recipe.rollout.max_tokens, "rollout.max_tokens")
                prompt.check_budget(sampling.max_new_tokens, config.optim.max_tokens, "grpo.optim.max_tokens")
        with phases("rollout"):
            groups = generate(
                engine.vlm,
                prompts,
                config.num_completions,
                sampling=sampling,
                eos_token_id={engine.tokenizer.eos_token_id, *engine.vlm.end_token_ids},
                streams=[f"{recipe.run.seed}/{position}" for position in positions],
                max_tokens=recipe.rollout.max_tokens,
            )
        with phases("reward"):
            rewards = RewardTable({name: [] for name in functions}, [])
            if groups:  # a rank may have none; a user's function need not expect that
                rewards = score_groups(functions, recipe.rewards.weights, engine.tokenizer, samples, groups)
            scored, metrics = _advantages(engine, config, prompts, groups, rewards)
        with phases("update"):
            micro_batches, plan = _micro_batches(engine, config, scored)
        with phases("reference"), torch.no_grad():
            for micro in micro_batches:
                if reference is not None:
                    micro.ref_logp = _logp(reference, micro.batch, sampling.temperature)
                if config.num_iterations > 1:
                    micro.old_logp = _logp(engine.vlm, micro.batch, sampling.temperature)
        with phases("update"):
            for _ in range(config.num_iterations):
                metrics |= _update(engine, loss_config, micro_batches, updater, step)
        metrics |= _token_metrics(engine, scored, plan)
        return metrics, plan.num_tokens * config.num_iterations

    run_stage(engine, "grpo", config.optim, num_steps, config.save_every, step, "reward")


def loss_config_of(recipe: Recipe) -> GRPOLossConfig:
    """The token loss that a recipe asks for; raises ValueError if its options do not go together."""
    return GRPOLossConfig(
        **recipe.grpo.loss.model_dump(exclude={"type"}), temperature=recipe.rollout.temperature
    )


def _advantages(
    engine: Engine,
    config: GRPOConfig,
    prompts: list[EncodedPrompt],
    groups: list[list[Completion]],
    rewards: RewardTable,
) -> tuple[Scored, dict[str, float]]:
    """Advantages over the whole step's groups, of which this rank keeps its own; and the reward metrics."""
    shared = engine.ranks.gather((rewards.total, rewards.per_function))
    total = [value for totals, _ in shared for value in totals]
    valid = torch.tensor([value is not None for value in total], dtype=torch.bool)
    reward = torch.tensor([value or 0.0 for value in total], dtype=torch.float32)
    boundaries = torch.arange(0, len(total) + 1, config.num_completions, dtype=torch.int32)
    advantage = group_advantage(
        reward,
        boundaries,
        valid_N=valid,
        baseline=config.advantage.baseline,
        scale=config.advantage.scale,
        eps=config.advantage.eps,
    )
    groups_of_M = zip(reward.split(config.num_completions), valid.split(config.num_completions), strict=True)
    scores = [values[counts] for values, counts in groups_of_M]
    spread = [s.std().item() if len(s) and s.amin() < s.amax() else 0.0 for s in scores]
    metrics = {
        "reward": reward[valid].mean().item() if valid.any() else 0.0,
        "reward_std": statistics.fmean(spread),
        "frac_reward_zero_std": statistics.fmean(value == 0 for value in spread),
    }
    for name in rewards.per_function:
        values = [value for _, table in shared for value in table[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    start = sum(len(totals) for totals, _ in shared[: engine.ranks.rank])
    mine = slice(start, start + len(rewards.total))
    shape = (len(groups), config.num_completions)
    return Scored(prompts, groups, advantage[mine].view(shape), valid[mine].view(shape)), metrics


def _micro_batches(engine: Engine, config: GRPOConfig, scored: Scored) -> tuple[list[MicroBatch], PackedPlan]:
    """Pack this rank's groups under the token budget; weights count the whole step's."""
    device = engine.ranks.device
    lengths = [[len(c.token_ids) for c in group] for group in scored.groups]
    scored_len = [
        length
        for group, kept in zip(lengths, scored.valid.tolist(), strict=True)
        for length, is_valid in zip(group, kept, strict=True)
        if is_valid
    ]
    num_tokens, num_sequences = (max(n, 1) for n in engine.ranks.sum([sum(scored_len), len(scored_len)]))
    plan = plan_batches([len(p.token_ids) for p in scored.prompts], lengths, config.optim.max_tokens)
    micro_batches = []
    for pieces in plan.batches:
        batch = pack(
            [scored.prompts[group] for group, _ in pieces],
            [[scored.groups[group][i].token_ids for i in indices] for group, indices in pieces],
            device,
        )
        advantage = torch.cat([scored.advantage[group, list(indices)] for group, indices in pieces])
        valid = torch.cat([scored.valid[group, list(indices)] for group, indices in pieces])
        weight = token_weights(
            batch.completion_len,
            config.loss.type,
            num_items=num_tokens if config.loss.type in ("bnpo", "dapo") else num_sequences,
            max_completion_length=engine.recipe.rollout.max_new_tokens,
        )
        micro_batches.append(
            MicroBatch(
                batch,
                rows_of(advantage, batch.completion_len).to(device),
                (weight * rows_of(valid, batch.completion_len)).to(device),
                rows_of(torch.arange(len(batch.completion_len)), batch.completion_len).to(device),
            )
        )
    return micro_batches, plan


def _update(
    engine: Engine, config: GRPOLossConfig, micro_batches: list[MicroBatch], updater: Updater, step: int
) -> dict[str, float]:
    """One optimiser step over all micro-batches; metrics are means over the whole step's tokens."""
    sums = torch.zeros(7, dtype=torch.float64, device=engine.ranks.device)  # read once, at the end
    for micro in micro_batches:
        out = linear_grpo_loss(
            engine.vlm.loss_rows(micro.batch),
            engine.vlm.lm_head,
            micro.batch.target,
            micro.advantage,
            micro.weight,
            old_logp_R=micro.old_logp,
            ref_logp_R=micro.ref_logp,
            sequence_R=micro.sequence,
            config=config,
        )
        out.loss.backward()
        counted = micro.weight > 0
        low = out.clipped_R & (micro.advantage < 0)
        high = out.clipped_R & (micro.advantage > 0)
        columns = (out.entropy_R, out.kl_R, out.clipped_R, low, high)
        row_sums = [(column * counted).sum().double() for column in columns]
        sums += torch.stack([out.loss.detach().double(), counted.sum().double(), *row_sums])
    loss, tokens, *totals = engine.ranks.sum(sums.tolist())
    names = ("entropy", "kl", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")
    means = {name: total / max(tokens, 1) for name, total in zip(names, totals, strict=True)}
    if config.beta == 0:
        del means["kl"]
    return {"loss": loss, **means, **updater.apply(step)}


def _token_metrics(engine: Engine, scored: Scored, plan: PackedPlan) -> dict[str, float]:
    """Lengths of the step's completions, and the tokens that packing and sharing did not compute."""
    pairs = [(len(c.token_ids), c.ended) for group in scored.groups for c in group]
    prompt_len = [len(p.token_ids) for p in scored.prompts]
    copies = sum(length * len(group) for length, group in zip(prompt_len, scored.groups, strict=True))
    everyone = engine.ranks.gather((pairs, prompt_len, copies, plan.num_tokens, plan.repeated_tokens))
    lengths = [length for pairs, *_ in everyone for length, _ in pairs]
    ended = [length for pairs, *_ in everyone for length, done in pairs if done]
    longest_prompt = max(length for _, prompt_len, *_ in everyone for length in prompt_len)
    unshared = sum(lengths) + sum(copies for _, _, copies, _, _ in everyone)
    computed = sum(tokens for _, _, _, tokens, _ in everyone)
    metrics = {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended) if ended else 0.0,
        "num_tokens": sum(lengths),
        "tokens/computed": computed,
        "tokens/saved_by_sharing": unshared - computed,
        "tokens/saved_by_packing": len(lengths) * (longest_prompt + max(lengths)) - unshared,
        "tokens/repeated_prompt": sum(repeated for *_, repeated in everyone),
    }
    return {name: float(value) for name, value in metrics.items()}


def _logp(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    return linear_logprob(vlm.loss_rows(batch), vlm.lm_head, batch.target, temperature=temperature)[0]


def _frozen_copy(vlm: PackedVLM) -> PackedVLM:
    return PackedVLM(copy.deepcopy(vlm.model).requires_grad_(False).eval(), vlm.compute_dtype)
