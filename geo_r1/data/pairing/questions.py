"""The cross-view questions of one split: wrong tiles, letters and rows."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from geo_r1.data.pairing.confusers import Chooser, keys
from geo_r1.data.pairing.images import STITCHED_PIXELS, Images, Stitch
from geo_r1.data.pairing.manifests import Sites
from geo_r1.data.pairing.tables import Drops
from geo_r1.data.processes import in_processes
from geo_r1.errors import UserError

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
QUESTION = (
    "The first picture was taken on the ground. Exactly one of the satellite tiles {labels} shows the spot "
    "where it was taken. "
)
STITCHED_QUESTION = (
    "The upper part of the picture was taken on the ground. Exactly one of the satellite tiles below it, "
    "labelled {labels}, shows the spot where it was taken. "
)
SUFFIX = (
    "Which one? Compare what is seen from the ground with each tile. Think in <think> </think>, then give "
    "the letter of the tile in <answer> </answer>."
)


class Questions:
    """The questions of a split: their sites, wrong tiles, and letters of the right tiles.

    Raises:
        UserError: no question can be made.
    """

    def __init__(
        self,
        sites: Sites,
        split: str,
        options: argparse.Namespace,
        drops: Drops,
        images: Images,
        step: Any,
    ) -> None:
        self.split, self.options, self.images = split, options, images
        least, most = options.k_range or (options.k, options.k)
        k = least + (keys(sites.id, f"{options.seed}/k") % np.uint64(most - least + 1)).astype(np.int64)
        chooser = Chooser(
            sites,
            k - 1,
            min_distance=options.min_distance,
            max_distance=options.max_distance,
            seed=options.seed,
        )
        number = {
            city: 0 if options.confusers == "global" else i
            for i, city in enumerate(dict.fromkeys(sites.city))
        }
        codes = np.array([number[city] for city in sites.city])
        order = np.argsort(codes, kind="stable")
        progress = step(f"choosing for {split}", len(sites))
        for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            chooser.choose(options.confusers, members, progress)
        short = chooser.row[:, 0] < 0
        for i in np.flatnonzero(short).tolist():
            drops.add("too few tiles within the bounds", f"{sites.id[i]!r:.80}")
        rows = np.flatnonzero(~short)
        if not len(rows):
            raise UserError(
                f"no question for {split}: not one of {len(sites)} sites has {least - 1} wrong tiles from "
                f"{options.min_distance:g} m to {chooser.most:g} m away; lower -k or "
                "--min-distance, raise --max-distance, or use --confusers global"
            )
        # shuffled, so that the first n rows of a file come from all its cities
        rows = generator(options.seed, f"{split}/order").permutation(rows)[: options.limit]
        self.sites, self.all_satellites = sites.take(rows), sites.satellite
        self.k, self.wrong, self.distance = k[rows], chooser.row[rows], chooser.distance[rows]
        self.truth = np.zeros(len(rows), np.int64)
        for choices in np.unique(self.k).tolist():
            here = np.flatnonzero(self.k == choices)
            chance = generator(options.seed, f"{split}/answers/{choices}")
            # letters are equally frequent, give or take one
            letters = (np.arange(len(here)) + chance.integers(choices)) % choices
            self.truth[here] = chance.permutation(letters)

    def write(self, path: Path, out: Path, step: Any) -> dict[str, Any]:
        """Write one row per question; return the split's entry in the card."""
        progress = step(f"writing {self.split}", len(self.k))
        folder = f"{out}/"
        images: Iterator[list[str]] = (self._images(i) for i in range(len(self.k)))
        if self.options.stitch:
            stitch = Stitch(out / "stitched", self.options.max_pixels or STITCHED_PIXELS)
            pages = in_processes(stitch, images, self.options.num_workers)
            images = ([page] for page in pages)
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with path.open("w", encoding="utf-8") as file:
            for i, shown in enumerate(images):
                row = self._row(i, [name.removeprefix(folder) for name in shown])
                file.write(encode(row) + "\n")
                if i % 1024 == 1023:
                    progress(1024)
        progress(len(self.k) % 1024)
        pairs = zip(self.k.tolist(), self.truth.tolist(), strict=True)
        distances = np.quantile(self.distance[~np.isnan(self.distance)], QUANTILES)
        return {
            "questions": len(self.k),
            "cities": dict(sorted(Counter(self.sites.city).items())),
            "k": {str(k): n for k, n in sorted(Counter(self.k.tolist()).items())},
            "answers": {
                f"{ascii_uppercase[truth]} of {k}": n for (k, truth), n in sorted(Counter(pairs).items())
            },
            "confuser_distance_m": {
                f"{q:.0%}": round(d, 1) for q, d in zip(QUANTILES, distances.tolist(), strict=True)
            },
        }

    def _images(self, i: int) -> list[str]:
        """Paths of the ground image and of the tiles in order."""
        tiles = [self.all_satellites[row] for row in self.wrong[i, : self.k[i] - 1].tolist()]
        tiles.insert(int(self.truth[i]), self.sites.satellite[i])
        return [self.images[path] for path in (self.sites.ground[i], *tiles)]

    def _row(self, i: int, images: list[str]) -> dict[str, Any]:
        k = int(self.k[i])
        distances = self.distance[i, : k - 1].tolist()
        return {
            "id": self.sites.id[i],
            "prompt": prompt(k, self.options.stitch),
            "images": images,
            "answer": ascii_uppercase[self.truth[i]],
            "num_choices": k,
            "city": self.sites.city[i],
            "latitude": float(self.sites.latitude[i]),
            "longitude": float(self.sites.longitude[i]),
            "confusers": self.options.confusers,
            "confuser_distances_m": [round(metres, 1) for metres in distances],
            "difficulty": round(difficulty(distances), 4),
        }


def prompt(k: int, stitch: bool = False) -> str:
    """The text of a question with k tiles, with markers for the images."""
    letters = ascii_uppercase[:k]
    labels = f"{letters[0]} to {letters[-1]}"
    if stitch:
        return f"<image>\n{STITCHED_QUESTION.format(labels=labels)}{SUFFIX}"
    marks = "".join(f" {letter} <image>" for letter in letters)
    return f"<image>{marks}\n{QUESTION.format(labels=labels)}{SUFFIX}"


def difficulty(distances: Sequence[float]) -> float:
    """Minus the decimal logarithm of the wrong tiles' mean distance in metres: higher is harder.

    100 m is -2, 10 km is -4; below a tenth of a metre it is 1.
    """
    return -float(np.log10(max(0.1, sum(distances) / len(distances))))


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator with its own stream for each seed and name."""
    return np.random.default_rng([*f"{seed}/{name}".encode()])
