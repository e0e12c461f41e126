"""vLLM in this process samples from the policy: its weights, its log-probabilities."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_lab import END
from vlm_cases import sample

from geo_r1.rollout import SamplingConfig, generate
from geo_r1.rollout.vllm.in_process import VLLMEngine

MAX_LEN = 320


def engine_of(lab, **options):
    settings = {
        "dtype": torch.float32,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 64,
        "kv_cache_bytes": 1 << 26,
    }
    settings |= {"end_token_ids": [END], "vision_token_ids": lab.vlm.vision_token_ids}
    return VLLMEngine(lab.folder, **settings | options)


@pytest.fixture(scope="module")
def engine(lab):
    engine = engine_of(lab)
    yield engine
    engine.close()


def streams(count, name="7"):
    return [f"{name}/{index}" for index in range(count)]


def said(groups):
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.parametrize("seed", [1, 2])  # the second load is into weights that were repacked by the first
def test_logp_is_the_trainers_after_each_load(lab, engine, seed):
    engine.load(lab.weights(seed).items())
    prompts = [*lab.prompts[:6], lab.encoder.encode(sample("Which way is north?", name="text"))]
    groups = engine.sample(prompts, 4, SamplingConfig(max_new_tokens=40), streams(7))
    lab.assert_logp(prompts, groups)
    assert min(value for group in groups for c in group for value in c.logp) < -3
    for completion in (c for group in groups for c in group):
        assert completion.ended == (completion.token_ids[-1] == END) == (END in completion.token_ids)
        assert completion.ended or len(completion.token_ids) == 40
    assert any(c.ended for group in groups for c in group)


def test_logp_is_of_what_was_drawn_from(lab, engine):
    """After temperature, top-k and top-p: of five tokens that are left, each has its share."""
    engine.load(lab.weights(3).items())
    prompts = lab.prompts[:2]
    warm, narrow = SamplingConfig(0.5, max_new_tokens=12), SamplingConfig(2.0, top_k=5, max_new_tokens=1)
    groups = engine.sample(prompts, 3, warm, streams(2))
    plain = engine.sample(prompts, 3, SamplingConfig(max_new_tokens=12), streams(2))
    assert said(groups) != said(plain)
    five = engine.sample(prompts[:1], 64, narrow, ["k"])[0]
    share = {c.token_ids[0]: c.logp[0] for c in five}
    assert 3 <= len(share) <= 5 and sum(np.exp(list(share.values()))) == pytest.approx(1, abs=0.2)
    nucleus = engine.sample(prompts[:1], 64, SamplingConfig(top_p=0.3, max_new_tokens=1), ["p"])[0]
    share = {c.token_ids[0]: c.logp[0] for c in nucleus}
    whole = engine.sample(prompts[:1], 64, SamplingConfig(max_new_tokens=1), ["p"])[0]
    full = {c.token_ids[0]: c.logp[0] for c in whole}
    for token in share.keys() & full.keys():
        assert share[token] > full[token] + 0.5


def test_greedy_is_what_the_native_sampler_says(lab, engine):
    engine.load(lab.weights(4).items())
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=24)
    got = engine.sample(lab.prompts, 2, greedy, streams(50))
    expected = generate(lab.vlm, lab.prompts, 2, sampling=greedy, eos_token_id=END, streams=streams(50))
    assert said(got) == said(expected)
    assert all(c.logp == [0.0] * len(c.token_ids) for group in got for c in group)
    assert len({tuple(c.token_ids) for group in got for c in group}) > 20


def test_a_stream_says_the_same_and_others_say_others(lab, engine):
    engine.load(lab.weights(5).items())
    settings = SamplingConfig(max_new_tokens=16)
    first = said(engine.sample(lab.prompts[:4], 4, settings, streams(4)))
    again = said(engine.sample(lab.prompts[3:1:-1], 4, settings, streams(4)[3:1:-1]))
    assert again == first[3:1:-1]
    assert [group[:2] for group in first] == said(engine.sample(lab.prompts[:4], 2, settings, streams(4)))
    other = said(engine.sample(lab.prompts[:4], 4, settings, streams(4, "8")))
    counts = Counter(tuple(tokens) for group in first + other for tokens in group)
    assert len(counts) == 32


def test_vision_tokens_are_never_said(lab, engine):
    weights = {name: tensor.detach().clone() for name, tensor in lab.weights(6).items()}
    head = weights["model.language_model.embed_tokens.weight"]
    direction = torch.randn(2, head.shape[1], generator=torch.Generator().manual_seed(0))
    vision = lab.vlm.vision_token_ids
    head[vision] = 30 * torch.cat([direction, -direction])  # whatever the hidden state, one of each pair wins
    engine.load(weights.items())
    for settings in (SamplingConfig(max_new_tokens=12), SamplingConfig(0.0, max_new_tokens=12)):
        groups = engine.sample(lab.prompts[:3], 4, settings, streams(3))
        tokens = {token for group in said(groups) for completion in group for token in completion}
        assert tokens and not tokens & set(vision)
        assert all(np.isfinite(c.logp).all() for group in groups for c in group)


def test_weights_that_do_not_fit_are_named(lab, engine):
    weights = {name: tensor.detach() for name, tensor in lab.weights(7).items()}
    lost = "model.visual.blocks.0.attn.qkv.weight"
    with pytest.raises(ValueError, match=f"1 weights do not fit .*: {lost} is missing"):
        engine.load((name, tensor) for name, tensor in weights.items() if name != lost)
    with pytest.raises(AssertionError, match="no weights"):
        engine.sample(lab.prompts[:1], 1, SamplingConfig(), ["s"])
    with pytest.raises(ValueError, match=r"lm_head\.lora is no weight of this model"):
        engine.load([*weights.items(), ("lm_head.lora", torch.zeros(2))])
    with pytest.raises(ValueError, match=rf"{lost} has shape \[3, 64\], not \[192, 64\]"):
        engine.load({**weights, lost: torch.zeros(3, 64)}.items())
    with pytest.raises(ValueError, match=f"{lost} came twice"):
        engine.load([*weights.items(), (lost, weights[lost])])
    engine.load(weights.items())  # and it is whole again
    groups = engine.sample(lab.prompts[:2], 2, SamplingConfig(max_new_tokens=8), streams(2))
    lab.assert_logp(lab.prompts[:2], groups)


def test_prompts_that_cannot_be_said_are_named(lab, engine):
    engine.load(lab.weights(8).items())
    good = lab.prompts[0]
    bare = dataclasses.replace(good, images=())
    with pytest.raises(ValueError, match=rf"sample {good.sample_id}: 6 images .* 0 kept.*keep_images"):
        engine.sample([good, bare], 2, SamplingConfig(max_new_tokens=8), streams(2))
    length = len(good.token_ids)
    told = rf"sample {good.sample_id}: .* {length} tokens .* max_model_len = {MAX_LEN}"
    with pytest.raises(ValueError, match=told):
        engine.sample([good], 1, SamplingConfig(max_new_tokens=MAX_LEN - length + 1), ["s"])
    shrunk = dataclasses.replace(good, images=tuple(p[:28, :28] for p in good.images))
    with pytest.raises(ValueError, match=rf"sample {good.sample_id}: vLLM reads a prompt of \d+ tokens"):
        engine.sample([good, shrunk], 2, SamplingConfig(max_new_tokens=8), streams(2))
    with pytest.raises(ValueError, match=r"temperature 0 or 0\.01 to 2\.0, not 3"):
        engine.sample([good], 1, SamplingConfig(temperature=3.0, max_new_tokens=8), ["s"])
    [[completion]] = engine.sample([good], 1, SamplingConfig(max_new_tokens=MAX_LEN - length), ["s"])
    assert completion.ended or len(completion.token_ids) == MAX_LEN - length  # nothing was left behind


def test_images_of_any_size_keep_it(lab, engine):
    """One token, one so narrow that it is over the limit on pixels, and one at that limit."""
    engine.load(lab.weights(9).items())
    sizes = ((28, 28), (15, 2500), (400, 300))
    prompts = [lab.encoder.encode(sample(size, "Where?", name=str(size))) for size in sizes]
    assert [len(p.image_rows) for p in prompts] == [1, 103, 54]
    groups = engine.sample(prompts, 2, SamplingConfig(max_new_tokens=8), streams(3))
    lab.assert_logp(prompts, groups)


def test_the_trainer_keeps_its_threads_and_its_dice(lab, engine):
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    dice = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    engine.load(lab.weights(10).items())
    engine.sample(lab.prompts[:1], 2, SamplingConfig(max_new_tokens=4), ["s"])
    assert (torch.set_num_threads, torch.get_num_threads()) == (set_num_threads, num_threads)
    assert torch.equal(dice[0], torch.get_rng_state())
    assert dice[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_what_a_cpu_cannot_do_is_said(lab):
    with pytest.raises(ValueError, match="no sleep on a CPU"):
        engine_of(lab, sleep=True)
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        engine_of(lab, kv_cache_bytes=None)
    with pytest.raises(ValueError, match=r"1 ranks .* engines of 2"):
        engine_of(lab, tensor_parallel_size=2)


def test_a_closed_engine_makes_room_for_another(lab, engine, tmp_path):
    """The process group that the trainer made before it outlives an engine."""
    engine.close()
    engine.close()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
        dice = torch.get_rng_state(), random.getstate()
        second = engine_of(lab)
        assert (torch.set_num_threads, torch.get_num_threads()) == (set_num_threads, num_threads)
        assert torch.equal(dice[0], torch.get_rng_state()) and dice[1] == random.getstate()
        second.load(lab.weights(11).items())
        groups = second.sample(lab.prompts[:2], 2, SamplingConfig(max_new_tokens=8), streams(2))
        lab.assert_logp(lab.prompts[:2], groups)
        second.close()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
