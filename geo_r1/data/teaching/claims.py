"""A text's claims about a place: city, country, continent, coordinates, hemisphere, side of traffic.

A chain of thought names many places without claiming to be there: it compares with them, rules them out,
reads them on a sign. So a name counts only if it identifies the place: after words that do so ("this is",
"located in", "so", "suggests"), after another such name, or in the conclusion; never after words that reject
it ("unlike", "could be"). If a list names several places of one kind, one must be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geo_r1.data.teaching import phrases
from geo_r1.places import City, Gazetteer, distance_km, fold, parse_coordinates

LONGEST_SPAN = 5  # words in a name
PARTICLE = 4  # letters of a small word within a name: "de", "das", "upon"
NEAR = 120  # characters before a name that decide whether it is a claim
EQUATOR = 0.1  # degrees; this near to the equator or to 0 or 180 east, either hemisphere is right
KNOWN = 100_000  # inhabitants; the name of a smaller city needs a cue
LARGE = 500_000  # inhabitants; a name that begins a sentence needs a cue if its city is smaller
SHORT_NAMES = {"US", "USA", "UK", "UAE", "DRC"}  # most other upper-case words are not countries: TV, AC, NO
TWO_CONTINENTS = {"RU", "TR", "KZ", "GE", "AZ", "AM", "CY"}  # in Europe and Asia, in part or by custom


@dataclass(frozen=True)
class Contradiction:
    """A claim that the metadata contradicts.

    Attributes:
        kind: city, country, continent, coordinates, hemisphere or driving_side.
        said: the words of the text.
        known: the value in the metadata.
    """

    kind: str
    said: str
    known: str


def contradictions(
    text: str,
    metadata: Mapping[str, Any],
    gazetteer: Gazetteer,
    city_km: float,
    coordinate_km: float,
    conclusion: str = "",
) -> Iterator[Contradiction]:
    """Claims in a text that contradict a sample's metadata; a claim without metadata is not judged.

    Args:
        metadata: any of city, country, continent, latitude and longitude in degrees, driving_side.
        city_km: a named city farther away than this is wrong.
        coordinate_km: coordinates farther away than this are wrong.
        conclusion: the part of the text in which every name counts unless it is rejected.
    """
    truth = _Truth(metadata, gazetteer, city_km, coordinate_km)
    before, found, after = text.partition(conclusion) if conclusion else (text, "", "")
    for part, concludes in ((before, False), (found, True), (after, False)):
        for sentence in phrases.SENTENCE.split(part):
            mentions = list(_mentions(sentence, truth, gazetteer))
            yield from _of_numbers(sentence, truth, mentions)
            yield from _of_names(sentence, truth, mentions, concludes)


class _Truth:
    """The known facts about a place, and checks of claims against them."""

    def __init__(
        self, metadata: Mapping[str, Any], gazetteer: Gazetteer, city_km: float, coordinate_km: float
    ) -> None:
        latitude, longitude = metadata.get("latitude"), metadata.get("longitude")
        self.point: tuple[float, float] | None = None
        if isinstance(latitude, int | float) and isinstance(longitude, int | float):
            self.point = float(latitude), float(longitude)
        self.city: str | None = metadata.get("city")
        country = metadata.get("country")
        self.country = gazetteer.country(str(country)) if country else None
        self.continent = gazetteer.continent(str(metadata.get("continent") or ""))
        if self.continent is None and self.country:
            self.continent = self.country.continent
        self.side = metadata.get("driving_side") or (self.country and self.country.driving_side)
        self.city_km, self.coordinate_km = city_km, coordinate_km
        self.same_city = gazetteer.same_city

    @property
    def shown(self) -> str:
        return f"{self.point[0]}, {self.point[1]}" if self.point else "elsewhere"

    def is_city(self, name: str, cities: Sequence[City]) -> bool:
        if self.city and (fold(name) in fold(self.city) or self.same_city(name, self.city)):
            return True
        if self.point is not None:
            return any(distance_km(*self.point, c.latitude, c.longitude) <= self.city_km for c in cities)
        if self.city is None:  # only a country is known
            return self.country is None or any(c.country == self.country.code for c in cities)
        return False

    def is_continent(self, name: str) -> bool:
        if self.continent is None or name == self.continent:
            return True
        return bool(self.country and self.country.code in TWO_CONTINENTS and name in ("Europe", "Asia"))


@dataclass(frozen=True)
class _Mention:
    """A place name in a sentence, and whether it agrees with the truth."""

    kind: str
    words: str
    start: int
    end: int
    agrees: bool


def _of_numbers(sentence: str, truth: _Truth, mentions: Sequence[_Mention]) -> Iterator[Contradiction]:
    """Check coordinates, hemispheres and the side of traffic, unless they belong to another place."""

    def meant(start: int) -> bool:
        begin = sentence.rfind(";", 0, start)
        elsewhere = any(begin < m.start < start for m in mentions if not m.agrees and m.kind != "continent")
        clause = _clause_before(sentence, start)
        return (
            not elsewhere and not phrases.ASIDE.search(clause.lower()) and not phrases.PEOPLE.search(clause)
        )

    if truth.point is not None:
        for latitude, longitude in parse_coordinates(sentence):
            distance = distance_km(*truth.point, latitude, longitude)
            if distance > truth.coordinate_km:
                known = f"{truth.shown}, {distance:.0f} km away"
                yield Contradiction("coordinates", f"{latitude}, {longitude}", known)
        for match in (m for pattern in phrases.HEMISPHERE for m in pattern.finditer(sentence)):
            half = match[1].lower()
            value = truth.point[half in ("eastern", "western")]
            edge = min(abs(value), 180 - abs(value))
            if edge > EQUATOR and (value > 0) != (half in phrases.NORTH_OR_EAST) and meant(match.start()):
                yield Contradiction("hemisphere", match[0], truth.shown)
    for match in (m for pattern in phrases.TRAFFIC for m in pattern.finditer(sentence)):
        if truth.side and match[1].lower() != truth.side and meant(match.start()):
            yield Contradiction("driving_side", match[0], f"traffic is on the {truth.side}")


def _of_names(
    sentence: str, truth: _Truth, mentions: Sequence[_Mention], concludes: bool
) -> Iterator[Contradiction]:
    """Check the cities, countries and continents that a sentence claims."""
    known = {
        "city": truth.city or truth.shown,
        "country": truth.country and truth.country.name,
        "continent": truth.continent,
    }
    claimed: list[_Mention] = []
    for mention in mentions:
        behind = (
            bool(claimed) and phrases.PAIRED.fullmatch(_between(sentence, claimed[-1], mention)) is not None
        )
        if behind or _claimed(sentence, mention, concludes):
            claimed.append(mention)
    for mention in claimed:
        if mention.kind and not any(m.agrees for m in _listed(sentence, mention, mentions)):
            yield Contradiction(mention.kind, mention.words, str(known[mention.kind]))


def _listed(sentence: str, mention: _Mention, mentions: Sequence[_Mention]) -> list[_Mention]:
    """A name and the names of its kind in the same list: "Peru, Chile and Bolivia"."""
    alike = [m for m in mentions if m.kind == mention.kind]
    first = last = alike.index(mention)
    while first and phrases.LIST.fullmatch(_between(sentence, alike[first - 1], alike[first])):
        first -= 1
    while last + 1 < len(alike) and phrases.LIST.fullmatch(_between(sentence, alike[last], alike[last + 1])):
        last += 1
    return alike[first : last + 1]


def _claimed(sentence: str, mention: _Mention, concludes: bool) -> bool:
    """Whether a name says where the place is."""
    before = sentence[max(0, mention.start - NEAR) : mention.start]
    clause, after = _clause_before(sentence, mention.start), sentence[mention.end :][:60]
    if (
        phrases.ASIDE.search(clause.lower())
        or after.startswith(("'s", "’s"))
        or mention.words.endswith(("'s", "’s"))
    ):
        return False
    if concludes or phrases.BEHIND.match(after):
        return True
    if phrases.DENIED.match(after.lower()):
        return False
    return any(phrases.GAP.fullmatch(match["gap"]) for match in phrases.IDENTIFIED.finditer(before))


def _clause_before(sentence: str, start: int) -> str:
    """The words before a position in the same clause."""
    return phrases.CLAUSE.split(sentence[max(0, start - NEAR) : start])[-1]


def _between(sentence: str, one: _Mention, other: _Mention) -> str:
    """The text between a name and a later one."""
    return sentence[one.end : other.start][:64]


def _mentions(sentence: str, truth: _Truth, gazetteer: Gazetteer) -> Iterator[_Mention]:
    """Place names in a sentence; the longest one at each position."""
    words = list(phrases.WORD.finditer(sentence))
    i = 0
    while i < len(words):
        taken = 1
        if _is_name(words[i][0]) and (i == 0 or words[i - 1][0] not in phrases.OF_A_NAME):
            for count in range(min(LONGEST_SPAN, len(words) - i), 0, -1):
                start, end = words[i].start(), words[i + count - 1].end()
                if not _connected(words[i : i + count], sentence[start:end]):
                    continue
                after = words[i + count] if i + count < len(words) else None
                found = _place(sentence, start, end, after, truth, gazetteer)
                if found is not None:
                    yield _Mention(found[0], sentence[start:end], start, end, found[1])
                    taken = count
                    break
        i += taken


def _is_name(word: str) -> bool:
    return word[0].isupper() or not (word[0].isascii() or word[0].islower())


def _connected(words: Sequence[re.Match[str]], span: str) -> bool:
    """Whether a span could be one name: capitalised words, or small ones and numbers after the first."""
    names = all(_is_name(word[0]) or len(word[0]) <= PARTICLE or word[0].isdigit() for word in words)
    ends = _is_name(words[-1][0]) or words[-1][0].isdigit()
    return names and ends and not set(',;:()[]/"') & set(span)


def _place(
    sentence: str, start: int, end: int, after: re.Match[str] | None, truth: _Truth, gazetteer: Gazetteer
) -> tuple[str, bool] | None:
    """The kind of place that a span names ("" if it is not judged), and whether it agrees."""
    name = sentence[start:end].rstrip(".").removesuffix("'s").removesuffix("’s")
    if name in phrases.CONTINENT_OF and phrases.KIND_OF_PLACE.match(sentence, end):
        name = phrases.CONTINENT_OF[name]
    if continent := gazetteer.continent(name):
        return "continent", truth.is_continent(continent)
    tail = phrases.TAIL.match(sentence, end)
    placed = tail is not None and gazetteer.country(tail[1].strip()) is not None  # "Reading, England"
    if gazetteer.is_region(name) and not placed:
        return "", True  # not judged: states and provinces have namesakes everywhere (Georgia, Victoria)
    country = gazetteer.country(name) if not name.isupper() or name.replace(".", "") in SHORT_NAMES else None
    if country:
        namesake = truth.city is not None and fold(name) == fold(truth.city)  # Armenia in Colombia
        return "country", truth.country is None or country == truth.country or namesake
    cities = gazetteer.city_names.get(fold(name))
    if not cities:
        return None
    spaced = after is not None and sentence[end : after.start()] == " "
    longer = spaced and after is not None and after[0][0].isupper()  # "Lincoln Memorial"
    if not placed and (fold(name) in phrases.NO_CITY or longer):
        return None
    before = sentence[max(0, start - 40) : start]
    begins = not before.rstrip(" *") or before.rstrip(" *").endswith(":")
    judged = (
        placed or (begins and cities[0].population >= LARGE) or phrases.CITY_CUE.search(before) is not None
    )
    if not judged and cities[0].population < KNOWN:
        return None  # most words that begin a sentence are also a village somewhere
    return "city" if judged else "", truth.is_city(name, cities)
