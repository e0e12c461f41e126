"""Errors planted in the world's exemplars: the fact check's recall and precision by kind of error.

Every exemplar is checked as its teacher wrote it, and once more with one error in it. A finding in the first
is a false alarm, and so is one of another kind than the planted error in the second. For the table in
docs/data.md: PYTHONPATH=. python tests/data/planted.py 2000
"""

import random
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import count, cycle
from typing import NamedTuple

from geo_r1.data.teaching.rules import Limits, check
from geo_r1.data.teaching.world_teacher import LARGE, world_samples
from geo_r1.data.world import LETTERS
from geo_r1.places import distance_km, open_gazetteer

FAR_KM = 500.0  # a planted city or point is at least so far away

# What an error of one kind must bring along: an answer that changed is no longer the conclusion's.
ENTAILED = {"answer": {"conclusion"}, "structure": {"answer"}, "repetition": {"length"}}


class Counts(NamedTuple):
    """How often one kind of error was planted, found where planted, and found elsewhere."""

    planted: int
    found: int
    false: int

    @property
    def recall(self):
        return self.found / self.planted

    @property
    def precision(self):
        return self.found / (self.found + self.false) if self.found else 0.0


def measure(num, limits, seed=0):
    """Plant one error in each of `num` exemplars, kinds in turn.

    Returns:
        Counts by kind, and the share of untouched exemplars in which something was found.
    """
    gazetteer = open_gazetteer()
    planted, found, false, rejected = Counter(), Counter(), Counter(), 0
    for sample, kind, index in zip(world_samples(num, seed), cycle(PLANTERS), count()):
        good = {finding.kind for finding in check(sample, gazetteer, limits)}
        rejected += bool(good)
        false.update(good)
        bad = replace(sample, response=plant(sample, kind, random.Random(f"{seed}/{index}"), gazetteer))
        kinds_found = {finding.kind for finding in check(bad, gazetteer, limits)}
        planted[kind] += 1
        found[kind] += kind in kinds_found
        false.update(kinds_found - {kind} - ENTAILED.get(kind, set()))
    counts = {kind: Counts(planted[kind], found[kind], false[kind]) for kind in PLANTERS if planted[kind]}
    return counts, rejected / num


def plant(sample, kind, rng, gazetteer):
    """A sample's response with one error in it; `kind` is a key of PLANTERS."""
    changed = PLANTERS[kind](sample.response, sample.metadata, rng, gazetteer)
    assert changed != sample.response, f"nothing was planted of {kind}"
    return changed


def _elsewhere(place, rng, gazetteer):
    """A large city of another country, far from a place, as are all of its name."""

    def is_far(city):
        return distance_km(place["latitude"], place["longitude"], city.latitude, city.longitude) > FAR_KM

    here = gazetteer.country(place["country"])
    while True:
        city = rng.choice(gazetteer.all_cities)
        far = is_far(city) and all(map(is_far, gazetteer.city_names.get(city.name.casefold(), ())))
        named = gazetteer.country(city.name) is None  # Djibouti is a country before it is a city
        if far and city.population > LARGE and named and city.country != here.code:
            return city


def _city(text, place, rng, gazetteer):
    return text.replace(place["city"], _elsewhere(place, rng, gazetteer).name)


def _country(text, place, rng, gazetteer):
    other = gazetteer.countries[_elsewhere(place, rng, gazetteer).country].name
    city, *rest = re.split(f"({re.escape(place['city'])})", text)  # Singapore, Singapore: the country's alone
    return "".join(
        [city, *(part if part == place["city"] else part.replace(place["country"], other) for part in rest)]
    )


def _continent(text, place, rng, gazetteer):
    apart = {"Europe", "Asia"} if place["continent"] in ("Europe", "Asia") else {place["continent"]}
    others = sorted({c.continent for c in gazetteer.countries.values()} - apart)
    return text.replace(f"in {place['continent']}.", f"in {rng.choice(others)}.")


def _coordinates(text, place, rng, gazetteer):
    other = _elsewhere(place, rng, gazetteer)
    north, east = "NS"[other.latitude < 0], "EW"[other.longitude < 0]
    signed = f"({other.latitude:.2f}, {other.longitude:.2f})"
    lettered = f"{abs(other.latitude):.2f}°{north}, {abs(other.longitude):.2f}°{east}"
    return re.sub(
        r"\d+\.\d+°[NS], \d+\.\d+°[EW]", lettered, re.sub(r"\(-?\d+\.\d+, -?\d+\.\d+\)", signed, text)
    )


def _swap(one, other):
    pairs = (one, other), (one.capitalize(), other.capitalize())
    names = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return lambda text, *_: re.sub("|".join(names), lambda match: names[match[0]], text)


def _side(text, place, rng, gazetteer):
    visual, headed, rest = text.partition("\nKnowledge")
    return _swap("left", "right")(visual, place, rng, gazetteer) + headed + rest


def _letter_after(mark):
    def changed(text, place, rng, gazetteer):
        before, found, rest = text.rpartition(mark)
        letter = re.search(r"\b[A-J]\b", rest)
        other = rng.choice([x for x in LETTERS[: place["num_choices"]] if x != letter[0]])
        return before + found + rest[: letter.start()] + other + rest[letter.end() :]

    return changed


def _without_a_step(text, place, rng, gazetteer):
    lines = text.split("\n")
    del lines[rng.randrange(1, 5)]
    return "\n".join(lines)


def _torn(text, place, rng, gazetteer):
    return text.replace(rng.choice(("<think>", "</think>", "<answer>", "</answer>")), "")


def _long(text, place, rng, gazetteer):
    words = " ".join(f"{rng.choice(('tile', 'side', 'roof', 'tree'))} {i}" for i in range(1000))
    return text.replace("\nConclusion", f" {words}\nConclusion")


def _repeated(text, place, rng, gazetteer):
    evidence = re.search(r"\nEvidence corroboration: ([^\n]*)", text)
    return text.replace(evidence[1], " ".join([evidence[1]] * 4))


PLANTERS = {
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


if __name__ == "__main__":
    counts, rejected = measure(int(sys.argv[1]), Limits())
    for kind, c in counts.items():
        print(f"{kind:14} found {c.found} of {c.planted}, {c.recall:.1%}; false {c.false}, {c.precision:.1%}")
    print(f"{rejected:.2%} of the untouched exemplars were not kept")
