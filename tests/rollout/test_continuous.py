"""Completions that end make room for others, and nobody says anything else for it."""

import copy
import itertools
import random

import pytest
import torch
from native_sampling import sample_natively
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_cases import SIZES

from geo_r1.kernels import linear_logprob
from geo_r1.kernels.layout import plan_batches
from geo_r1.models import PackedVLM, pack
from geo_r1.rollout.native import generation
from geo_r1.rollout.native.cache import GroupCache, _halved, compact
from geo_r1.rollout.native.decoder import Decoder

ENDS = range(60, 90)  # of 500 tokens: completions of all lengths
LIMIT = 16


@pytest.fixture(scope="module")
def prompts(lab):
    """Nine of them, of many lengths, some equal; every other one with an image."""
    made = []
    for i in range(9):
        image = [SIZES[i % len(SIZES)]] if i % 2 else []
        made.append(lab.prompt(*image, "north of the tower " * (i % 4 + 1), seed=i))
    lengths = [len(prompt.token_ids) for prompt in made]
    assert len(set(lengths)) >= 6 and len(set(lengths)) < len(lengths)
    return made


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def vlm(request, lab):
    return PackedVLM(copy.deepcopy(lab.own).to(request.param))


@pytest.fixture(params=[False, True], ids=["exact shapes", "fixed shapes"])
def shapes(request, monkeypatch):
    """Fixed shapes are what CUDA graphs need; without graphs they run anywhere."""
    monkeypatch.setattr(
        generation, "GroupCache", lambda size, device, fixed: GroupCache(size, device, fixed=request.param)
    )


def sampled(vlm, prompts, num_completions, *, ends=ENDS, **options):
    options = {"max_new_tokens": LIMIT} | options
    return sample_natively(vlm, prompts, num_completions, "3", ends, **options)


def flat(groups):
    return list(itertools.chain.from_iterable(groups))


def assert_same(got, expected):
    assert [len(group) for group in got] == [len(group) for group in expected]
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert one.token_ids == other.token_ids and one.ended == other.ended
        assert one.logp == pytest.approx(other.logp, rel=0, abs=2e-5)


class Spy:
    """Counts what a model is asked to do."""

    def __init__(self, vlm, monkeypatch):
        self.encoded, self.prefilled, self.decoded = [], [], []
        encode, hidden, run = vlm.encode_images, vlm.hidden_states, vlm.run_text
        monkeypatch.setattr(vlm, "encode_images", lambda px, g: self.encoded.extend(px) or encode(px, g))
        monkeypatch.setattr(
            vlm, "hidden_states", lambda batch, at: self.prefilled.append(batch) or hidden(batch, at)
        )

        def run_text(embedded, positions, attend, *images):
            if isinstance(getattr(attend, "__self__", None), GroupCache):
                self.decoded.append(len(embedded))
            return run(embedded, positions, attend, *images)

        monkeypatch.setattr(vlm, "run_text", run_text)


def test_whoever_takes_anothers_place_says_what_it_says_alone(vlm, prompts, shapes, monkeypatch):
    alone = [sampled(vlm, [p], 3, streams=[f"3/{i}"])[0] for i, p in enumerate(prompts)]
    first = [sampled(vlm, [p], 1, streams=[f"3/{i}"])[0] for i, p in enumerate(prompts)]
    assert_same([group[:1] for group in alone], first)
    lengths = [len(c.token_ids) for c in flat(alone)]
    assert min(lengths) == 1 and max(lengths) == LIMIT and len(set(lengths)) > 8
    longest = max(len(prompt.token_ids) for prompt in prompts)
    for room in (LIMIT, 2 * LIMIT, 2 * longest + 4 * LIMIT, 10**5):
        spy = Spy(vlm, monkeypatch)
        assert_same(sampled(vlm, prompts, 3, max_tokens=longest + room), alone)
        # However little room there is, every prompt and every image is computed once.
        batches = [batch.layout.prompt_len for batch in spy.prefilled]
        assert sorted(flat(batches)) == sorted(len(prompt.token_ids) for prompt in prompts)
        assert len(spy.encoded) == sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
        assert room == 10**5 or len(batches) > 1
        monkeypatch.undo()


