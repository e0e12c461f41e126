"""What a text says of a place: cities, countries, continents, coordinates, hemispheres, the side of traffic.

A sentence may name places that it does not mean ("rather than Spain", "could be Peru or Chile"). Only what is
asserted is a claim; where two places of a kind stand side by side, one of them being right is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from geo_r1.places import City, Country, Gazetteer, distance_km, fold, parse_coordinates

LONGEST_SPAN = 5  # words of a name
PARTICLE = 4  # letters of a small word within a name: "de", "das", "upon"
LARGE = 500_000  # inhabitants of a city that a sentence may begin with
EQUATOR = 0.1  # degrees: nearer to the equator, or to 0 or 180 east, no hemisphere is wrong
SHORT_NAMES = {"US", "USA", "UK", "UAE", "DRC"}  # other capitals are mostly no countries: TV, AC, NO
TWO_CONTINENTS = {"RU", "TR", "KZ", "GE", "AZ", "AM", "CY"}  # in Europe and in Asia

_SENTENCE = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bFt\.)(?<!\b[A-Z]\.)(?<=[.!?;])\s|\n")
_CLAUSE = re.compile(r",\s|\s[–—-]\s|:\s|\b(?:but|while|whereas|although|though)\b")
_WORD = re.compile(r"[^\W_](?:[\w'’-]|\.(?=\w))*\.?")
_ASIDE = re.compile(
    r"\b(?:not|never|no|neither|nor|unlike|rather than|instead of|except|exclud\w+|rul(?:es?|ed|ing) out|"
    r"different from|differs? from|distinct from|similar to|resembl\w+|reminiscent|as in|compared|could|might|"
    r"may|perhaps|possibly|maybe|either|whether|candidates?|if|than|elsewhere|other)\b|n't\b"
)
_DENIED = re.compile(
    r"\s*(?:(?:is|are|was|were|seems?|looks?|can be|would be)\s+)?(?:n't|not|ruled out|excluded|unlikely|"
    r"less likely|impossible|improbable|out of the question)\b"
)
_CITY_CUE = re.compile(
    r"\b(?:in|near|at|of|is|as|be|from|around|outside|inside|downtown|central|greater|towards?|to|city|town|"
    r"suggests?|indicates?|identif\w+|matches|confirms?|means|say|visit|capital)\s+(?:the\s+)?(?:city\s+of\s+)?$",
    re.IGNORECASE,
)
# Names of cities that mean something else in prose: words, months, makes of cars, styles, parts of names.
_COMMON = """
a an the this that these those here there it he she we you they both same most many other others
such all some tile tiles image images panorama picture photo view views visual cues knowledge
evidence conclusion step answer option candidate north south east west northern southern eastern
western central nice reading mobile bath orange split normal surprise union best bar date deal enter
man men male march may april june august sunday monday friday street road avenue park river lake
mount mountain bay beach port fort new old san santa saint toyota ford lincoln mercedes shell total
kia tesla roman gothic art christian catholic buddhist english spanish french german university
college hospital police post office school church temple castle tower bridge market station airport
of so no yes if then thus because while when where its his her
"""
_NO_CITY = frozenset(_COMMON.split())
_TAIL = re.compile(r",? (?:in )?([A-Z][\w'’ -]{2,40})")
_HEMISPHERE = re.compile(r"\b(northern|southern|eastern|western)[ -]hemisphere\b", re.IGNORECASE)
_WHEEL = re.compile(r"\b(left|right)[ -]hand[ -]drive\b", re.IGNORECASE)
_TRAFFIC = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bdriv(?:e|es|en|ing)\s+(?:\w+\s+){0,2}on\s+the\s+(left|right)\b",
        r"\b(?:traffic|vehicles?|cars?|buses|drivers|motorists)\s+(?:\w+\s+){0,2}"
        r"(?:keeps?|keeping|moves?|moving|runs?|running|travels?|travelling|traveling)\s+"
        r"(?:(?:on|to|along)\s+)?(?:the\s+)?(left|right)\b",
        r"\b(left|right)[ -]hand[ -](?:traffic|driving)\b",
        r"\bkeeps?\s+(?:to\s+the\s+)?(left|right)\b",
        r"\b(left|right)[ -]side\s+driving\b",
    )
)


@dataclass(frozen=True)
class Contradiction:
    """A claim that the metadata denies.

    Attributes:
        kind: city, country, continent, coordinates, hemisphere or driving_side.
        said: the words.
        known: what the metadata has instead.
    """

    kind: str
    said: str
    known: str


def contradictions(
    text: str, metadata: Mapping[str, Any], gazetteer: Gazetteer, city_km: float, coordinate_km: float
) -> Iterator[Contradiction]:
    """Claims of a text that a sample's metadata denies; what the metadata lacks is not judged.

    Args:
        metadata: any of city, country, continent, latitude and longitude in degrees, driving_side.
        city_km: a named city farther from the place is another one.
        coordinate_km: coordinates farther from the place are wrong.
    """
    truth = _Truth(metadata, gazetteer, city_km, coordinate_km)
    for sentence in _SENTENCE.split(text):
        yield from _of_numbers(sentence, truth)
        yield from _of_names(sentence, truth, gazetteer)


class _Truth:
    """What is known of a place, and whether a claim agrees with it."""

    def __init__(
        self, metadata: Mapping[str, Any], gazetteer: Gazetteer, city_km: float, coordinate_km: float
    ) -> None:
        latitude, longitude = metadata.get("latitude"), metadata.get("longitude")
        numbers = all(isinstance(x, int | float) for x in (latitude, longitude))
        self.point: tuple[float, float] | None = (latitude, longitude) if numbers else None  # type: ignore[assignment]
        self.city: str | None = metadata.get("city")
        country = metadata.get("country")
        self.country = gazetteer.country(str(country)) if country else None
        self.continent = gazetteer.continent(str(metadata.get("continent") or ""))
        if self.continent is None and self.country:
            self.continent = self.country.continent
        self.side = metadata.get("driving_side") or (self.country and self.country.driving_side)
        self.city_km, self.coordinate_km = city_km, coordinate_km
        self.same_city = gazetteer.same_city

    def is_city(self, name: str, cities: tuple[City, ...]) -> bool:
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
        both = {"Europe", "Asia"}
        return bool(self.country and self.country.code in TWO_CONTINENTS and {name, self.continent} <= both)


def _of_numbers(sentence: str, truth: _Truth) -> Iterator[Contradiction]:
    """Coordinates, hemispheres and the side of traffic in a sentence."""
    if truth.point is not None:
        for latitude, longitude in parse_coordinates(sentence):
            distance = distance_km(*truth.point, latitude, longitude)
            if distance > truth.coordinate_km:
                known = f"{truth.point[0]}, {truth.point[1]}, {distance:.0f} km away"
                yield Contradiction("coordinates", f"{latitude}, {longitude}", known)
        for match in _HEMISPHERE.finditer(sentence):
            value = truth.point["eastern western".find(match[1].lower()) >= 0]
            wanted = "northern eastern".find(match[1].lower()) >= 0
            edge = min(abs(value), 180 - abs(value))
            if edge > EQUATOR and (value > 0) != wanted and not _set_aside(sentence, match.start()):
                yield Contradiction("hemisphere", match[0], f"{truth.point[0]}, {truth.point[1]}")
    if truth.side:
        sides = [(match, match[1].lower()) for pattern in _TRAFFIC for match in pattern.finditer(sentence)]
        other = {"left": "right", "right": "left"}
        sides += [(match, other[match[1].lower()]) for match in _WHEEL.finditer(sentence)]
        for match, side in sides:
            if side != truth.side and not _set_aside(sentence, match.start()):
                yield Contradiction("driving_side", match[0], f"traffic is on the {truth.side}")


@dataclass(frozen=True)
class _Mention:
    kind: str
    words: str
    start: int
    end: int
    agrees: bool


def _of_names(sentence: str, truth: _Truth, gazetteer: Gazetteer) -> Iterator[Contradiction]:
    """Cities, countries and continents that a sentence asserts."""
    mentions = [m for m in _mentions(sentence, truth, gazetteer) if not _set_aside(sentence, m.start, m.end)]
    known = {
        "city": truth.city or (truth.point and f"{truth.point[0]}, {truth.point[1]}"),
        "country": truth.country and truth.country.name,
        "continent": truth.continent,
    }
    for mention in mentions:
        listed = (m for m in mentions if m.kind == mention.kind and m.agrees)
        beside = any(re.fullmatch(r"(?:,|\s|and\b|or\b|/)+", _between(sentence, mention, m)) for m in listed)
        if not mention.agrees and not beside:
            yield Contradiction(mention.kind, mention.words, str(known[mention.kind]))


def _between(sentence: str, one: _Mention, other: _Mention) -> str:
    first, second = sorted((one, other), key=lambda m: m.start)
    return sentence[first.end : second.start][:64]


def _mentions(sentence: str, truth: _Truth, gazetteer: Gazetteer) -> Iterator[_Mention]:
    """Names of places, the longest at each spot, and whether they are the truth's."""
    words = list(_WORD.finditer(sentence))
    i = 0
    while i < len(words):
        taken = 1
        if _is_name(words[i][0]):
            for count in range(min(LONGEST_SPAN, len(words) - i), 0, -1):
                last = words[i + count - 1]
                span = sentence[words[i].start() : last.end()]
                if not _connected(words[i : i + count], span):
                    continue
                found = _place(span.rstrip("."), words, i, count, sentence, truth, gazetteer)
                if found is not None:
                    kind, agrees = found
                    if kind:
                        yield _Mention(kind, span, words[i].start(), last.end(), agrees)
                    taken = count
                    break
        i += taken


