"""Packed with a shared prompt == each completion alone with its own prompt, by transformers itself."""

import copy
from dataclasses import replace

import pytest
import torch
from vlm_cases import (
    assert_equal_gradients,
    backward,
    gradients,
    mixed_groups,
    relative_error,
    rows_and_gradients,
)

from geo_r1.kernels import (
    GRPOLossConfig,
    linear_cross_entropy,
    linear_grpo_loss,
    packed_attention,
    token_weights,
)
from geo_r1.kernels.layout import plan_batches
from geo_r1.models import PackedVLM, pack

pytestmark = pytest.mark.usefixtures("in_float64")
TOLERANCE = 1e-12  # of the largest entry; measured 1e-14


@pytest.fixture(autouse=True)
def no_leftover_gradients(qwen2_5_vl, qwen2_vl, qwen3_vl):
    for lab in (qwen2_5_vl, qwen2_vl, qwen3_vl):
        lab.own.zero_grad(set_to_none=True)
        lab.packed.model.zero_grad(set_to_none=True)


def test_packed_equals_each_completion_alone_in_transformers(lab):
    prompts, completions = mixed_groups(lab)
    assert lab.own.model.language_model.config._attn_implementation == "sdpa"
    alone = [
        lab.own_rows(prompt, completion)
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
        if completion
    ]
    expected = torch.cat(alone)
    assert len(expected) == 23
    alone = {"rows": expected.detach(), **backward(expected, lab.own)}
    assert_equal_gradients(rows_and_gradients(lab.packed, (prompts, completions)), alone, TOLERANCE)


def test_packed_equals_one_group_a_completion(lab):
    prompts, completions = mixed_groups(lab)
    owner = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
    each = [[completion] for group in completions for completion in group]
    together = rows_and_gradients(lab.packed, (prompts, completions))
    assert_equal_gradients(together, rows_and_gradients(lab.packed, (owner, each)), TOLERANCE)


def test_the_order_of_groups_and_of_completions_does_not_matter(lab):
    prompts, completions = mixed_groups(lab)
    with torch.no_grad():
        rows = lab.packed.loss_rows(pack(prompts, completions))
        backwards = lab.packed.loss_rows(pack(prompts[::-1], [group[::-1] for group in completions[::-1]]))
    lengths = [len(completion) for group in completions for completion in group]
    pieces = torch.cat(backwards.split(lengths[::-1])[::-1])
    assert relative_error(pieces, rows) <= TOLERANCE


@pytest.mark.parametrize("frozen_vision", [False, True])
def test_gradient_checkpointing_changes_nothing(lab, frozen_vision):
    expected = rows_and_gradients(lab.packed, mixed_groups(lab))
    vlm = PackedVLM(copy.deepcopy(lab.own))
    visual = vlm.model.model.visual
    visual.requires_grad_(not frozen_vision)
    vlm.checkpoint_layers("full")
    vlm.model.train()
    calls = []
    visual.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = rows_and_gradients(vlm, mixed_groups(lab))
    assert len(calls) == (1 if frozen_vision else 2)  # run again in backward
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("model.visual") for name in trained) != frozen_vision
    assert_equal_gradients(found, {name: expected[name] for name in ("rows", *trained)}, TOLERANCE)


def test_computing_in_bfloat16_keeps_gradients_in_float32(lab):
    """Weights and gradients stay in float32; each gradient points where the float64 one does."""
    expected = rows_and_gradients(lab.packed, mixed_groups(lab))
    vlm = PackedVLM(copy.deepcopy(lab.own).to(torch.float32), torch.bfloat16)
    grads = rows_and_gradients(vlm, mixed_groups(lab))
    rows, expected_rows = grads.pop("rows"), expected.pop("rows")
    assert rows.dtype == torch.bfloat16 and vlm.lm_head.dtype == torch.float32
    assert (rows - expected_rows).norm() < 0.03 * expected_rows.norm()
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.2 * expected[name].norm(), name


def test_an_image_reaches_its_own_prompt_only(lab):
    a, b, c = (lab.prompt("before", (84, 56), "after", seed=seed) for seed in range(3))
    completions = [lab.tokens(2, 3, seed=seed) for seed in range(3)]
    swapped = [replace(a, pixel_values=b.pixel_values), replace(b, pixel_values=a.pixel_values), c]
    with torch.no_grad():
        before = lab.packed.loss_rows(pack([a, b, c], completions)).split(5)
        after = lab.packed.loss_rows(pack(swapped, completions)).split(5)
        a_with_b = torch.cat([lab.own_rows(swapped[0], completion) for completion in completions[0]])
    assert torch.equal(after[2], before[2])
    assert (after[0] - before[0]).abs().amax(1).min() > 1e-3
    assert (after[1] - before[1]).abs().amax(1).min() > 1e-3
    assert relative_error(after[0], a_with_b) <= TOLERANCE