@pytest.mark.parametrize("num_completions", [1, 2, 5])
def test_a_step_runs_what_is_being_said_and_no_more(lab, prompts, num_completions, monkeypatch):
    spy = Spy(lab.packed, monkeypatch)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_tokens = 3 * longest + 4 * LIMIT
    groups = sampled(lab.packed, prompts, num_completions, max_tokens=max_tokens)
    lengths = [len(c.token_ids) for c in flat(groups)]
    assert sum(spy.decoded) == sum(lengths) - len(lengths)  # the last token of each is never run
    # Fewer steps than one batch after another, where each waits for its longest.
    prompt_len = [len(prompt.token_ids) for prompt in prompts]
    plan = plan_batches(prompt_len, [[LIMIT] * num_completions for _ in prompts], max_tokens)
    waves = [
        max(len(groups[group][i].token_ids) for group, indices in batch for i in indices)
        for batch in plan.batches
    ]
    assert len(waves) > 1 and len(spy.decoded) < 0.9 * sum(waves)


def test_one_long_group_is_held_while_all_others_pass(vlm, prompts, shapes):
    """The others say one token each, in the rows that the long one leaves free."""
    alone = sampled(vlm, prompts, 2, ends=[-1])
    ends = {c.token_ids[0] for group in alone[1:] for c in group}
    long = next(
        name
        for name in map(str, range(50))
        if all(
            ends.isdisjoint(c.token_ids) for c in sampled(vlm, prompts[:1], 2, streams=[name], ends=[-1])[0]
        )
    )
    streams = [long, *(f"3/{i}" for i in range(1, len(prompts)))]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    groups = sampled(vlm, prompts, 2, streams=streams, ends=ends, max_tokens=2 * longest + 3 * LIMIT)
    assert [len(c.token_ids) for c in groups[0]] == [LIMIT] * 2 and not any(c.ended for c in groups[0])
    for group, full in zip(groups[1:], alone[1:], strict=True):
        assert [c.token_ids for c in group] == [c.token_ids[:1] for c in full] and all(c.ended for c in group)


def test_all_end_at_once(vlm, prompts, shapes, monkeypatch):
    """Then the next ones begin together; a completion of one token never reaches the text layers."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    full = sampled(vlm, prompts, 2, ends=[])
    assert all(len(c.token_ids) == LIMIT and not c.ended for c in flat(full))
    tight = 2 * longest + 3 * LIMIT
    assert_same(sampled(vlm, prompts, 2, ends=[], max_tokens=tight), full)
    spy = Spy(vlm, monkeypatch)
    one = sampled(vlm, prompts, 2, ends=[], max_tokens=tight, max_new_tokens=1)
    assert [c.token_ids for c in flat(one)] == [c.token_ids[:1] for c in flat(full)]
    assert spy.decoded == [] and len(spy.prefilled) > 1


def test_short_prompts_do_not_wait_in_lanes_for_long_ones(lab, monkeypatch):
    """Where not all fit at once, prompts under half as long as the longest come after it, more at a time."""
    prompts = [lab.prompt("north " * 40), *(lab.prompt("east", seed=i) for i in range(9))]
    long, short = (len(prompts[i].token_ids) for i in (0, 1))
    assert 3 * short < long
    spy = Spy(lab.packed, monkeypatch)
    sampled(lab.packed, prompts, 1, ends=[-1], max_tokens=long + 2 * LIMIT)
    most = (long + 2 * LIMIT) // (short + LIMIT)
    assert most >= 3 and spy.prefilled[0].layout.prompt_len == (long,)
    assert spy.prefilled[1].layout.prompt_len == (short,) * most


def test_no_completions_of_a_prompt_are_none(lab, prompts):
    assert sampled(lab.packed, prompts, 0) == [[]] * len(prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_how_close_log_probabilities_are_to_the_trainers(vlm, prompts, shapes, temperature):
    """The trainer's include vision tokens; without their share they are what the sampler drew from."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    groups = sampled(vlm, prompts, 3, temperature=temperature, max_tokens=4 * longest + 9 * LIMIT)
    batch = pack(prompts, [[c.token_ids for c in group] for group in groups])
    with torch.no_grad():
        hidden, head = vlm.loss_rows(batch), vlm.lm_head
        trainer, _ = linear_logprob(hidden, head, batch.target_R, temperature=temperature)
        vision = (hidden @ head.T / temperature).double().softmax(1)[:, vlm.vision_token_ids].sum(1)
    got = torch.tensor([value for c in flat(groups) for value in c.logp], dtype=torch.float64)
    assert got.min() < -2 and vision.max() > 1e-3
    tolerance = 1e-10 if vlm.compute_dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, trainer.double() - torch.log1p(-vision), rtol=0, atol=tolerance)