def _is_name(word: str) -> bool:
    return word[0].isupper() or not (word[0].isascii() or word[0].islower())


def _connected(words: list[re.Match[str]], span: str) -> bool:
    """Whether a span could be one name: capitalised words, with small ones and numbers after the first."""
    names = all(_is_name(word[0]) or len(word[0]) <= PARTICLE or word[0].isdigit() for word in words)
    ends = _is_name(words[-1][0]) or words[-1][0].isdigit()
    return names and ends and not set(',;:()[]/"') & set(span)


def _place(
    span: str,
    words: list[re.Match[str]],
    i: int,
    count: int,
    sentence: str,
    truth: _Truth,
    gazetteer: Gazetteer,
) -> tuple[str, bool] | None:
    """What a span names, and whether it agrees; the kind is empty for a name that is not judged."""
    name = span.removesuffix("'s").removesuffix("’s")
    if continent := gazetteer.continent(name):
        return "continent", truth.is_continent(continent)
    tail = _TAIL.match(sentence, words[i + count - 1].end())
    placed = tail is not None and gazetteer.country(tail[1].strip()) is not None  # "Reading, England"
    if gazetteer.is_region(name) and not placed:
        return "", True  # Georgia, Ontario, Victoria: states and provinces have namesakes everywhere
    country = gazetteer.country(name) if not name.isupper() or name.replace(".", "") in SHORT_NAMES else None
    if country:
        return "country", truth.country is None or _same_country(country, truth.country)
    cities = gazetteer.city_names.get(fold(name))
    if not cities or (truth.city is None and truth.point is None and truth.country is None):
        return None
    after = words[i + count] if i + count < len(words) else None
    longer = (
        after is not None
        and after[0][0].isupper()
        and sentence[words[i + count - 1].end() : after.start()] == " "
    )
    cued = _CITY_CUE.search(sentence[max(0, words[i].start() - 40) : words[i].start()]) is not None
    begins = i == 0 and cities[0].population >= LARGE
    if not placed and (fold(name) in _NO_CITY or longer or not (cued or begins)):
        return None
    return "city", truth.is_city(name, cities)


def _same_country(one: Country, other: Country) -> bool:
    return one.code == other.code


def _set_aside(sentence: str, start: int, end: int | None = None) -> bool:
    """Whether the words around say that what stands here is not meant, or only may be."""
    before = _CLAUSE.split(sentence[max(0, start - 200) : start].lower())[-1]
    after = sentence[end:][:60].lower() if end is not None else ""
    return bool(_ASIDE.search(before) or _DENIED.match(after))