def test_an_image_changes_no_hidden_state_before_it(lab):
    prompt = lab.prompt("before", (84, 56), "after")
    other = replace(prompt, pixel_values=prompt.pixel_values.flip(0))
    batches = [pack([p], [[]]) for p in (prompt, other)]
    with torch.no_grad():
        first, second = (
            lab.packed.hidden_states(
                batch, lambda _, q, k, v, scale, at=batch.layout: packed_attention(q, k, v, at, scale=scale)
            )
            for batch in batches
        )
    start = prompt.image_rows[0]
    assert torch.equal(first[:start], second[:start])
    assert (first[start:] - second[start:]).abs().amax(1).min() > 1e-3


def test_images_that_do_not_match_their_tokens_are_an_error(lab):
    prompt = lab.prompt((84, 56), "what?")
    short = replace(prompt, image_rows=prompt.image_rows[:-1])
    with pytest.raises(ValueError, match="5 image tokens but 6 encoded patches"):
        lab.packed.loss_rows(pack([short], [[[9]]]))
    with pytest.raises(ValueError, match="no prompts"):
        pack([], [])


def grpo(vlm, batch, rows):
    """A loss with ratios on both sides of 1, a reference and entropy; `rows` finds each row's numbers."""
    noise = torch.Generator().manual_seed(3)
    logp, ref = (0.3 * torch.randn(64, generator=noise, dtype=torch.float64) - 5 for _ in range(2))
    completion = torch.randn(64, generator=noise, dtype=torch.float64)
    weight = token_weights(batch.completion_len, "grpo", num_items=8)
    config = GRPOLossConfig(beta=0.05, entropy_coef=0.01, temperature=0.9)
    return linear_grpo_loss(
        vlm.loss_rows(batch),
        vlm.lm_head,
        batch.target_R,
        completion[rows],
        weight,
        old_logp_R=logp[rows],
        ref_logp_R=ref[rows],
        config=config,
    ).loss


def cross_entropy(vlm, batch, rows):
    weight = token_weights(batch.completion_len, "dapo", num_items=23)
    return linear_cross_entropy(vlm.loss_rows(batch), vlm.lm_head, batch.target_R, weight)


@pytest.mark.parametrize("loss_fn", [grpo, cross_entropy])
def test_micro_batches_and_sub_groups_change_no_gradient(qwen2_5_vl, loss_fn):
    """A step's loss is a sum over tokens, so how they are packed is only a matter of cost."""
    lab = qwen2_5_vl
    prompts, completions = mixed_groups(lab)
    prompt_len = [len(prompt.token_ids) for prompt in prompts]
    lengths = [[len(completion) for completion in group] for group in completions]
    ends = torch.tensor([length for group in lengths for length in group]).cumsum(0).tolist()
    first_row = iter([0, *ends])
    row_of = [[next(first_row) for _ in group] for group in lengths]  # each completion's first loss row

    def step(batches):
        total = 0.0
        for pieces in batches:
            chosen = [(group, index) for group, indices in pieces for index in indices]
            rows = [row_of[g][i] + t for g, i in chosen for t in range(lengths[g][i])]
            batch = pack(
                [prompts[g] for g, _ in pieces], [[completions[g][i] for i in ids] for g, ids in pieces]
            )
            loss = loss_fn(lab.packed, batch, rows)
            loss.backward()
            total += loss.item()
        return total, gradients(lab.packed.model)

    whole, tight = (
        plan_batches(prompt_len, lengths, max_tokens) for max_tokens in (10_000, prompt_len[2] + 5)
    )
    assert len(whole.batches) == 1 and whole.repeated_tokens == 0
    assert len(tight.batches) == 4 and tight.repeated_tokens == prompt_len[2]
    by_hand = [[(0, [4, 1]), (2, [0])], [(0, [0])], [(3, [0]), (0, [2, 3]), (2, [1])]]
    expected_loss, expected = step(whole.batches)
    for batches in (tight.batches, by_hand):
        loss, grads = step(batches)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert_equal_gradients(grads, expected, TOLERANCE)
