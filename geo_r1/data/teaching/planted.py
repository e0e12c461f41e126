"""How good is the fact check? Errors planted in the world's exemplars: recall and precision by kind.

Every exemplar is checked as its teacher wrote it, and once more with one error in it. What is found in the
first is a false alarm; in the second, what is found of another kind than was planted is one, too.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from geo_r1.data.sample import Sample
from geo_r1.data.teaching.rules import Limits, check
from geo_r1.data.teaching.world_teacher import LARGE, world_samples
from geo_r1.data.world import LETTERS
from geo_r1.places import City, Gazetteer, distance_km, open_gazetteer

FAR_KM = 500.0  # a planted city or point is at least so far away

# What an error of one kind must bring along: an answer that changed is no longer the conclusion's.
ENTAILED = {"answer": {"conclusion"}, "structure": {"answer"}, "repetition": {"length"}}


@dataclass(frozen=True)
class Counts:
    """Of one kind of error: planted, found where planted, and found where not."""

    planted: int
    found: int
    false: int

    @property
    def recall(self) -> float:
        return self.found / self.planted

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.false) if self.found else 0.0


def measure(num: int, limits: Limits, console: Console, seed: int = 0) -> tuple[dict[str, Counts], float]:
    """Plant one error in each of `num` exemplars, kinds in turn; prints the table.

    Returns:
        Counts by kind, and the share of untouched exemplars in which something was found.
    """
    gazetteer = open_gazetteer()
    planted, found, false, rejected = Counter[str](), Counter[str](), Counter[str](), 0
    kinds = [*PLANTERS]
    for index, sample in enumerate(track(world_samples(num, seed), "exemplars", num, console=console)):
        good = {finding.kind for finding in check(sample, gazetteer, limits)}
        rejected += bool(good)
        false.update(good)
        kind = kinds[index % len(kinds)]
        bad = replace(sample, response=plant(sample, kind, random.Random(f"{seed}/{index}"), gazetteer))
        kinds_found = {finding.kind for finding in check(bad, gazetteer, limits)}
        planted[kind] += 1
        found[kind] += kind in kinds_found
        false.update(kinds_found - {kind} - ENTAILED.get(kind, set()))
    counts = {kind: Counts(planted[kind], found[kind], false[kind]) for kind in kinds if planted[kind]}
    console.print(_table(counts, rejected / num, num))
    return counts, rejected / num


def plant(sample: Sample, kind: str, rng: random.Random, gazetteer: Gazetteer) -> str:
    """A sample's response with one error of a kind in it.

    Args:
        kind: a key of `PLANTERS`.
    """
    text = sample.response or ""
    changed = PLANTERS[kind](text, sample.metadata, rng, gazetteer)
    assert changed != text, f"nothing was planted of {kind}"
    return changed


def _elsewhere(place: Any, rng: random.Random, gazetteer: Gazetteer) -> City:
    """A large city of another country and continent's name, far from a place."""
    here = gazetteer.country(place["country"])
    while True:
        city = rng.choice(gazetteer.all_cities)
        far = distance_km(place["latitude"], place["longitude"], city.latitude, city.longitude) > FAR_KM
        namesakes = gazetteer.city_names.get(city.name.casefold(), ())
        near = any(
            distance_km(place["latitude"], place["longitude"], c.latitude, c.longitude) < FAR_KM
            for c in namesakes
        )
        named = gazetteer.country(city.name) is None  # Djibouti is a country before it is a city
        large = city.population > LARGE
        if far and not near and large and named and here and city.country != here.code:
            return city


def _city(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    return text.replace(place["city"], _elsewhere(place, rng, gazetteer).name)


def _country(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    other = gazetteer.countries[_elsewhere(place, rng, gazetteer).country].name
    city, *rest = re.split(f"({re.escape(place['city'])})", text)  # Singapore, Singapore: the country's alone
    return "".join(
        [city, *(part if part == place["city"] else part.replace(place["country"], other) for part in rest)]
    )


def _continent(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    apart = {"Europe", "Asia"} if place["continent"] in ("Europe", "Asia") else {place["continent"]}
    others = sorted({c.continent for c in gazetteer.countries.values()} - apart)
    return text.replace(f"in {place['continent']}.", f"in {rng.choice(others)}.")


def _coordinates(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    other = _elsewhere(place, rng, gazetteer)
    north, east = "NS"[other.latitude < 0], "EW"[other.longitude < 0]
    signed = f"({other.latitude:.2f}, {other.longitude:.2f})"
    lettered = f"{abs(other.latitude):.2f}°{north}, {abs(other.longitude):.2f}°{east}"
    return re.sub(
        r"\d+\.\d+°[NS], \d+\.\d+°[EW]", lettered, re.sub(r"\(-?\d+\.\d+, -?\d+\.\d+\)", signed, text)
    )


def _swap(one: str, other: str) -> Callable[..., str]:
    def swapped(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
        names = {
            one: other,
            other: one,
            one.capitalize(): other.capitalize(),
            other.capitalize(): one.capitalize(),
        }
        return re.sub("|".join(names), lambda match: names[match[0]], text)

    return swapped


def _side(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    visual, headed, rest = text.partition("\nKnowledge")
    return _swap("left", "right")(visual, place, rng, gazetteer) + headed + rest


def _letter_after(mark: str) -> Callable[..., str]:
    def changed(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
        before, found, rest = text.rpartition(mark)
        letter = re.search(r"\b[A-J]\b", rest)
        assert letter is not None
        other = rng.choice([x for x in LETTERS[: place["num_choices"]] if x != letter[0]])
        return before + found + rest[: letter.start()] + other + rest[letter.end() :]

    return changed


def _without_a_step(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    lines = text.split("\n")
    del lines[rng.randrange(1, 5)]
    return "\n".join(lines)


def _torn(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    return text.replace(rng.choice(("<think>", "</think>", "<answer>", "</answer>")), "")


def _long(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    words = " ".join(f"{rng.choice(('tile', 'side', 'roof', 'tree'))} {i}" for i in range(1000))
    return text.replace("\nConclusion", f" {words}\nConclusion")


def _repeated(text: str, place: Any, rng: random.Random, gazetteer: Gazetteer) -> str:
    evidence = re.search(r"\nEvidence corroboration: ([^\n]*)", text)
    assert evidence is not None
    return text.replace(evidence[1], " ".join([evidence[1]] * 4))


PLANTERS: dict[str, Callable[..., str]] = {
    "city": _city,
    "country": _country,
    "continent": _continent,
    "coordinates": _coordinates,
    "hemisphere": _swap("northern", "southern"),
    "driving_side": _side,
    "answer": _letter_after("<answer>"),
    "conclusion": _letter_after("Conclusion:"),
    "steps": _without_a_step,
    "structure": _torn,
    "length": _long,
    "repetition": _repeated,
}


def _table(counts: dict[str, Counts], rejected: float, num: int) -> Table:
    table = Table(title=f"fact check of {num} exemplars, one planted error each")
    for column in ("kind of error", "planted", "found", "recall", "false alarms", "precision"):
        table.add_column(column, justify="left" if column == "kind of error" else "right")
    for kind, c in counts.items():
        table.add_row(
            kind, str(c.planted), str(c.found), f"{c.recall:.1%}", str(c.false), f"{c.precision:.1%}"
        )
    table.caption = f"{rejected:.2%} of the untouched exemplars were not kept"
    return table
