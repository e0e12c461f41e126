"""The procedural world: the same everywhere, and as hard as its dial says."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from geo_r1.data import World
from geo_r1.data.world import COVERS, LETTERS, _aerial_cell, _ground_cell, render_panorama, render_tile


def sha(data):
    return hashlib.sha256(data).hexdigest()[:16]


def pairings(world, count, split="train"):
    return [world.pairing(split, index) for index in range(count)]


def num_shared(a, b):
    return sum(x == y for x, y in zip(a.covers, b.covers, strict=True))


def confusers(pairing):
    return [place for i, place in enumerate(pairing.candidates) if i != pairing.truth]


@pytest.mark.parametrize(
    ("split", "index", "city", "truth", "digests"),
    [
        ("train", 0, "Solkoli", 1, "e8d20f71d3b61900 6b4a0cda3866665f d55e2dbf5c5631c2 "
         "c1f8c715b0a205e8 a39090fd5bbc1e26 f40540e9b5d64898"),
        ("test", 7, "Zanrizan", 4, "3b6ca7770579f6ff d860c10399065986 b1d87fae4e394f92 "
         "ec24b381aa0ba7e0 594a16195f80b6bd cd4ea37361a22203"),
    ],
)  # fmt: skip
def test_pixels_are_pinned(split, index, city, truth, digests):
    world = World()
    pairing = world.pairing(split, index)
    assert (pairing.id, pairing.place.city.name, pairing.truth) == (f"{split}-{index}", city, truth)
    assert [sha(image.tobytes()) for image in world.images(pairing)] == digests.split()


def test_a_city_is_pinned():
    city = World().cities["train"][0]
    assert (city.name, city.latitude, city.longitude) == ("Liorsol", 50.15, 105.64)
    assert city.colour["water"] == (26, 63, 186) and city.sky == (158, 163, 202)
    assert (city.period, city.horizon) == (5, 13)


def test_same_seed_same_world_in_any_order():
    one, two = World(seed=5), World(seed=5)
    assert one.cities == two.cities
    backwards = [two.pairing("train", index) for index in reversed(range(20))][::-1]
    assert pairings(one, 20) == backwards
    for a, b in zip(one.images(backwards[3]), two.images(backwards[3]), strict=True):
        assert a.tobytes() == b.tobytes()


def test_other_seeds_splits_and_indices_differ():
    one, two = World(seed=5), World(seed=6)
    assert one.cities != two.cities
    assert one.pairing("train", 0) != two.pairing("train", 0)
    assert one.pairing("train", 0).candidates != one.pairing("train", 1).candidates
    assert one.pairing("train", 0).candidates != one.pairing("test", 0).candidates
    pairing = one.pairing("train", 0)
    for a, b in zip(one.images(pairing), two.images(pairing), strict=True):  # the same place, another grain
        assert a.tobytes() != b.tobytes()


def test_splits_share_no_city():
    world = World(num_train_cities=30, num_test_cities=12)
    train, test = ([city.name for city in world.cities[split]] for split in ("train", "test"))
    assert (len(set(train)), len(set(test))) == (30, 12) and not set(train) & set(test)
    assert {p.place.city.name for p in pairings(world, 400)} == set(train)
    assert {p.place.city.name for p in pairings(world, 200, "test")} == set(test)
    for city in [*world.cities["train"], *world.cities["test"]]:
        assert -65 <= city.latitude < 65 and -180 <= city.longitude < 180
        assert set(city.colour) == set(COVERS)


def test_every_name_can_be_used():
    world = World(num_train_cities=1727, num_test_cities=1)
    assert len({city.name for city in world.cities["train"] + world.cities["test"]}) == 1728


@pytest.mark.parametrize("num_candidates", range(3, 11))
@pytest.mark.parametrize("difficulty", [0, 0.8, 1])
def test_one_candidate_is_true_and_none_repeats(num_candidates, difficulty):
    for pairing in pairings(World(num_candidates=num_candidates, difficulty=difficulty), 60):
        assert len(pairing.candidates) == num_candidates
        assert [c.covers == pairing.place.covers for c in pairing.candidates].index(True) == pairing.truth
        assert len({c.covers for c in pairing.candidates}) == num_candidates
        assert pairing.answer == LETTERS[pairing.truth]
        assert {c.city.name for c in pairing.candidates} == {pairing.place.city.name}


@pytest.mark.parametrize("difficulty", [0.1, 1 / 3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("num_candidates", [3, 10])
def test_mean_of_shared_sides_is_three_times_the_difficulty(difficulty, num_candidates):
    world = World(difficulty=difficulty, num_candidates=num_candidates)
    shared = [num_shared(c, p.place) for p in pairings(world, 4000 // num_candidates) for c in confusers(p)]
    assert np.mean(shared) == pytest.approx(3 * difficulty, abs=0.05)
    assert set(shared) <= {int(3 * difficulty), int(3 * difficulty) + 1}


@pytest.mark.parametrize(("difficulty", "shared"), [(0, 0), (1, 3)])
def test_ends_of_the_dial(difficulty, shared):
    # At 1 there are 4 sides x 5 other covers = 20 confusers, at 0 there are 5**4: enough for 9.
    for pairing in pairings(World(difficulty=difficulty, num_candidates=10), 300):
        assert {num_shared(c, pairing.place) for c in confusers(pairing)} == {shared}


def test_confusers_from_anywhere_keep_to_the_split():
    world = World(confusers="anywhere", num_train_cities=8, num_test_cities=4)
    for split in ("train", "test"):
        names = {city.name for city in world.cities[split]}
        seen, elsewhere = set(), 0
        for pairing in pairings(world, 200, split):
            assert pairing.candidates[pairing.truth] == pairing.place
            homes = [c.city.name for c in confusers(pairing)]
            seen |= set(homes)
            elsewhere += sum(home != pairing.place.city.name for home in homes)
        assert seen == names
        assert elsewhere / 800 == pytest.approx(1 - 1 / len(names), abs=0.05)


@pytest.mark.parametrize("num_candidates", [3, 5, 10])
def test_answers_and_covers_are_uniform(num_candidates):
    drawn = pairings(World(num_candidates=num_candidates), 2000)
    answers = Counter(pairing.answer for pairing in drawn)
    assert sorted(answers) == list(LETTERS[:num_candidates])
    expected = 2000 / num_candidates
    assert all(abs(count - expected) < 4 * expected**0.5 for count in answers.values())
    covers = Counter(cover for pairing in drawn for cover in pairing.place.covers)
    assert set(covers) == set(COVERS) and all(abs(n - 8000 / 6) < 150 for n in covers.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_candidates": 2}, "num_candidates must be 3 to 10, got 2"),
        ({"num_candidates": 11}, "num_candidates must be 3 to 10, got 11"),
        ({"difficulty": -0.1}, "difficulty must be 0 to 1, got -0.1"),
        ({"difficulty": 1.01}, "difficulty must be 0 to 1, got 1.01"),
        ({"difficulty": float("nan")}, "difficulty must be 0 to 1, got nan"),
        ({"confusers": "near"}, "confusers must be same_city or anywhere, got 'near'"),
        ({"num_train_cities": 0}, "num_train_cities and num_test_cities must be at least 1, got 0 and 16"),
        ({"num_test_cities": -1}, "num_train_cities and num_test_cities must be at least 1, got 64 and -1"),
        ({"num_train_cities": 1713}, r"num_train_cities \+ num_test_cities must be at most 1728, got 1729"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        World(**arguments)


def test_images_are_whole_tokens_and_clockwise():
    world = World(num_candidates=3)
    pairing = world.pairing("train", 4)
    images = world.images(pairing)
    assert [p.size for p in images] == [(112, 28), (56, 56), (56, 56), (56, 56)]
    assert {p.mode for p in images} == {"RGB"}
    # A tile's quadrants, read clockwise from the north-west, are the sides in the order of the panorama.
    pixels = np.asarray(render_tile(pairing.place, random.Random(0))).astype(int)
    quadrants = [pixels[:28, :28], pixels[:28, 28:], pixels[28:, 28:], pixels[28:, :28]]
    for quadrant, cover in zip(quadrants, pairing.place.covers, strict=True):
        distance = {c: abs(np.median(quadrant, (0, 1)) - pairing.place.city.colour[c]).sum() for c in COVERS}
        assert min(distance, key=distance.get) == cover
    panorama = np.asarray(render_panorama(pairing.place, random.Random(0))).astype(int)
    for side, cover in enumerate(pairing.place.covers):
        ground = panorama[-8:, 28 * side : 28 * side + 28]
        distance = {c: abs(np.median(ground, (0, 1)) - pairing.place.city.colour[c]).sum() for c in COVERS}
        assert min(distance, key=distance.get) == cover


@pytest.mark.parametrize("cover", COVERS)
def test_rendering_is_integer_arithmetic(cover):
    city = World().cities["test"][0]
    for render in (_ground_cell, _aerial_cell):
        cell = render(city, cover, random.Random(1))
        assert cell.shape == (28, 28, 3) and np.issubdtype(cell.dtype, np.integer)
        assert abs(cell).max() < 2**15  # far from where 32-bit and 64-bit integers differ
