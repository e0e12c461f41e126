import random

import numpy as np
import pytest
import torch

from geo_r1.kernels import PackedLayout
from geo_r1.kernels.layout import plan_batches
from geo_r1.kernels.layout.made import Made, tensors_in
from geo_r1.kernels.layout.tiles import TILE_ROWS

RAGGED = ((4, 0, 3, 0, 1), ((2, 0, 3), (), (1,), (0, 0), ()))
LAYOUTS = {
    "ragged": RAGGED,
    "one token": ((1,), ((),)),
    "empty prompt": ((0, 2), ((0, 0), (5,))),
    "no groups": ((), ()),
    "twins": ((3, 3), ((2, 2), (2, 2))),
}


def random_lengths(rng, most_groups=6, longest=9):
    prompts = [rng.randint(0, longest) for _ in range(rng.randint(0, most_groups))]
    return prompts, [[rng.randint(0, longest) for _ in range(rng.randint(0, 5))] for _ in prompts]


def tokens(prompts, completions):
    """(group, segment, member) of each token, written down one by one; member 0 is the prompt."""
    out, segment = [], 0
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        for member, length in enumerate((prompt, *lengths)):
            out += [(group, segment, member)] * length
            segment += 1
    return out


def test_boundaries_of_a_ragged_batch():
    layout = PackedLayout.from_lengths(*RAGGED)
    assert layout.cu_group.tolist() == [0, 9, 9, 13, 13, 14]
    assert layout.prefix_len.tolist() == [4, 0, 3, 0, 1]
    assert layout.cu_segment.tolist() == [0, 4, 6, 6, 9, 9, 12, 13, 13, 13, 13, 14]
    assert layout.segment_parent.tolist() == [-1, 0, 0, 0, -1, -1, 5, -1, 7, 7, -1]
    assert layout.segments[:4] == ((0, 4, 0, 0), (4, 2, 0, 4), (6, 0, 0, 4), (6, 3, 0, 4))
    assert layout.segments[4:7] == ((9, 0, 9, 0), (9, 3, 9, 0), (12, 1, 9, 3))
    assert (layout.prompt_len, layout.completion_len) == RAGGED
    assert layout.num_tokens == 14
    assert layout.device == torch.device("cpu")
    for boundaries in (layout.cu_group, layout.prefix_len, layout.cu_segment, layout.segment_parent):
        assert boundaries.dtype == torch.int32


def test_windows_are_prompts_without_completions():
    alone, empty = (
        PackedLayout.from_lengths([64, 16, 64], completions) for completions in (None, [[], [], []])
    )
    assert alone.cu_segment.tolist() == empty.cu_segment.tolist() == [0, 64, 80, 144]
    assert alone.segment_parent.tolist() == [-1, -1, -1]
    assert alone.completion_len == ((), (), ())


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_completion_tokens_equal_a_loop(name):
    layout = PackedLayout.from_lengths(*LAYOUTS[name])
    where = tokens(*LAYOUTS[name])
    predictors = []
    for row, (group, segment, member) in enumerate(where):
        if member:
            first = where[row - 1][1] != segment
            last_of_prompt = max(i for i, t in enumerate(where) if t[0] == group and t[2] == 0)
            predictors.append(last_of_prompt if first else row - 1)
    assert layout.predictor_row.tolist() == predictors
    assert layout.predictor_row.dtype == torch.int64


def test_nothing_predicts_the_first_token_after_an_empty_prompt():
    layout = PackedLayout.from_lengths([2, 0], [[1], [0, 3]])
    with pytest.raises(ValueError, match="the completion at token 3 has no prompt"):
        _ = layout.predictor_row


@pytest.mark.parametrize("seed", range(8))
def test_buckets_hold_every_token_once_with_what_it_sees(seed):
    lengths = random_lengths(random.Random(seed))
    layout, where = PackedLayout.from_lengths(*lengths), tokens(*lengths)
    assert layout.num_tokens == len(where) == layout.cu_group[-1] == layout.cu_segment[-1]
    order = []
    for prefix_len, q_row, kv_row in layout.shape_buckets:
        assert q_row.dtype == kv_row.dtype == torch.int64
        for queries, keys in zip(q_row.tolist(), kv_row.tolist(), strict=True):
            group, segment, _ = where[queries[0]]
            prompt = [i for i, t in enumerate(where) if t[0] == group and t[2] == 0 and t[1] != segment]
            assert queries == [i for i, t in enumerate(where) if t[1] == segment]
            assert keys == prompt + queries
            assert prefix_len == len(prompt)
            order += queries
    assert sorted(order) == list(range(len(where)))
    assert [order[i] for i in layout.bucket_order.tolist()] == list(range(len(where)))


