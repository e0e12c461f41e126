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
from geo_r1.models.packed import to_device
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
                metrics |= _update(engine, loss_config, scored, micro_batches, updater, step)
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


def _contributing(config: GRPOConfig, scored: Scored) -> Tensor:
    """[groups, M] bool: completions that reach the gradient.

    One that nothing scored weighs nothing. Without a KL or an entropy term a completion's advantage is a
    factor of its whole loss, whatever the policy term or the level of the ratio: where it is zero, so is the
    gradient.
    """
    if config.loss.beta or config.loss.entropy_coef:
        return scored.valid
    return scored.valid & (scored.advantage != 0)


def _micro_batches(engine: Engine, config: GRPOConfig, scored: Scored) -> tuple[list[MicroBatch], PackedPlan]:
    """Pack this rank's contributing completions under the token budget; weights count the whole step's.

    A group of which none contributes is left out with its prompt and pictures; there may be no batch at all.
    """
    device = engine.ranks.device
    rows = zip(scored.groups, scored.valid.tolist(), strict=True)
    valid_len = [
        len(c.token_ids)
        for group, valid in rows
        for c, is_valid in zip(group, valid, strict=True)
        if is_valid
    ]
    num_tokens, num_sequences = (max(n, 1) for n in engine.ranks.sum([sum(valid_len), len(valid_len)]))
    kept = [
        (prompt, [group[i].token_ids for i in indices], advantage_M[indices])
        for prompt, group, advantage_M, kept_M in zip(
            scored.prompts, scored.groups, scored.advantage, _contributing(config, scored), strict=True
        )
        if (indices := kept_M.nonzero()[:, 0].tolist())
    ]
    plan = plan_batches(
        [len(prompt.token_ids) for prompt, *_ in kept],
        [[len(tokens) for tokens in group] for _, group, _ in kept],
        config.optim.max_tokens,
    )
    micro_batches = []
    for pieces in plan.batches:
        batch = pack(
            [kept[g][0] for g, _ in pieces],
            [[kept[g][1][i] for i in indices] for g, indices in pieces],
            device,
        )
        advantage = torch.cat([kept[g][2][list(indices)] for g, indices in pieces])
        weight = token_weights(
            batch.completion_len,
            config.loss.type,
            num_items=num_tokens if config.loss.type in ("bnpo", "dapo") else num_sequences,
            max_completion_length=engine.recipe.rollout.max_new_tokens,
        )
        sequence = torch.arange(len(batch.completion_len))
        micro_batches.append(
            MicroBatch(
                batch,
                to_device(rows_of(advantage, batch.completion_len), device),
                to_device(weight, device),
                to_device(rows_of(sequence, batch.completion_len), device),
            )
        )
    return micro_batches, plan


def _update(
    engine: Engine,
    config: GRPOLossConfig,
    scored: Scored,
    micro_batches: list[MicroBatch],
    updater: Updater,
    step: int,
) -> dict[str, float]:
    """One optimiser step over all micro-batches.

    Entropy, KL and clipping are means over the tokens in them, the whole step's: those of completions that
    reach the gradient (see `_contributing`). Where there are none, there are no means.
    """
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
        low = out.clipped_R & (micro.advantage < 0)
        high = out.clipped_R & (micro.advantage > 0)
        columns = (torch.ones_like(low), out.entropy_R, out.kl_R, out.clipped_R, low, high)
        sums += torch.stack([out.loss.detach().double(), *(column.sum().double() for column in columns)])
    _zero_gradients_of_the_rest(engine.vlm, scored)
    loss, tokens, *totals = engine.ranks.sum(sums.tolist())
    names = ("entropy", "kl", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")
    means = {name: total / tokens for name, total in zip(names, totals, strict=True) if tokens}
    if config.beta == 0:
        means.pop("kl", None)
    return {"loss": loss, **means, **updater.apply(step)}


def _zero_gradients_of_the_rest(vlm: PackedVLM, scored: Scored) -> None:
    """Completions that were left out have gradients of zero, not none: Adam's averages decay all the same."""
    if not scored.groups:
        return
    parts = [vlm.model.model.language_model, vlm.model.lm_head]
    if any(prompt.pixel_values is not None for prompt in scored.prompts):
        parts.append(vlm.model.model.visual)
    for parameter in (p for part in parts for p in part.parameters()):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _token_metrics(engine: Engine, scored: Scored, plan: PackedPlan) -> dict[str, float]:
    """Lengths of the step's completions, and what its update computed of them, in tokens.

    A step that pads every completion and its own copy of the prompt to the longest ones would compute
    tokens/computed + saved_by_sharing + saved_by_packing + dropped_zero_advantage.
    """
    pairs = [(len(c.token_ids), c.ended) for group in scored.groups for c in group]
    prompt_len = [len(p.token_ids) for p in scored.prompts]
    copies = sum(length * len(group) for length, group in zip(prompt_len, scored.groups, strict=True))
    packed = sum(len(indices) for batch in plan.batches for _, indices in batch)
    own = (len(pairs) - packed, plan.num_tokens, plan.repeated_tokens)
    everyone = engine.ranks.gather((pairs, prompt_len, copies, *own))
    lengths = [length for pairs, *_ in everyone for length, _ in pairs]
    ended = [length for pairs, *_ in everyone for length, done in pairs if done]
    longest_prompt = max(length for _, prompt_len, *_ in everyone for length in prompt_len)
    unshared = sum(lengths) + sum(copies for _, _, copies, *_ in everyone)
    dropped, computed, repeated = (sum(counts) for counts in list(zip(*everyone, strict=True))[3:])
    # left out: completions that do not reach the gradient, and the prompts of groups that have no others
    left_out = sum(lengths) + sum(sum(prompt_len) for _, prompt_len, *_ in everyone) - (computed - repeated)
    metrics = {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended) if ended else 0.0,
        "num_tokens": sum(lengths),
        "completions/dropped_zero_advantage": dropped,
        "tokens/dropped_zero_advantage": left_out,
        "tokens/computed": computed,
        "tokens/saved_by_sharing": unshared - left_out - computed,
        "tokens/saved_by_packing": len(lengths) * (longest_prompt + max(lengths)) - unshared,
        "tokens/repeated_prompt": repeated,
    }
    return {name: float(value) for name, value in metrics.items()}


def _logp(vlm: PackedVLM, batch: PackedBatch, temperature: float) -> Tensor:
    return linear_logprob(vlm.loss_rows(batch), vlm.lm_head, batch.target, temperature=temperature)[0]


def _frozen_copy(vlm: PackedVLM) -> PackedVLM:
    frozen = copy.deepcopy(vlm)
    frozen.model.requires_grad_(False).eval()
    return frozen
