"""Samples by number: every epoch once, in an order that the seed alone decides."""

from dataclasses import replace

import pytest

from geo_r1.data import Sample
from geo_r1.data.source import Source


def samples(count):
    text = [{"type": "text", "text": "?"}]
    return [Sample(str(i), ({"role": "user", "content": text},)) for i in range(count)]


def ids(source, positions, seed=0):
    return [int(source.draw(position, seed).id) for position in positions]


@pytest.mark.parametrize("size", [1, 2, 37])
def test_every_epoch_has_each_sample_once(size):
    source = Source.of(samples(size))
    for epoch in range(6):  # more epochs than orders are kept
        assert sorted(ids(source, range(epoch * size, (epoch + 1) * size))) == list(range(size))


def test_order_is_of_seed_and_position_alone():
    source, again = Source.of(samples(37)), Source.of(samples(37))
    order = ids(source, range(37 * 8), seed=3)
    assert [ids(again, [position], seed=3)[0] for position in reversed(range(37 * 8))] == order[::-1]
    assert ids(source, range(0, 37 * 8, 5), seed=3) == order[::5]
    assert len({tuple(order[epoch * 37 : (epoch + 1) * 37]) for epoch in range(8)}) == 8
    assert ids(source, range(37), seed=4) != order[:37]
    assert order[:37] != list(range(37))


def test_order_is_pinned():
    assert ids(Source.of(samples(8)), range(16)) == [4, 5, 1, 7, 6, 0, 2, 3, 6, 5, 7, 3, 1, 4, 2, 0]


def test_a_source_without_end_is_read_in_turn():
    source = Source(lambda index: samples(index + 1)[index], None)
    assert ids(source, [0, 5, 2], seed=9) == [0, 5, 2]


@pytest.mark.parametrize(
    ("size", "steps", "epochs", "per_step", "expected"),
    [
        (100, 7, None, 10, 7),
        (None, 7, None, 10, 7),
        (100, None, 1, 10, 10),
        (100, None, 2.5, 10, 25),
        (100, None, 1, 30, 3),  # 3.33 steps: the nearest whole number
        (110, None, 1, 30, 4),
        (3, None, 1, 30, 1),
        (100, None, 0.01, 64, 1),
    ],
)
def test_num_steps(size, steps, epochs, per_step, expected):
    assert Source(lambda index: None, size).num_steps(steps, epochs, per_step) == expected


def rated(values):
    return [replace(s, metadata={"difficulty": v}) for s, v in zip(samples(len(values)), values, strict=True)]


def test_a_curriculum_starts_with_the_easy_ones():
    values = [3, 1, 2.5, 1, 0, 1, 7, -1]
    source, plain = Source.of(rated(values), curriculum=True), Source.of(rated(values))
    for seed in range(4):
        first = ids(source, range(8), seed)
        assert [values[i] for i in first] == sorted(values)
        shuffled = ids(plain, range(8), seed)
        assert [i for i in first if values[i] == 1] == [i for i in shuffled if values[i] == 1]
        assert ids(source, range(8, 40), seed) == ids(plain, range(8, 40), seed)
        assert ids(source, [5, 0, 3], seed) == [first[5], first[0], first[3]]
    assert len({tuple(ids(source, range(2, 5), seed)) for seed in range(9)}) > 1  # the ties
    flat = Source.of(rated([4] * 8), curriculum=True)
    assert ids(flat, range(16), 3) == ids(plain, range(16), 3)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "none"),
        ("3", "'3'"),
        (True, "True"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([1], r"\[1\]"),
    ],
)
def test_a_curriculum_names_the_row_without_a_number(value, found):
    rows = rated([1, 2, value])
    expected = f"^sample 2: data.curriculum needs a number in the column 'difficulty'; it has {found}$"
    with pytest.raises(ValueError, match=expected):
        Source.of(rows, curriculum=True)
    assert len(ids(Source.of(rows), range(3))) == 3  # without it nobody asks