def test_buckets_join_segments_of_one_shape():
    layout = PackedLayout.from_lengths(*LAYOUTS["twins"])
    shapes = [(prefix, list(q.shape), list(kv.shape)) for prefix, q, kv in layout.shape_buckets]
    assert shapes == [(0, [2, 3], [2, 3]), (3, [4, 2], [4, 5])]


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_integers(integer):
    prompts, completions = np.array([200, 3], integer), [np.array([100, 0], integer), []]
    layout = PackedLayout.from_lengths(prompts, completions)
    assert layout.cu_group.tolist() == [0, 300, 303]  # 44 if uint8 had wrapped round
    assert layout.num_tokens == 303
    assert {type(n) for n in (*layout.prompt_len, *layout.completion_len[0], layout.num_tokens)} == {int}
    plan = plan_batches(prompts, completions, 300)
    assert plan.batches == (((0, (0, 1)),), ((1, ()),))
    assert (plan.num_tokens, plan.repeated_tokens) == (303, 0)


BAD_LENGTHS = [-1, 2.0, True, np.True_, np.int64(-1), np.float32(1), "3", None, torch.tensor(3)]


@pytest.mark.parametrize("bad", BAD_LENGTHS, ids=repr)
@pytest.mark.parametrize("place", ["prompt", "completion"])
def test_a_length_is_an_integer_of_at_least_zero(place, bad):
    prompts, completions = ([1, bad], [[1], [2]]) if place == "prompt" else ([1, 1], [[1], [2, bad]])
    for make in (PackedLayout.from_lengths, lambda p, c: plan_batches(p, c, 100)):
        with pytest.raises(ValueError, match="group 1: a length must be an integer >= 0, got ") as error:
            make(prompts, completions)
        assert str(error.value).endswith(repr(bad))


@pytest.mark.parametrize("make", [PackedLayout.from_lengths, lambda p, c: plan_batches(p, c, 100)])
def test_prompts_and_groups_of_completions_agree_in_number(make):
    with pytest.raises(ValueError, match="2 prompts but 1 groups of completions"):
        make([1, 2], [[3]])


def test_tokens_fit_int32():
    layout = PackedLayout.from_lengths([2**31 - 2], [[1]])
    assert layout.cu_segment.tolist() == [0, 2**31 - 2, 2**31 - 1]
    with pytest.raises(ValueError, match=f"{2**31} tokens do not fit int32"):
        PackedLayout.from_lengths([2**31 - 2], [[1, 1]])


def test_layouts_compare_and_hash_as_objects():
    one, other = (PackedLayout.from_lengths([1], [[2]]) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2


def test_first_fit_decreasing():
    plan = plan_batches([2, 3, 4, 1], [[1], [3], [3], [1, 1]], 10)
    # Sizes 3, 6, 7, 3: the largest opens a batch that takes group 0, the next takes group 3.
    assert plan.batches == (((0, (0,)), (2, (0,))), ((1, (0,)), (3, (0, 1))))
    assert (plan.num_tokens, plan.repeated_tokens) == (19, 0)


def test_a_group_over_the_budget_repeats_its_prompt():
    plan = plan_batches([4], [[3, 3, 3, 2, 0]], 10)
    assert plan.batches == (((0, (0, 1, 4)),), ((0, (2, 3)),))
    assert (plan.num_tokens, plan.repeated_tokens) == (4 + 11 + 4, 4)


def test_a_prompt_is_never_repeated_within_a_batch():
    # In the order given, 1 and the last 1 would be two pieces of 2 tokens that fit one batch.
    plan = plan_batches([1], [[1, 9, 1]], 10)
    assert plan.batches == (((0, (1,)),), ((0, (0, 2)),))
    assert plan.repeated_tokens == 1


def test_groups_without_completions_and_no_groups_at_all():
    plan = plan_batches([5, 0, 5], [[], [], []], 10)
    assert plan.batches == (((0, ()), (1, ()), (2, ())),)
    assert (plan.num_tokens, plan.repeated_tokens) == (10, 0)
    assert plan_batches([], [], 10).batches == ()


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (
            [1, 8],
            [[9], [1, 3]],
            "group 1: a prompt of 8 tokens with a completion of 3 is over the budget of 10",
        ),
        ([1, 11], [[9], []], "group 1: a prompt of 11 tokens is over the budget of 10"),
        ([11], [[0]], "group 0: a prompt of 11 tokens with a completion of 0 is over the budget of 10"),
    ],
)
def test_what_cannot_fit_names_its_group(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        plan_batches(prompts, completions, 10)


@pytest.mark.parametrize("seed", range(200))
def test_plans_keep_their_promises(seed):
    rng = random.Random(seed)
    prompts, completions = random_lengths(rng, most_groups=12)
    smallest = max((p + max(c, default=0) for p, c in zip(prompts, completions, strict=True)), default=0)
    budget = smallest + rng.randint(0, 20)
    plan = plan_batches(prompts, completions, budget)
    assert plan == plan_batches(tuple(prompts), tuple(map(tuple, completions)), budget)

    sizes = []
    for batch in plan.batches:
        groups = [group for group, _ in batch]
        assert groups == sorted(set(groups))
        layout = PackedLayout.from_lengths(
            [prompts[group] for group in groups],
            [[completions[g][i] for i in members] for g, members in batch],
        )
        sizes.append(layout.num_tokens)
    assert all(size <= budget for size in sizes)
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])  # no two could be one
    assert plan.num_tokens == sum(sizes)

    pieces = [piece for batch in plan.batches for piece in batch]
    members = sorted((group, i) for group, indices in pieces for i in indices)
    assert members == [(group, i) for group, lengths in enumerate(completions) for i in range(len(lengths))]
    times = [sum(group == g for g, _ in pieces) for group in range(len(prompts))]
    assert all(times)
    assert plan.repeated_tokens == sum((n - 1) * p for n, p in zip(times, prompts, strict=True))
    assert plan.num_tokens == sum(prompts) + sum(map(sum, completions)) + plan.repeated_tokens
    for indices in (indices for _, indices in pieces):
        assert list(indices) == sorted(indices)
    for group, n in enumerate(times):  # split only where it must be
        assert n == 1 or prompts[group] + sum(completions[group]) > budget


