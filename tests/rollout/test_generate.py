"""Sampling says what transformers says, draws what the formula draws, and costs what is still being said."""

import copy
import math

import numpy as np
import pytest
import torch
from native_sampling import sample_natively
from vlm_cases import SIZES

from geo_r1.models import PackedVLM, pack
from geo_r1.rollout import SamplingConfig
from geo_r1.rollout.native.decoder import draw

NEVER = -1  # no token ends a completion


@pytest.fixture(scope="module")
def prompts(lab):
    """Ragged lengths, two of them twice, with 0, 1, 2 and 6 images."""
    six = [part for i, size in enumerate(SIZES) for part in (f"view {i}", size)]
    made = [
        lab.prompt("Which way is north?"),
        lab.prompt((84, 56), "What is this?", seed=1),
        lab.prompt(*six, "Which one?", seed=2),
        lab.prompt((84, 56), "What is this?", seed=3),
        lab.prompt("tower", (140, 112), (28, 28), seed=4),
        lab.prompt("Which way is tower?"),
    ]
    lengths = [len(prompt.token_ids) for prompt in made]
    assert lengths[1] == lengths[3] and len(set(lengths)) >= 4
    return made


def sampled(lab, prompts, num_completions=3, *, eos=NEVER, vlm=None, **options):
    options = {"max_new_tokens": 12} | options
    return sample_natively(vlm or lab.packed, prompts, num_completions, "7", eos, **options)


def tokens_of(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def test_greedy_equals_transformers_token_by_token(lab, prompts):
    own = copy.deepcopy(lab.own)
    got = sampled(lab, prompts, 1, temperature=0.0, max_new_tokens=24)
    distinct = set()
    for prompt, [completion] in zip(prompts, got, strict=True):
        inputs = lab.own_inputs(prompt)
        expected = own.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=lab.packed.vision_token_ids,
        )[0, len(prompt.token_ids) :].tolist()
        assert completion.token_ids == expected
        assert completion.logp == [0.0] * 24 and not completion.ended
        distinct |= set(expected)
    assert len(distinct) > 20  # the model does not say one thing only


def test_top_k_of_one_is_greedy(lab, prompts):
    greedy = sampled(lab, prompts, 2, temperature=0.0)
    narrow = sampled(lab, prompts, 2, top_k=1)
    assert tokens_of(narrow) == tokens_of(greedy)
    assert all(value == 0 for group in narrow for completion in group for value in completion.logp)
    assert all(first == second for first, second in tokens_of(greedy))


def test_the_same_stream_says_the_same_in_any_company(lab, prompts):
    names = [f"7/{i}" for i in range(len(prompts))]
    expected = tokens_of(sampled(lab, prompts, 4, streams=names))
    alone = [tokens_of(sampled(lab, [p], 4, streams=[n]))[0] for p, n in zip(prompts, names, strict=True)]
    assert alone == expected
    order = [3, 0, 5, 1, 4, 2]
    shuffled = sampled(lab, [prompts[i] for i in order], 4, streams=[names[i] for i in order])
    assert tokens_of(shuffled) == [expected[i] for i in order]
    largest = max(len(prompt.token_ids) for prompt in prompts)
    for max_tokens in (largest + 12, largest + 30):  # turns, groups split
        assert tokens_of(sampled(lab, prompts, 4, streams=names, max_tokens=max_tokens)) == expected
    more = tokens_of(sampled(lab, prompts, 8, streams=names))
    assert [group[:4] for group in more] == expected
    shorter = tokens_of(sampled(lab, prompts, 4, streams=names, max_new_tokens=5))
    assert shorter == [[tokens[:5] for tokens in group] for group in expected]


def test_every_stream_and_every_completion_draws_its_own(lab, prompts):
    first, second = (
        tokens_of(sampled(lab, prompts[:1] * 2, 4, streams=names)) for names in (["a", "b"], ["c", "a"])
    )
    assert first[0] == second[1]
    said = [tuple(tokens) for group in (*first, second[0]) for tokens in group]
    assert len(set(said)) == len(said) == 12


def test_vision_tokens_are_never_said(lab, prompts):
    model = copy.deepcopy(lab.own)
    model.lm_head.weight = torch.nn.Parameter(lab.own.lm_head.weight.detach().clone())
    direction = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vlm = PackedVLM(model)
    with torch.no_grad():  # whatever the hidden state, one of each pair has a huge logit
        model.lm_head.weight[vlm.vision_token_ids] = 1e3 * torch.cat([direction, -direction])
        hidden = vlm.loss_rows(pack(prompts, [[[9]]] * len(prompts)))
    assert set((hidden @ vlm.lm_head.T).argmax(1).tolist()) <= set(vlm.vision_token_ids)
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 50.0}):
        groups = sampled(lab, prompts, 3, vlm=vlm, **options)
        said = {token for group in tokens_of(groups) for tokens in group for token in tokens}
        assert said and not said & set(vlm.vision_token_ids)
        assert all(math.isfinite(value) for group in groups for c in group for value in c.logp)


def spy_on_rows(monkeypatch, vlm):
    """Rows of every pass through the text layers."""
    rows, run_text = [], vlm.run_text
    monkeypatch.setattr(
        vlm, "run_text", lambda embedded, *rest: rows.append(len(embedded)) or run_text(embedded, *rest)
    )
    return rows