def test_what_predicts_a_first_token_is_bit_equal_to_the_trainers(vlm, prompts, monkeypatch):
    """Prompts run through the same attention in both, whatever stands beside them.

    On one thread: with more, how products of float32 are cut depends on the number of their rows. Even on
    one, MKL sums a product of a few rows in another order on some CPUs, and an image may be a few rows, so
    prompts with images are equal to rounding. Later tokens are not bit-equal: the trainer's attention goes
    over prompt and completion in one sum.
    """
    drawn, enter = {}, Decoder.enter

    def note(decoder, first, hidden, start, names):
        drawn.update(zip(names, hidden, strict=True))
        enter(decoder, first, hidden, start, names)

    monkeypatch.setattr(Decoder, "enter", note)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        groups = sampled(vlm, prompts, 3, max_tokens=4 * longest + 9 * LIMIT)
        batch = pack(prompts, [[c.token_ids for c in group] for group in groups])
        with torch.no_grad():
            hidden = vlm.loss_rows(batch)
    finally:
        torch.set_num_threads(num_threads)
    lengths = torch.tensor([len(c.token_ids) for c in flat(groups)])
    trained = hidden[lengths.cumsum(0) - lengths].unflatten(0, (len(prompts), 3))
    for group, prompt in enumerate(prompts):
        sampled_rows = torch.stack([drawn[f"3/{group}/{index}"] for index in range(3)])
        tolerance = 16 * torch.finfo(hidden.dtype).eps if prompt.image_grids else 0.0
        torch.testing.assert_close(trained[group], sampled_rows, rtol=tolerance, atol=tolerance)


class Waits(TorchDispatchMode):
    """Notes operators that wait for the device, or bring something to it: a CUDA graph can hold neither."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "unique")

    def __init__(self):
        super().__init__()
        self.seen, self.found = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        if function.overloadpacket.__name__.startswith(self.NAMES):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}])
def test_nothing_waits_within_a_step(vlm, prompts, shapes, monkeypatch, sampling):
    waits = Waits()

    def watched(function):
        def call(*args):
            with waits:
                function(*args)

        return call

    monkeypatch.setattr(Decoder, "draw", watched(Decoder.draw))
    monkeypatch.setattr(Decoder, "run", watched(Decoder.run))
    sampled(vlm, prompts, 2, max_new_tokens=4, **sampling)
    assert waits.seen > 100 and waits.found == []


def test_compact_keeps_all_that_stay_and_moves_only_the_last():
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 12)
        gone = sorted(draw.sample(range(count), draw.randint(0, count)))
        items = list(range(count))
        moves = compact(items, gone)
        assert sorted(items) == [i for i in range(count) if i not in gone]
        moved = dict(zip((new for _, new in moves), (old for old, _ in moves), strict=True))
        assert items == [moved.get(i, i) for i in range(len(items))]
        assert all(new in gone and old >= len(items) > new for old, new in moves)


def test_fixed_shapes_are_few():
    assert [_halved(count, 40) for count in (1, 2, 3, 4, 5, 6, 10, 11, 20, 21, 40)] == [
        *(1, 2, 3, 5, 5, 10, 10, 20, 20, 40, 40)
    ]
    assert [_halved(count, 1) for count in (0, 1)] == [1, 1]


def test_cuda_graphs_need_a_gpu(lab, prompts):
    with pytest.raises(ValueError, match="cuda_graphs needs a model on a GPU, this one is on the cpu"):
        sampled(lab.packed, prompts, 1, cuda_graphs=True)
