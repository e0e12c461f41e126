"""Which of a step's completions are packed, and how they weigh: only those that were scored count."""

from types import SimpleNamespace

import pytest
import small_runs as runs
import torch

import geo_r1.train.grpo
from geo_r1.data import PromptEncoder, Sample, World, exemplars
from geo_r1.kernels import GRPOLossConfig
from geo_r1.models import EncodedPrompt, load_model
from geo_r1.rollout import Completion
from geo_r1.train.config import GRPOConfig
from geo_r1.train.distributed import Ranks
from geo_r1.train.grpo import Scored, _logp, _micro_batches, _update

engine = SimpleNamespace(
    ranks=Ranks(0, 1, torch.device("cpu")),
    recipe=SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=8)),
)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("max_tokens", [16384, 9])
def test_unscored_completions_do_not_dilute_the_loss(loss_type, max_tokens):
    prompt = EncodedPrompt("p", [1, 2, 3], torch.arange(3).expand(3, -1), [], None, ())
    group = [Completion([5] * length, [0.0] * length, True) for length in (4, 2, 6, 1)]
    valid = torch.tensor([[True, False, True, False]])
    scored = Scored([prompt], [group], torch.tensor([[1.0, 9.0, -1.0, 9.0]]), valid)
    config = GRPOConfig(steps=1, loss={"type": loss_type, "beta": 0.1}, optim={"max_tokens": max_tokens})
    micro_batches, plan = _micro_batches(engine, config, scored)
    assert len(micro_batches) == (1 if max_tokens > 9 else 2)
    assert plan.repeated_tokens == 3 * (len(micro_batches) - 1)
    weight = torch.cat([micro.weight for micro in micro_batches])
    advantage = torch.cat([micro.advantage for micro in micro_batches])
    assert weight.sum().item() == pytest.approx(1.0)
    assert (weight > 0).all() and advantage.abs().eq(1).all()


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"entropy_coef": 0.01}, {"entropy_coef": -0.01}])
def test_equal_rewards_are_packed_only_where_another_term_needs_them(options):
    prompts = [EncodedPrompt(name, [1, 2, 3], torch.arange(3).expand(3, -1), [], None, ()) for name in "pqr"]
    groups = [[Completion([g] * length, [0.0] * length, True) for length in (4, 2)] for g in range(3)]
    advantage = torch.tensor([[0.0, 0.0], [0.7, -0.7], [0.0, 1.0]])
    valid = torch.tensor([[True, True], [True, True], [False, True]])
    config = GRPOConfig(steps=1, loss={"type": "bnpo", **options})
    [micro], plan = _micro_batches(engine, config, Scored(prompts, groups, advantage, valid))
    kept = [*([] if not options else [(0, 4), (0, 2)]), (1, 4), (1, 2), (2, 2)]
    assert micro.batch.target.tolist() == [g for g, length in kept for _ in range(length)]
    assert micro.batch.layout.prompt_len == (3,) * len({g for g, _ in kept})
    assert plan.num_tokens == len(micro.batch.token_ids)
    assert micro.weight.tolist() == pytest.approx([1 / 14] * len(micro.weight))  # tokens of all that count
    nothing = Scored(prompts, groups, torch.zeros(3, 2), valid)
    assert len(_micro_batches(engine, config, nothing)[0]) == (1 if options else 0)


@pytest.fixture(scope="module")
def lab():
    vlm, tokenizer, image_processor = load_model(runs.SMALL["model.path"], torch.float64)
    return vlm, PromptEncoder(tokenizer, image_processor, vlm.model.config.image_token_id)


@pytest.mark.parametrize("pictures_matter", [True, False])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_leaving_out_equal_rewards_changes_no_gradient(lab, pictures_matter, policy, level, monkeypatch):
    """Pictures of a group that is left out: the tower's gradient is zero, as it would have been, not none."""
    vlm, encoder = lab
    samples = [exemplars.question(World(), "train", i) for i in range(2)]
    text = [{"role": "user", "content": [{"type": "text", "text": "north?"}]}]
    prompts = [encoder.encode(sample) for sample in (*samples, Sample("text", tuple(text), ()))]
    draw = torch.Generator().manual_seed(0)
    groups = [
        [Completion(torch.randint(7, 200, (n,), generator=draw).tolist(), [], True) for n in (5, 3, 4)]
        for _ in prompts
    ]
    advantage = torch.tensor([[0.0, 0.0, 0.0], [0.5 * pictures_matter] * 3, [0.9, 0.0, -1.3]])
    advantage[1] *= torch.tensor([1, -2, 1])
    scored = Scored(prompts, groups, advantage, torch.ones(3, 3, dtype=torch.bool))
    loss = {"policy": policy, "importance_sampling_level": level, "epsilon_high": 0.3}
    config = GRPOConfig(steps=1, num_iterations=2, loss=loss)
    context = SimpleNamespace(ranks=engine.ranks, recipe=engine.recipe, vlm=vlm)

    def gradients():
        micro_batches, plan = _micro_batches(context, config, scored)
        for micro in micro_batches:  # ratios on both sides of 1
            with torch.no_grad():
                logp = _logp(vlm, micro.batch, 1.0)
            micro.old_logp = logp + 0.3 * torch.sin(7 * logp)
        options = GRPOLossConfig(**config.loss.model_dump(exclude={"type"}))
        updater = SimpleNamespace(apply=lambda step: {})
        found = _update(context, options, scored, micro_batches, updater, 0)
        grads = {name: p.grad for name, p in vlm.model.named_parameters() if p.grad is not None}
        vlm.model.zero_grad(set_to_none=True)
        return plan.num_tokens, found["loss"], grads

    num_tokens, loss_value, grads = gradients()
    monkeypatch.setattr(geo_r1.train.grpo, "_contributing", lambda config, scored: scored.valid)
    all_tokens, expected_loss, expected = gradients()
    assert num_tokens < all_tokens
    assert loss_value == pytest.approx(expected_loss, rel=1e-9)
    assert grads.keys() == expected.keys()
    assert any(g.abs().max() > 0 for name, g in expected.items() if "visual" in name) == pictures_matter
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6 * grad.abs().max().item() + 1e-12)