@pytest.mark.parametrize("rows", TILE_ROWS)
@pytest.mark.parametrize("name", [*LAYOUTS, "long"])
def test_tiles_equal_a_loop(name, rows):
    lengths = LAYOUTS.get(name, ((150, 64, 0, 17), ((0, 1, 63, 64, 65, 130), (), (16,), (300,))))
    layout = PackedLayout.from_lengths(*lengths)
    queries, keys = [], []
    for start, length, prefix, prefix_len in layout.segments:
        group = (
            max(i for i, first in enumerate(layout.cu_group[:-1].tolist()) if first <= start) if length else 0
        )
        is_prompt = start == layout.cu_group[group]
        query_end = int(layout.cu_group[group + 1]) if is_prompt else start + length
        for first in range(start, start + length, rows):
            queries.append((first, start, start + length, prefix, prefix + prefix_len))
            keys.append((first, start + length, start, query_end))
    query_tiles, key_tiles = layout.tiles(rows)
    assert query_tiles.dtype == key_tiles.dtype == torch.int32
    assert query_tiles.shape == (len(queries), 5) and key_tiles.shape == (len(keys), 4)
    assert sorted(map(tuple, query_tiles.tolist())) == sorted(queries)
    assert sorted(map(tuple, key_tiles.tolist())) == sorted(keys)
    query_work = [end - prefix + first - start for first, start, _, prefix, end in query_tiles.tolist()]
    key_work = [query_end - first for first, _, _, query_end in key_tiles.tolist()]
    for work in (query_work, key_work):  # a long tile that starts last would keep the whole device waiting
        assert work == sorted(work, reverse=True)
    assert layout.tiles(rows)[0] is query_tiles


def test_another_stream_waits_for_what_one_has_made(monkeypatch):
    """With stand-ins for the streams of a GPU, which note what happens in which order."""
    happened, current, capturing = [], ["first"], [False]

    class Event:
        def record(self, stream):
            happened.append(f"recorded on {stream}")

    class Stream(str):
        def wait_event(self, event):
            assert isinstance(event, Event)
            happened.append(f"{self} waits")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: happened.append(f"kept for {stream}")
    )
    monkeypatch.setattr(Made, "by_current_stream", lambda value: Made([*tensors_in(value)]))
    layout = PackedLayout.from_lengths([3], [[2]])

    def make():
        happened.append(f"made on {current[0]}")
        return torch.zeros(2), (torch.ones(1), 7)

    table = layout.kept("table", make)
    assert layout.kept("table", make) is table  # on the same stream there is nothing to wait for
    current[0], capturing[0] = "second", True
    assert layout.kept("table", make) is table
    assert happened == ["made on first", "recorded on first"]
    capturing[0] = False
    assert layout.kept("table", make) is table
    assert happened[2:] == ["second waits", "kept for second", "kept for second"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_tables_made_behind_a_long_wait_on_another_stream():
    layout = PackedLayout.from_lengths([300, 20], [[40, 70], [9]], device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1_000_000_000)
        layout.tiles(64)
    found = [x.clone() for x in layout.tiles(64)]
    right = PackedLayout.from_lengths([300, 20], [[40, 70], [9]]).tiles(64)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, right, strict=True))


def test_longest_segment():
    assert [PackedLayout.from_lengths(*x).max_segment_len for x in LAYOUTS.values()] == [4, 1, 5, 0, 3]
