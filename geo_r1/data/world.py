"""A procedural world of cities: ground panoramas and satellite tiles of the same places.

A place has a land cover on each of its four sides. The panorama shows them from the ground, clockwise from
the north-west; the satellite tile shows them from above, one per quadrant. Every city has its own palette and
texture, so on test cities a model must recognise land covers, not colours.

Everything is integer arithmetic on named, seeded random streams, so it is the same on every platform.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from geo_r1.errors import UserError

SIDES = ("nw", "ne", "se", "sw")
Covers = tuple[str, str, str, str]  # in the order of SIDES
COVERS = ("water", "woods", "sand", "roofs", "field", "rock")
LETTERS = "ABCDEFGHIJ"
CELL = 28  # pixels: one token of Qwen2.5-VL (2 x 2 patches of 14)

_BASE_COLOUR = {
    "water": (45, 95, 190),
    "woods": (30, 105, 50),
    "sand": (225, 200, 130),
    "roofs": (190, 75, 55),
    "field": (150, 190, 65),
    "rock": (135, 135, 145),
}
_SYLLABLES = ("ba", "ko", "li", "mar", "ne", "or", "pa", "ri", "sol", "tu", "ve", "zan")


@dataclass(frozen=True)
class City:
    """How one city looks. Colours are RGB, 0 to 255; lengths are pixels."""

    name: str
    latitude: float
    longitude: float
    colour: dict[str, tuple[int, int, int]]
    sky: tuple[int, int, int]
    period: int
    horizon: int


@dataclass(frozen=True)
class Place:
    """A point in a city and the land cover on its four sides, in the order of `SIDES`."""

    city: City
    covers: Covers


@dataclass(frozen=True)
class Pairing:
    """One cross-view question: which candidate is the tile of `place`?"""

    id: str
    place: Place
    candidates: tuple[Place, ...]
    truth: int

    @property
    def answer(self) -> str:
        return LETTERS[self.truth]


class World:
    """Training and test cities, and questions about them.

    Args:
        seed: determines the whole world.
        num_train_cities, num_test_cities: the two splits share no city; at most 1728 together.
        num_candidates: tiles to choose from, 3 to 10.
        confusers: "same_city" takes wrong tiles from the panorama's city, "anywhere" from the whole split.
        difficulty: 0 to 1. A confuser shares 3 * difficulty of its four sides with the truth, rounded up
            or down at random so that the mean holds (within 2 %, since confusers never repeat).

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        num_train_cities: int = 64,
        num_test_cities: int = 16,
        num_candidates: int = 5,
        confusers: str = "same_city",
        difficulty: float = 0.8,
    ) -> None:
        if not 3 <= num_candidates <= len(LETTERS):
            raise UserError(f"num_candidates must be 3 to {len(LETTERS)}, got {num_candidates}")
        if confusers not in ("same_city", "anywhere"):
            raise UserError(f"confusers must be same_city or anywhere, got {confusers!r}")
        if not 0 <= difficulty <= 1:
            raise UserError(f"difficulty must be 0 to 1, got {difficulty}")
        if min(num_train_cities, num_test_cities) < 1:
            raise UserError(
                "num_train_cities and num_test_cities must be at least 1, "
                f"got {num_train_cities} and {num_test_cities}"
            )
        if num_train_cities + num_test_cities > len(_SYLLABLES) ** 3:
            raise UserError(
                f"num_train_cities + num_test_cities must be at most {len(_SYLLABLES) ** 3}, "
                f"got {num_train_cities + num_test_cities}"
            )
        self.seed = seed
        self.num_candidates = num_candidates
        self.confusers = confusers
        self.difficulty = difficulty
        names = _city_names(random.Random(f"{seed}/names"), num_train_cities + num_test_cities)
        cities = [_make_city(name, random.Random(f"{seed}/city/{name}")) for name in names]
        self.cities = {"train": cities[:num_train_cities], "test": cities[num_train_cities:]}

    def pairing(self, split: str, index: int, difficulty: float | None = None) -> Pairing:
        """The index-th question of a split ("train" or "test"); the same at every call.

        Args:
            difficulty: 0 to 1; replaces the world's own.
        """
        difficulty = self.difficulty if difficulty is None else difficulty
        rng = random.Random(f"{self.seed}/{split}/{index}")
        city = rng.choice(self.cities[split])
        covers = _four([rng.choice(COVERS) for _ in SIDES])
        chosen = {covers}
        places: list[Place] = []
        while len(places) < self.num_candidates - 1:
            confuser = _confuser(covers, difficulty, rng)
            if confuser not in chosen:
                chosen.add(confuser)
                home = city if self.confusers == "same_city" else rng.choice(self.cities[split])
                places.append(Place(home, confuser))
        truth = rng.randrange(self.num_candidates)
        places.insert(truth, Place(city, covers))
        return Pairing(f"{split}-{index}", Place(city, covers), tuple(places), truth)

    def images(self, pairing: Pairing) -> tuple[Image.Image, ...]:
        """The panorama [28 x 112 pixels], then each candidate's tile [56 x 56 pixels]."""
        panorama = render_panorama(pairing.place, random.Random(f"{self.seed}/{pairing.id}/panorama"))
        tiles = (
            render_tile(place, random.Random(f"{self.seed}/{pairing.id}/{letter}"))
            for letter, place in zip(LETTERS, pairing.candidates, strict=False)
        )
        return (panorama, *tiles)