@pytest.mark.parametrize("pick", [(0, 0, 0), (2, 1, 3), (4, 3, 7)])
def test_an_end_token_ends_a_completion_and_its_cost(lab, prompts, monkeypatch, pick):
    """With a token that the endless completions say as the end token, each is cut right after its first."""
    endless = sampled(lab, prompts, 4, temperature=0.8)
    group, index, step = pick
    eos = endless[group][index].token_ids[step]
    rows = spy_on_rows(monkeypatch, lab.packed)
    got = sampled(lab, prompts, 4, temperature=0.8, eos=eos)
    length = {}
    for g, (full_group, got_group) in enumerate(zip(endless, got, strict=True)):
        for i, (full, completion) in enumerate(zip(full_group, got_group, strict=True)):
            ended = eos in full.token_ids
            length[g, i] = full.token_ids.index(eos) + 1 if ended else 12
            assert completion.token_ids == full.token_ids[: length[g, i]]
            assert completion.logp == pytest.approx(full.logp[: length[g, i]], abs=1e-5)
            assert completion.ended == ended
    assert length[group, index] <= step + 1 and max(length.values()) == 12
    prefill = sum(len(prompt.token_ids) for prompt in prompts)
    # The last token of a completion is never run; one pass a step, over those that go on.
    assert rows == [prefill] + [sum(n > step + 1 for n in length.values()) for step in range(11)]


def test_all_ended_at_the_first_token_run_no_further(lab, prompts, monkeypatch):
    [[greedy]] = sampled(lab, prompts[:1], 1, temperature=0.0)
    rows = spy_on_rows(monkeypatch, lab.packed)
    [group] = sampled(lab, prompts[:1], 5, temperature=0.0, eos=greedy.token_ids[0])
    assert [c.token_ids for c in group] == [greedy.token_ids[:1]] * 5 and all(c.ended for c in group)
    assert rows == [len(prompts[0].token_ids)]


def test_an_end_token_at_the_very_limit_counts_as_an_end(lab, prompts):
    [[full]] = sampled(lab, prompts[:1], 1, max_new_tokens=6)
    first = full.token_ids.index(full.token_ids[5])
    [[ended]] = sampled(lab, prompts[:1], 1, max_new_tokens=first + 1, eos=full.token_ids[5])
    assert ended.ended and ended.token_ids == full.token_ids[: first + 1]
    [[cut]] = sampled(lab, prompts[:1], 1, max_new_tokens=1)
    assert not cut.ended and cut.token_ids == full.token_ids[:1]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(lab, prompts, training, monkeypatch):
    model = lab.packed.model
    seen, run_text = [], lab.packed.run_text
    monkeypatch.setattr(lab.packed, "run_text", lambda *args: seen.append(model.training) or run_text(*args))
    model.train(training)
    try:
        sampled(lab, prompts[:2], 2, max_new_tokens=2)
        assert model.training == training and seen == [False, False]
        monkeypatch.setattr(lab.packed, "run_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampled(lab, prompts[:2], 2)
        assert model.training == training
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


def test_nothing_to_say_and_too_much_to_hold(lab, prompts):
    assert sampled(lab, []) == []
    length = len(prompts[2].token_ids)
    assert len(sampled(lab, [prompts[2]], max_tokens=length + 12)[0]) == 3
    with pytest.raises(ValueError, match=rf"{length} tokens .*{length + 11}"):
        sampled(lab, prompts, max_tokens=length + 11)


@pytest.mark.parametrize(
    "options", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_sampling_config_says_what_it_needs(options):
    with pytest.raises(
        ValueError, match=rf"temperature >= 0, 0 < top_p <= 1.* got .*{next(iter(options.values()))}"
    ):
        SamplingConfig(**options)


def written_out(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one row after temperature, then top-k, then top-p, by the book."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6), (1, 1.0), (500, 1e-9)])
def test_draw_follows_the_written_out_distribution(temperature, top_k, top_p):
    """With uniforms on a grid, each token is drawn its probability's share of times, to within one."""
    draws, vocab = 4000, 40
    for seed in range(3):
        logits = 2 * np.random.default_rng(seed).standard_normal(vocab)
        logits[[3, 11]] = -np.inf  # vision tokens
        expected = written_out(logits, temperature, top_k, top_p)
        uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
        rows = torch.tensor(logits, dtype=torch.float32).expand(draws, -1)
        token, logp = draw(rows, uniform, SamplingConfig(temperature, top_p, top_k))
        count = np.bincount(token.numpy(), minlength=vocab)
        assert np.abs(count - draws * expected).max() <= 1.001
        assert set(np.flatnonzero(count)) <= set(np.flatnonzero(expected))
        np.testing.assert_allclose(logp.numpy(), np.log(expected[token.numpy()]), atol=2e-5)


def test_draw_never_takes_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(4, -1)
    edges = torch.tensor([0.0, 5e-324, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    token, logp = draw(logits, edges, SamplingConfig())
    assert token.tolist() == [1, 1, 3, 3]
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)[[0, 0, 1, 1]]
    torch.testing.assert_close(logp, expected)
    greedy, zero = draw(logits, edges, SamplingConfig(temperature=0.0))
    assert greedy.tolist() == [3] * 4 and zero.tolist() == [0.0] * 4
