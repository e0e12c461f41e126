"""Choose the wrong tiles of each question.

There are many sites, and the bounds are mostly wide, so tiles are drawn uniformly for all sites of a city at
once, and those that do not fit are rejected. If a site still has too few tiles, or wants the nearest ones, a
ball tree finds them. The choice depends only on the seed and the site's id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from geo_r1.data.pairing.manifests import Sites
from geo_r1.errors import UserError
from geo_r1.places import EARTH_RADIUS_KM

KINDS = ("same_city", "nearest", "global")
DRAWS = (16, 128, 1024)  # per site; most need only the first; after the last, under one place in 100 fits
FEW = 8  # with at most this many places per draw, they are listed instead
WIDTHS = (8, 64, 512)  # neighbours tried per site, beyond those too near; after that, all are listed
ENTRIES = 1 << 20  # pairs of a site and a tile checked at once
EARTH_RADIUS_M = 1000 * EARTH_RADIUS_KM
LEAF = 8  # places: breadth first, 12 neighbours of 16 K take 45 us per site; 190 with the tree's defaults
SLACK = 1e-9  # radians, 6 mm: allows for rounding in the tree and here
FAR = 3.14  # radians; from here on the tree misses antipodes
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Places:
    """The tiles' locations: tiles with the same coordinates, to a tenth of a metre, are one place.

    If rows disagree about a tile's coordinates, the first row counts.

    Attributes:
        of_site: [N] the place of each site's own tile.
        row: [P] the site whose tile shows the place.
        latitude, longitude: [P] degrees.
        reach: [P] metres from the place to the farthest coordinates that a row gives for it.
        of_tile: the place of each satellite path.
    """

    def __init__(self, sites: Sites) -> None:
        first = dict(zip(reversed(sites.satellite), range(len(sites) - 1, -1, -1), strict=True))
        first_N = np.array([first[path] for path in sites.satellite], dtype=np.int64)
        latitude, longitude = sites.tile_latitude[first_N], sites.tile_longitude[first_N]
        north = np.rint(latitude * 1e6).astype(np.int64)
        east = np.rint(longitude * 1e6).astype(np.int64) % 360_000_000
        east[np.abs(north) == 90_000_000] = 0  # all longitudes meet at a pole
        _, index, self.of_site = np.unique(north * 400_000_000 + east, return_index=True, return_inverse=True)
        self.row = first_N[index]
        self.latitude, self.longitude = sites.tile_latitude[self.row], sites.tile_longitude[self.row]
        here = _radians(self.latitude, self.longitude)[self.of_site]
        self.reach = np.zeros(len(index))
        strays = _metres(_radians(sites.tile_latitude, sites.tile_longitude), here)
        np.maximum.at(self.reach, self.of_site, strays)
        self.of_tile = {path: int(self.of_site[row]) for path, row in first.items()}


class Chooser:
    """Chooses wrong tiles for sites from the tiles of all sites.

    A wrong tile is at least `min_distance` and at most `max_distance` metres from the site on the great
    circle, and is neither the site's own nor its semi-positive. No two tiles of a site are at one place.

    Args:
        num_wrong: [N] number of wrong tiles per site, 2 to 9.
        max_distance: None for no bound.

    Attributes:
        row: [N, max of num_wrong] the sites whose tiles were chosen; -1 past a site's number, and in its
            whole row if it has too few.
        distance: [N, max of num_wrong] metres from the site to each; NaN for -1.
    """

    def __init__(
        self,
        sites: Sites,
        num_wrong: np.ndarray,
        *,
        min_distance: float,
        max_distance: float | None,
        seed: int,
    ) -> None:
        self.places = Places(sites)
        self.num_wrong = num_wrong
        self.least, self.most = min_distance, np.inf if max_distance is None else max_distance
        self.site = _radians(sites.latitude, sites.longitude)
        self.place = _radians(self.places.latitude, self.places.longitude)
        self.key = keys(sites.id, f"{seed}/confusers")
        self.place_key = keys([sites.satellite[row] for row in self.places.row.tolist()], "tiles")
        tiles = self.places.of_tile
        pairs = [(i, tiles.get(name, -1)) for i, semi in enumerate(sites.semi_positives) for name in semi]
        owner, semi = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        own = self._pair(np.arange(len(sites)), self.places.of_site)
        self.excluded = np.unique(np.concatenate([own, self._pair(owner, semi)[semi >= 0]]))
        shape = len(sites), int(num_wrong.max(initial=0))
        self.row, self.distance = np.full(shape, -1), np.full(shape, np.nan)

    def choose(self, kind: str, members: np.ndarray, progress: Callable[[int], None] | None = None) -> None:
        """Choose wrong tiles for these sites from these sites' tiles.

        Args:
            kind: "nearest" takes the closest tiles that fit; any other draws uniformly from those that fit.
            members: positions of the sites of a city or of a whole split.
            progress: called with the number of sites just finished.
        """
        candidates = np.unique(self.places.of_site[members])
        group = _Group(candidates, self.place[candidates])
        rest, nearest = members, kind == "nearest"
        for step in WIDTHS if nearest else DRAWS:
            before = len(rest)
            size = np.full(before, len(candidates))
            if step > DRAWS[0]:
                size = group.count(self.site[rest], self.most, SLACK)
            few = size <= (step if nearest else FEW * step)
            self._enumerated(group, rest[few], nearest)
            rest = rest[~few]
            rest = self._nearest(group, rest, step) if nearest else self._drawn(group, rest, step)
            rest = self._possible(group, rest)
            if progress:
                progress(before - len(rest))
        self._enumerated(group, rest, nearest)
        if progress:
            progress(len(rest))
        self._shuffle(members)

    def _drawn(self, group: _Group, members: np.ndarray, draws: int) -> np.ndarray:
        """Take the first draws that fit; return the sites that still have too few."""
        for chunk in _chunks(members, np.full(len(members), draws)):
            index = self._indices(chunk, draws, len(group.candidates))
            self._settle(np.repeat(chunk, draws), group.candidates[index].ravel())
        return self._short(members)

    def _nearest(self, group: _Group, members: np.ndarray, width: int) -> np.ndarray:
        """Try the nearest places (if wide, beyond those too near); return the sites with too few."""
        wanted = self.num_wrong[members] + width
        if width > WIDTHS[0]:
            wanted += group.count(self.site[members], self.least, -SLACK)
        wanted = np.minimum(wanted, len(group.candidates))
        order = np.argsort(wanted, kind="stable")
        for chunk, size in _chunks_of(members[order], wanted[order]):
            k = int(size.max())
            index = group.tree.query(self.site[chunk], k=k, return_distance=False, breadth_first=True)
            self._settle(np.repeat(chunk, k), group.candidates[index].ravel())
        return self._short(members)

    def _possible(self, group: _Group, members: np.ndarray) -> np.ndarray:
        """Drop sites that cannot have enough tiles, by counts alone."""
        inside = group.count(self.site[members], self.most, SLACK)
        near = group.count(self.site[members], self.least, -SLACK)
        return members[inside - near >= self.num_wrong[members]]

    def _enumerated(self, group: _Group, members: np.ndarray, by_distance: bool) -> None:
        """List every place within the upper bound; draw from the list, and go through it if that fails."""
        members = self._possible(group, members)
        for chunk in _chunks(members, group.count(self.site[members], self.most, SLACK)):
            found = group.within(self.site[chunk], self.most)
            size = np.array([len(index) for index in found])
            candidate = group.candidates[np.concatenate(found)]
            if by_distance:
                owner = np.repeat(chunk, size)
                priority = _metres(self.site[owner], self.place[candidate])
            else:
                index = (np.cumsum(size) - size)[:, None] + self._indices(chunk, DRAWS[0] * 2, size[:, None])
                self._settle(np.repeat(chunk, index.shape[1]), candidate[index].ravel())
                short = self.row[chunk, 0] < 0
                candidate = candidate[np.repeat(short, size)]
                owner = np.repeat(chunk[short], size[short])
                priority = _mixed(self.key[owner], self.place_key[candidate])
            order = np.lexsort((candidate, priority, owner))
            self._settle(owner[order], candidate[order])

    def _indices(self, members: np.ndarray, draws: int, below: Any) -> np.ndarray:
        """[members, draws] random integers from 0 to `below` - 1."""
        numbers = _mixed(self.key[members][:, None], np.arange(draws, dtype=np.uint64))
        return ((numbers >> np.uint64(11)) * 2.0**-53 * below).astype(np.int64)

    def _settle(self, owner: np.ndarray, candidate: np.ndarray) -> None:
        """Give each owner its first candidates that fit, if there are enough; equal owners are adjacent."""
        distance = _metres(self.site[owner], self.place[candidate])
        pair = self._pair(owner, candidate)
        fits = (distance >= self.least + self.places.reach[candidate]) & (distance <= self.most)
        place = np.searchsorted(self.excluded, pair)
        fits &= self.excluded[np.minimum(place, len(self.excluded) - 1)] != pair
        kept = np.flatnonzero(fits)
        first = np.sort(np.unique(pair[kept], return_index=True)[1])
        kept = kept[first]  # each place once
        owner, candidate, distance = owner[kept], candidate[kept], distance[kept]
        start = np.flatnonzero(np.diff(owner, prepend=-1))
        count = np.diff(start, append=len(owner))
        rank = np.arange(len(owner)) - np.repeat(start, count)
        wanted = self.num_wrong[owner]
        taken = (rank < wanted) & (np.repeat(count, count) >= wanted)
        self.row[owner[taken], rank[taken]] = self.places.row[candidate[taken]]
        self.distance[owner[taken], rank[taken]] = distance[taken]

    def _short(self, members: np.ndarray) -> np.ndarray:
        return members[self.row[members, 0] < 0]

    def _shuffle(self, members: np.ndarray) -> None:
        """Shuffle each site's tiles."""
        priority = _mixed(
            self.key[members][:, None], np.arange(1, self.row.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
        )
        absent = np.arange(self.row.shape[1]) >= self.num_wrong[members][:, None]
        order = np.argsort(np.where(absent, np.uint64(2**64 - 1), priority), axis=1, kind="stable")
        for column in (self.row, self.distance):
            column[members] = np.take_along_axis(column[members], order, 1)

    def _pair(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        return owner * len(self.places.row) + place


class _Group:
    """Places to choose from, and their ball tree."""

    def __init__(self, candidates: np.ndarray, place: np.ndarray) -> None:
        self.candidates = candidates
        self._place = place
        self._tree: Any = None

    @property
    def tree(self) -> Any:
        if self._tree is None:
            try:
                from sklearn.neighbors import BallTree
            except ImportError:
                raise UserError("choosing tiles needs scikit-learn: pip install 'geo_r1[data]'") from None
            self._tree = BallTree(self._place, metric="haversine", leaf_size=LEAF)
        return self._tree

    def count(self, sites: np.ndarray, metres: float, slack: float) -> np.ndarray:
        """The number of places within this distance of each site."""
        radius = metres / EARTH_RADIUS_M + slack
        if radius < 0 or not len(sites):
            return np.zeros(len(sites), np.int64)
        if radius > (FAR if slack > 0 else np.pi):
            return np.full(len(sites), len(self.candidates))
        return self.tree.query_radius(sites, r=radius, count_only=True)

    def within(self, sites: np.ndarray, metres: float) -> list[np.ndarray]:
        """The places within this distance of each site, and maybe some beyond."""
        radius = metres / EARTH_RADIUS_M + SLACK
        if radius > FAR:
            return [np.arange(len(self.candidates))] * len(sites)
        return list(self.tree.query_radius(sites, r=radius))


def _chunks(members: np.ndarray, size: np.ndarray) -> Iterator[np.ndarray]:
    return (chunk for chunk, _ in _chunks_of(members, size))


def _chunks_of(members: np.ndarray, size: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut into chunks whose sizes add up to about `ENTRIES`."""
    cuts = np.flatnonzero(np.diff(np.cumsum(size) // ENTRIES)) + 1
    if len(members):
        yield from zip(np.split(members, cuts), np.split(size, cuts), strict=True)


def _radians(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    return np.radians(np.stack([latitude, longitude], 1))


def _metres(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Great-circle metres between [n, 2] points in radians; the formula of `places.distance_km`."""
    turn = np.sin((there - here) / 2) ** 2
    half = turn[:, 0] + np.cos(here[:, 0]) * np.cos(there[:, 0]) * turn[:, 1]
    return 2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


def keys(names: Sequence[str], stream: str) -> np.ndarray:
    """64 random bits per name and stream, the same at every call."""
    prefix = blake2b(f"{stream}/".encode(), digest_size=8)
    digests = []
    for name in names:
        digest = prefix.copy()
        digest.update(name.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _mixed(key: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The number-th draw of 64 bits from a key's stream: SplitMix64 (Steele, Lea, Flood, 2014)."""
    z = key + (number + np.uint64(1)) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
