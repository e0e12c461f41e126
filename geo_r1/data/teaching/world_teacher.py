"""A teacher for the procedural world that reasons like Geo-R1's: four steps of prose that name a place.

The world's cities and their coordinates are made up. Here each stands for a real city of the gazetteer, so
that claims in a chain of thought (city, country, continent, coordinates, hemisphere, side of traffic) can be
checked against metadata, as with real photographs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from geo_r1.data.exemplars import association, question
from geo_r1.data.sample import Sample
from geo_r1.data.world import LETTERS, SIDES, Pairing, World
from geo_r1.places import City, Country, open_gazetteer

LARGE = 300_000  # inhabitants; smaller real cities are not used
_SIDE_NAMES = dict(zip(SIDES, ("north-west", "north-east", "south-east", "south-west"), strict=True))


def world_samples(num: int, seed: int = 0) -> Iterator[Sample]:
    """Training questions of a world, with responses in four steps and the places' metadata.

    Args:
        num: number of samples.
        seed: determines the world and the teacher's wording.
    """
    world, gazetteer = World(seed=seed), open_gazetteer()
    twins = [city for city in gazetteer.all_cities if city.population >= LARGE]
    for index in range(num):
        pairing, sample = world.pairing("train", index), question(world, "train", index)
        rng = random.Random(f"{seed}/{pairing.id}/place")
        city = random.Random(f"{seed}/{pairing.place.city.name}/twin").choice(twins)
        country = gazetteer.countries[city.country]
        thought = _thought(pairing, city, country, rng)
        yield Sample(
            id=sample.id,
            messages=sample.messages,
            images=sample.images,
            response=f"<think>\n{thought}\n</think>\n<answer>{pairing.answer}</answer>",
            answer=pairing.answer,
            metadata={
                "num_choices": world.num_candidates,
                "city": city.name,
                "country": country.name,
                "continent": country.continent,
                "latitude": round(city.latitude, 4),
                "longitude": round(city.longitude, 4),
                "driving_side": country.driving_side,
            },
        )


def _thought(pairing: Pairing, city: City, country: Country, rng: random.Random) -> str:
    cues = dict(zip(_SIDE_NAMES.values(), pairing.place.covers, strict=True))
    side = country.driving_side
    traffic = rng.choice(
        (f"Vehicles drive on the {side}.", f"Traffic keeps to the {side}.", f"This is {side}-hand traffic.")
    )
    seen = ", ".join(f"{cover} to the {where}" for where, cover in cues.items())
    visual = f"Visual cues: The panorama shows {seen}. {traffic}"
    knowledge = f"Knowledge association: {_association(pairing, city, country, rng)}"
    evidence = f"Evidence corroboration: {_evidence(pairing)}"
    conclusion = rng.choice(
        ("Tile {0} is the only one that fits.", "The matching tile is {0}.", "Therefore the answer is {0}.")
    )
    return "\n".join((visual, knowledge, evidence, f"Conclusion: {conclusion.format(pairing.answer)}"))


def _association(pairing: Pairing, city: City, country: Country, rng: random.Random) -> str:
    north, east = ("N", "S")[city.latitude < 0], ("E", "W")[city.longitude < 0]
    latitude, longitude = abs(city.latitude), abs(city.longitude)
    kind = association(pairing.place.covers)
    place = rng.choice(
        (
            f"Such a {kind} is found in {city.name}, {country.name}.",
            f"This is typical of {city.name} in {country.name}.",
            f"The {kind} suggests {city.name}, {country.name}, rather than another city.",
        )
    )
    where = rng.choice(
        (
            f"It lies at about {latitude:.2f}°{north}, {longitude:.2f}°{east}, in {country.continent}.",
            f"Its coordinates are ({city.latitude:.2f}, {city.longitude:.2f}), in {country.continent}.",
        )
    )
    hemisphere = "southern" if city.latitude < 0 else "northern"
    sun = rng.choice(
        (
            f"That is the {hemisphere} hemisphere.",
            f"The shadows agree with the {hemisphere.capitalize()} Hemisphere.",
        )
    )
    return f"{place} {where} {sun}"


def _evidence(pairing: Pairing) -> str:
    return " ".join(
        f"Tile {letter} {_verdict(pairing.place.covers, tile.covers)}"
        for letter, tile in zip(LETTERS, pairing.candidates, strict=False)
    )


def _verdict(cues: Sequence[str], tile: Sequence[str]) -> str:
    for where, cue, seen in zip(_SIDE_NAMES.values(), cues, tile, strict=True):
        if cue != seen:
            return f"has {seen} to the {where}, where the panorama has {cue}, so it is out."
    return "agrees on every side."