def _four(covers: Sequence[str]) -> Covers:
    nw, ne, se, sw = covers
    return nw, ne, se, sw


def _confuser(covers: Covers, difficulty: float, rng: random.Random) -> Covers:
    others = len(SIDES) - 1
    shared = int(others * difficulty + rng.random())
    kept = set(rng.sample(range(len(SIDES)), min(shared, others)))
    return _four([cover if side in kept else _other(cover, rng) for side, cover in enumerate(covers)])


def _other(cover: str, rng: random.Random) -> str:
    return rng.choice([c for c in COVERS if c != cover])


def render_panorama(place: Place, rng: random.Random) -> Image.Image:
    """The view from the ground: the four sides next to each other, clockwise from the north-west."""
    return _image([[_ground_cell(place.city, cover, rng) for cover in place.covers]], rng)


def render_tile(place: Place, rng: random.Random) -> Image.Image:
    """The view from above: one quadrant per side, north up."""
    nw, ne, se, sw = (_aerial_cell(place.city, cover, rng) for cover in place.covers)
    return _image([[nw, ne], [sw, se]], rng)


def _image(cells: list[list[np.ndarray]], rng: random.Random) -> Image.Image:
    pixels = np.concatenate([np.concatenate(row, 1) for row in cells], 0)
    grain = np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape) % 17
    return Image.fromarray(np.clip(pixels + grain.astype(np.int32) - 8, 0, 255).astype(np.uint8))


def _city_names(rng: random.Random, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(_SYLLABLES) for _ in range(3)).capitalize()
        if name not in names:
            names.append(name)
    return names


def _make_city(name: str, rng: random.Random) -> City:
    haze = rng.randrange(-18, 19)

    def tint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
        red, green, blue = (min(255, max(0, value + haze + rng.randrange(-22, 23))) for value in colour)
        return red, green, blue

    return City(
        name=name,
        latitude=rng.randrange(-6500, 6500) / 100,
        longitude=rng.randrange(-18000, 18000) / 100,
        colour={cover: tint(_BASE_COLOUR[cover]) for cover in COVERS},
        sky=tint((170, 200, 230)),
        period=rng.randrange(4, 8),
        horizon=rng.randrange(9, 14),
    )


# Textures: boolean [28, 28] masks of dark and light pixels, given row y, column x, period and phase.
_Mask = Callable[[np.ndarray, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
_ROW, _COLUMN = np.mgrid[0:CELL, 0:CELL]
_FROM_ABOVE: dict[str, _Mask] = {
    "water": lambda y, x, p, s: ((y + s) % p == 0, (y + s) % p == 1),
    "woods": lambda y, x, p, s: (
        ((y + s) % p < 2) & ((x + s) % p < 2),
        ((y + s) % p == 3) & ((x + s) % p == 3),
    ),
    "sand": lambda y, x, p, s: ((y * 7 + x * 11 + s) % 29 == 0, (y * 5 + x * 3 + s) % 31 == 0),
    "roofs": lambda y, x, p, s: (((y + s) % (p + 2) < 2) | ((x + s) % (p + 2) < 2), np.zeros_like(y, bool)),
    "field": lambda y, x, p, s: ((x + s) % p == 0, (x + s) % p == 2),
    "rock": lambda y, x, p, s: ((y + x + s) % p == 0, (y - x + s) % (p + 3) == 0),
}


def _aerial_cell(city: City, cover: str, rng: random.Random) -> np.ndarray:
    dark, light = _FROM_ABOVE[cover](_ROW, _COLUMN, city.period, rng.randrange(CELL))
    return _shade(city.colour[cover], dark, light)


def _ground_cell(city: City, cover: str, rng: random.Random) -> np.ndarray:
    """Sky above the land cover, seen from its edge; trees, houses and peaks rise above the horizon."""
    phase, top = rng.randrange(CELL), city.horizon
    y, x = _ROW, (_COLUMN + phase) % CELL
    ground = y >= top
    zigzag = np.abs(x % 14 - 7)  # distance from the middle of a 14-pixel wide tree, house or peak
    risen = {
        "water": y < 0,
        "woods": (y >= top - 8 + zigzag) & (zigzag < 6),
        "sand": (y >= top - 2) & (zigzag < 3),
        "roofs": (y >= top - 6) & (zigzag < 5),
        "field": y < 0,
        "rock": y >= top - 9 + np.abs(x - 14),
    }[cover]
    depth = y - top
    dark = {
        "water": depth % city.period == 0,
        "woods": (zigzag == 0) & (depth > -4),
        "sand": (depth * 7 + x * 11) % 29 == 0,
        "roofs": (zigzag % 3 == 1) & (depth % 3 == 1),
        "field": (x - 14) * 3 // (depth + 4).clip(1) % 3 == 0,
        "rock": (x + y) % city.period == 0,
    }[cover]
    land = _shade(city.colour[cover], dark, np.zeros_like(dark))
    return np.where((ground | risen)[..., None], land, np.array(city.sky))


def _shade(colour: tuple[int, int, int], dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    return np.array(colour) + np.where(dark, -45, np.where(light, 30, 0))[..., None]
