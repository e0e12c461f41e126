"""Which of a step's completions are packed, and how they weigh: only those that were scored count."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import small_runs as runs
import torch

from geo_r1.data import PromptEncoder, Sample, World, exemplars
from geo_r1.kernels import GRPOLossConfig
from geo_r1.models import EncodedPrompt, load_model
from geo_r1.rollout import Completion
from geo_r1.train.group import Group
from geo_r1.train.parallel.micro_batches import share_out
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.parallel.strategy import shard_model
from geo_r1.train.recipe.run_sections import ParallelConfig
from geo_r1.train.recipe.sections import GRPOConfig
from geo_r1.train.stages.grpo import _learn, _logp, _weights, contributing_parts, set_advantages

context = SimpleNamespace(
    ranks=Ranks(0, 1, torch.device("cpu")),
    recipe=SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=8)),
)


@pytest.fixture(scope="module")
def lab():
    vlm, tokenizer, image_processor = load_model(runs.SMALL["model.path"], torch.float64)
    policy = shard_model(vlm, context.ranks, ParallelConfig())
    return policy, PromptEncoder(tokenizer, image_processor, vlm.model.config.image_token_id)


def group_of(prompt, completions, rewards):
    said = [Completion(ids, [0.0] * len(ids), True) for ids in completions]
    asked = ({"role": "user", "content": [{"type": "text", "text": "north?"}]},)
    return Group(Sample(prompt.sample_id, asked, ()), prompt, said, reward=rewards)


def text_prompt(name):
    return EncodedPrompt(name, [1, 2, 3], torch.arange(3).expand(3, -1), [], None, ())


def batches_of(policy, config, groups, parts=None):
    """The batches of a step: the completions that reach the gradient, or the given parts of groups."""
    if parts is None:
        set_advantages(context.ranks, config, groups)
        parts = contributing_parts(config, groups)
    return share_out(policy, parts, config.optim.max_tokens, _weights(context, config, groups))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("max_tokens", [16384, 9])
def test_unscored_completions_do_not_dilute_the_loss(loss_type, max_tokens, lab):
    group = group_of(text_prompt("p"), [[5] * length for length in (4, 2, 6, 1)], [3.0, None, 1.0, None])
    config = GRPOConfig(
        steps=1,
        num_completions=4,
        advantage={"scale": "none"},
        loss={"type": loss_type, "beta": 0.1},
        optim={"max_tokens": max_tokens},
    )
    batches = batches_of(lab[0], config, [group])
    assert len(batches.micro_batches) == (1 if max_tokens > 9 else 2)
    assert batches.plan.repeated_tokens == 3 * (len(batches.micro_batches) - 1)
    weight = torch.cat([batch.token_weight_R for batch in batches.micro_batches])
    advantage = torch.cat([batch.advantage_R for batch in batches.micro_batches])
    assert weight.sum().item() == pytest.approx(1.0)
    assert (weight > 0).all()
    assert sorted(advantage.tolist()) == [-1.0] * 6 + [1.0] * 4


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"entropy_coef": 0.01}, {"entropy_coef": -0.01}])
def test_equal_rewards_are_packed_only_where_another_term_needs_them(options, lab):
    lengths = (4, 2, 3)
    rewards = [[1.0, 1.0, 1.0], [1.0, 0.0, 0.5], [None, 0.0, 1.0]]
    groups = [
        group_of(text_prompt("pqr"[g]), [[g] * length for length in lengths], rewards[g]) for g in range(3)
    ]
    config = GRPOConfig(steps=1, num_completions=3, loss={"type": "bnpo", **options})
    batches = batches_of(lab[0], config, groups)
    [batch] = batches.micro_batches
    kept = [(1, 4), (1, 2), (2, 2), (2, 3)]
    if options:
        kept = [(0, 4), (0, 2), (0, 3), (1, 4), (1, 2), (1, 3), (2, 2), (2, 3)]
    assert batch.target_R.tolist() == [g for g, length in kept for _ in range(length)]
    assert batch.layout.prompt_len == (3,) * len({g for g, _ in kept})
    assert batches.num_tokens == batches.plan.num_tokens == len(batch.token_ids)
    assert batch.token_weight_R.tolist() == pytest.approx(
        [1 / 23] * len(batch.token_weight_R)
    )  # tokens of all that count
    for group in groups:
        group.reward[:] = [reward and 1.0 for reward in group.reward]
    groups[1].reward[1:] = [1.0, 1.0]
    groups[2].reward[1] = 1.0
    assert len(batches_of(lab[0], config, groups).micro_batches) == (1 if options else 0)


@pytest.mark.parametrize("images_matter", [True, False])
@pytest.mark.parametrize(
    ("policy", "level"),
    [
        *itertools.product(["clip", "cispo", "sapo"], ["token", "sequence"]),
        ("clip", "sequence_token"),
        ("vespo", "token"),
        ("geo_mean", "sequence"),
    ],
)
def test_leaving_out_equal_rewards_changes_no_gradient(lab, images_matter, policy, level):
    """Images of a group that is left out: the tower's gradient is zero, as it would have been, not none."""
    model, encoder = lab
    samples = [exemplars.question(World(), "train", i) for i in range(2)]
    text = [{"role": "user", "content": [{"type": "text", "text": "north?"}]}]
    prompts = [encoder.encode(sample) for sample in (*samples, Sample("text", tuple(text), ()))]
    draw = torch.Generator().manual_seed(0)
    middle = 0.5 * images_matter
    # of mean zero, so with nothing to scale them they are the advantages
    rewards = [[0.0, 0.0, 0.0], [middle, -2 * middle, middle], [1.25, 0.0, -1.25]]
    groups = [
        group_of(
            prompt, [torch.randint(7, 200, (n,), generator=draw).tolist() for n in (5, 3, 4)], rewards[i]
        )
        for i, prompt in enumerate(prompts)
    ]
    everything = [replace(group, advantage_N=torch.tensor(group.reward)) for group in groups]
    loss = {"policy": policy, "importance_sampling_level": level, "epsilon_high": 0.3}
    config = GRPOConfig(steps=1, num_completions=3, num_iterations=2, loss=loss, advantage={"scale": "none"})

    def gradients(parts):
        batches = batches_of(model, config, groups, parts)
        for batch in batches.micro_batches:  # ratios on both sides of 1
            logp = model.run(_logp, batch, 1.0)
            batch.old_logp_R = logp + 0.3 * torch.sin(7 * logp)
        options = GRPOLossConfig(**config.loss.model_dump(exclude={"type"}))
        grads = {}
        optimizer = SimpleNamespace(  # sees what any would; nothing is clipped
            step=lambda: grads.update({name: p.grad for name, p in model.vlm.model.named_parameters()}),
            zero_grad=lambda: model.vlm.model.zero_grad(set_to_none=True),
        )
        found = _learn(model, options, batches, first=False)
        found["grad_norm"] = model.update(optimizer, math.inf, True)
        return batches.plan.num_tokens, found, grads

    num_tokens, figures, grads = gradients(None)
    all_tokens, expected_figures, expected = gradients(everything)
    assert num_tokens < all_tokens
    for name in ("loss", "grad_norm"):
        assert figures[name] == pytest.approx(expected_figures[name], rel=1e-9)
    assert figures["grad_norm"] > 1e-3
    assert grads.keys() == expected.keys()
    assert any(g.abs().max() > 0 for name, g in expected.items() if "visual" in name) == images_matter
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6 * grad.abs().max().item() + 1e-12)
