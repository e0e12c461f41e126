"""What a text says of a place: cities, countries, continents, coordinates, hemispheres, the side of traffic.

A chain of thought names many places that it does not mean: it compares with them, rules them out, reads them
on a sign. So a name counts only where the place is identified: behind words that do so ("this is", "located
in", "so", "suggests"), behind another such name, or in the conclusion; not where it is set aside ("unlike",
"could be"). Where several places of a kind stand in one list, one of them being right is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geo_r1.places import City, Gazetteer, distance_km, fold, parse_coordinates

LONGEST_SPAN = 5  # words of a name
PARTICLE = 4  # letters of a small word within a name: "de", "das", "upon"
NEAR = 120  # characters in front of a name that are looked at
EQUATOR = 0.1  # degrees: nearer to the equator, or to 0 or 180 east, no hemisphere is wrong
LARGE = 500_000  # inhabitants of a city that a sentence may begin with
SHORT_NAMES = {"US", "USA", "UK", "UAE", "DRC"}  # other capitals are mostly no countries: TV, AC, NO
TWO_CONTINENTS = {"RU", "TR", "KZ", "GE", "AZ", "AM", "CY"}  # partly or by custom in Europe and in Asia

_SENTENCE = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bFt\.)(?<!\b[A-Z]\.)(?<=[.!?;])\s|\n")
_CLAUSE = re.compile(r",\s|\s[–—-]\s|:\s|;|\b(?:but|while|whereas|although|though)\b")
_WORD = re.compile(r"[^\W_](?:[\w'’-]|\.(?=\w))*\.?")

# What identifies a place: who or what is there, or a word of inference; then small words up to the name.
_SUBJECT = (
    r"(?:this|it|that|which|we|here|place|city|town|country|continent|scene|location|photo|photograph|picture|"
    r"image|panorama|view|street|camera|capital|coordinates|area|region|site|spot)"
)
_BE = r"(?:is|are|was|were|be|being|lies?|lay|stands?|stood|sits?|belongs?|comes? from|came from)"
_INFER = (
    r"(?:suggests?|indicates?|means|meaning|confirms?|implies|proves?|conclude|deduce|infer|believe|"
    r"identif(?:y|ies)|locates?|places?|puts?|settles?|leaves?|adds? up|points?|leads?|speaks?|narrows?|"
    r"consistent|typical|characteristic|so(?! (?:is|are|was|were|do|does)\b)|hence|thus|therefore|then|"
    r"must be|found|taken|shot|located|situated|recogni[sz]e|clearly|surely|certainly)"
)
_SMALL = (
    r"(?:in|at|near|of|to|for|on|towards?|within|inside|outside|that|the|a|an|as|with|it|us|me|this|be|is|"
    r"are|was|only|indeed|must|by|very|most|quite|somewhere|city|town|country|capital|continent|coast|centre|"
    r"center|heart|outskirts|suburbs?|middle|north|south|east|west|northern|southern|eastern|western|central|"
    r"part|side|called|named|located|situated|found|taken|shot|made|typical|characteristic|clearly|certainly|"
    r"surely|definitely|photograph|picture|scene|place|location|conclusion|about|around|approximately|together)"
)
_IDENTIFIED = re.compile(
    rf"\b(?:{_SUBJECT}(?:'s|’s|\s+(?:\w+\s+){{0,3}}?{_BE})|{_INFER})\b(?=(?P<gap>.*)$)",
    re.IGNORECASE | re.DOTALL,
)
_GAP = re.compile(rf"(?:\s+|,|{_SMALL}\b|[-+]?\d[\d.]*°?|[°NSEW(){{}}′″'\"]|:)*", re.IGNORECASE)
_BEHIND = re.compile(
    r"\s+(?:it is|it must be|is where|is the (?:place|city|country|answer))\b", re.IGNORECASE
)
_ASIDE = re.compile(
    r"\b(?:not|cannot|never|no|nobody|none|neither|nor|unlike|rather than|instead of|except|exclud\w+|"
    r"rul(?:es?|ed|ing) out|different from|differs? from|distinct from|similar to|like|resembl\w+|"
    r"reminiscent|compared?|could|might|may|would(?! (?:therefore|place|put|locate|conclude))|perhaps|"
    r"possibly|maybe|either|whether|candidates?|if|than|elsewhere|other|also|too|twinned|named after|"
    r"imported|exported|flights?|ferr(?:y|ies))\b|n't\b"
)
_DENIED = re.compile(
    r"\s*(?:and \w+ )?(?:(?:is|are|was|were|seems?|looks?|can be|would|could|might|may)\b|n't|not\b|too\b|"
    r"ruled out\b|excluded\b|unlikely\b|have\b|has\b|lacks?\b|use[sd]?\b|drops?\b|falls?\b|fails?\b|"
    r",? ?(?:but|yet|though|however)\b)"
)
_CITY_CUE = re.compile(
    r"\b(?:in|near|at|of|is|as|be|from|around|outside|inside|downtown|central|greater|towards?|to|"
    r"city|town|suggests?|indicates?|identif\w+|matches|confirms?|means|deduce|so|hence|thus|for|capital)\s+"
    r"(?:the\s+city\s+of\s+)?$",
    re.IGNORECASE,
)
_LIST = re.compile(r"(?:[,/]|\s|and\b|or\b|the\b)+")
_PAIRED = re.compile(r",? (?:in |the )?")  # "Lyon, France", "Okara in Pakistan"
_TAIL = re.compile(r",? (?:in )?([A-Z][\w'’ -]{2,40})")
# Names of cities that mean something else in prose: words, months, makes of cars, styles, parts of names.
_COMMON = """
a an the this that these those here there it he she we you they both same most many other others such
all some tile tiles image images panorama picture photo view views visual cues knowledge evidence
conclusion step answer option candidate north south east west northern southern eastern western central
nice reading mobile bath orange split normal surprise union best bar date deal enter man men male march
may april june august sunday monday friday street road avenue park river lake mount mountain bay beach
port fort new old san santa saint toyota ford lincoln mercedes shell total kia tesla roman gothic art
christian catholic buddhist english spanish french german university college hospital police post office
school church temple cars vehicles buses taxis trams signs castle tower bridge market station airport of
so no yes if then thus because while when where its his her
"""
_NO_CITY = frozenset(_COMMON.split())
_OF_A_NAME = ("New", "Little", "Old")  # New Guinea is not Guinea

_HEMISPHERE = (
    re.compile(r"\b(northern|southern|eastern|western)[ -]hemisphere\b", re.IGNORECASE),
    re.compile(
        r"\b(northern|southern|eastern|western) half of the (?:globe|world|earth|planet)\b", re.IGNORECASE
    ),
    re.compile(r"\b(north|south|above|below) (?:of )?the equator\b", re.IGNORECASE),
)
_NORTH_OR_EAST = ("northern", "north", "above", "eastern")
_TRAFFIC = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bdriv(?:e|es|en|ing)\s+(?:\w+\s+){0,3}on\s+the\s+(left|right)\b",
        r"\b(?:traffic|vehicles?|cars?|buses|drivers|motorists)\s+(?:\w+\s+){0,2}"
        r"(?:keeps?|keeping|stays?|moves?|moving|runs?|running|travels?|travelling|traveling)\s+"
        r"(?:(?:on|to|along)\s+)?(?:the\s+)?(left|right)\b",
        r"\b(left|right)[ -]hand[ -](?:traffic|driving)\b",
        r"\btraffic\s+(?:is\s+)?on\s+the\s+(left|right)\b",
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
    text: str,
    metadata: Mapping[str, Any],
    gazetteer: Gazetteer,
    city_km: float,
    coordinate_km: float,
    conclusion: str = "",
) -> Iterator[Contradiction]:
    """Claims of a text that a sample's metadata denies; what the metadata lacks is not judged.

    Args:
        metadata: any of city, country, continent, latitude and longitude in degrees, driving_side.
        city_km: a named city farther from the place is another one.
        coordinate_km: coordinates farther from the place are wrong.
        conclusion: the part of the text in which every name counts that is not set aside.
    """
    truth = _Truth(metadata, gazetteer, city_km, coordinate_km)
    before, found, after = text.partition(conclusion) if conclusion else (text, "", "")
    for part, concludes in ((before, False), (found, True), (after, False)):
        for sentence in _SENTENCE.split(part):
            mentions = list(_mentions(sentence, truth, gazetteer))
            yield from _of_numbers(sentence, truth, mentions)
            yield from _of_names(sentence, truth, mentions, concludes)


class _Truth:
    """What is known of a place, and whether a claim agrees with it."""

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
    """A name of a place in a sentence, and whether it is the truth's."""

    kind: str
    words: str
    start: int
    end: int
    agrees: bool


def _of_numbers(sentence: str, truth: _Truth, mentions: Sequence[_Mention]) -> Iterator[Contradiction]:
    """Coordinates, hemispheres and the side of traffic in a sentence; not those of another place in it."""

    def meant(start: int) -> bool:
        begin = sentence.rfind(";", 0, start)
        elsewhere = any(begin < m.start < start for m in mentions if not m.agrees and m.kind != "continent")
        return not elsewhere and not _ASIDE.search(_clause_before(sentence, start).lower())

    if truth.point is not None:
        for latitude, longitude in parse_coordinates(sentence):
            distance = distance_km(*truth.point, latitude, longitude)
            if distance > truth.coordinate_km:
                known = f"{truth.shown}, {distance:.0f} km away"
                yield Contradiction("coordinates", f"{latitude}, {longitude}", known)
        for match in (m for pattern in _HEMISPHERE for m in pattern.finditer(sentence)):
            half = match[1].lower()
            value = truth.point[half in ("eastern", "western")]
            edge = min(abs(value), 180 - abs(value))
            if edge > EQUATOR and (value > 0) != (half in _NORTH_OR_EAST) and meant(match.start()):
                yield Contradiction("hemisphere", match[0], truth.shown)
    for match in (m for pattern in _TRAFFIC for m in pattern.finditer(sentence)):
        if truth.side and match[1].lower() != truth.side and meant(match.start()):
            yield Contradiction("driving_side", match[0], f"traffic is on the {truth.side}")


def _of_names(
    sentence: str, truth: _Truth, mentions: Sequence[_Mention], concludes: bool
) -> Iterator[Contradiction]:
    """Cities, countries and continents that a sentence claims."""
    known = {
        "city": truth.city or truth.shown,
        "country": truth.country and truth.country.name,
        "continent": truth.continent,
    }
    claimed: list[_Mention] = []
    for mention in mentions:
        behind = bool(claimed) and _PAIRED.fullmatch(_between(sentence, claimed[-1], mention)) is not None
        if behind or _claimed(sentence, mention, concludes):
            claimed.append(mention)
    for mention in claimed:
        if mention.kind and not any(m.agrees for m in _listed(sentence, mention, mentions)):
            yield Contradiction(mention.kind, mention.words, str(known[mention.kind]))


def _listed(sentence: str, mention: _Mention, mentions: Sequence[_Mention]) -> list[_Mention]:
    """A name and those of its kind that stand in one list with it: "Peru, Chile and Bolivia"."""
    alike = [m for m in mentions if m.kind == mention.kind]
    first = last = alike.index(mention)
    while first and _LIST.fullmatch(_between(sentence, alike[first - 1], alike[first])):
        first -= 1
    while last + 1 < len(alike) and _LIST.fullmatch(_between(sentence, alike[last], alike[last + 1])):
        last += 1
    return alike[first : last + 1]


def _claimed(sentence: str, mention: _Mention, concludes: bool) -> bool:
    """Whether a name says where the place is."""
    before = sentence[max(0, mention.start - NEAR) : mention.start]
    clause, after = _clause_before(sentence, mention.start), sentence[mention.end :][:60]
    if (
        _ASIDE.search(clause.lower())
        or after.startswith(("'s", "’s"))
        or mention.words.endswith(("'s", "’s"))
    ):
        return False
    if concludes or _BEHIND.match(after):
        return True
    if _DENIED.match(after.lower()):
        return False
    return any(_GAP.fullmatch(match["gap"]) for match in _IDENTIFIED.finditer(before))


def _clause_before(sentence: str, start: int) -> str:
    """The words in front of a place in a sentence that belong to it."""
    return _CLAUSE.split(sentence[max(0, start - NEAR) : start])[-1]


def _between(sentence: str, one: _Mention, other: _Mention) -> str:
    """What stands between a name and a later one."""
    return sentence[one.end : other.start][:64]


def _mentions(sentence: str, truth: _Truth, gazetteer: Gazetteer) -> Iterator[_Mention]:
    """Names of places in a sentence, the longest at each spot."""
    words = list(_WORD.finditer(sentence))
    i = 0
    while i < len(words):
        taken = 1
        if _is_name(words[i][0]) and (i == 0 or words[i - 1][0] not in _OF_A_NAME):
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
    """Whether a span could be one name: capitalised words, with small ones and numbers after the first."""
    names = all(_is_name(word[0]) or len(word[0]) <= PARTICLE or word[0].isdigit() for word in words)
    ends = _is_name(words[-1][0]) or words[-1][0].isdigit()
    return names and ends and not set(',;:()[]/"') & set(span)


def _place(
    sentence: str, start: int, end: int, after: re.Match[str] | None, truth: _Truth, gazetteer: Gazetteer
) -> tuple[str, bool] | None:
    """What a span names, and whether it agrees; the kind is empty for a name that is not judged."""
    name = sentence[start:end].rstrip(".").removesuffix("'s").removesuffix("’s")
    if continent := gazetteer.continent(name):
        return "continent", truth.is_continent(continent)
    tail = _TAIL.match(sentence, end)
    placed = tail is not None and gazetteer.country(tail[1].strip()) is not None  # "Reading, England"
    if gazetteer.is_region(name) and not placed:
        return "", True  # Georgia, Ontario, Victoria: states and provinces have namesakes everywhere
    country = gazetteer.country(name) if not name.isupper() or name.replace(".", "") in SHORT_NAMES else None
    if country:
        namesake = truth.city is not None and fold(name) == fold(truth.city)  # Armenia in Colombia
        return "country", truth.country is None or country == truth.country or namesake
    cities = gazetteer.city_names.get(fold(name))
    if not cities:
        return None
    spaced = after is not None and sentence[end : after.start()] == " "
    longer = spaced and after is not None and after[0][0].isupper()  # "Lincoln Memorial"
    if not placed and (fold(name) in _NO_CITY or longer):
        return None
    before = sentence[max(0, start - 40) : start]
    begins = not before.rstrip(" *") or before.rstrip(" *").endswith(":")
    judged = placed or (begins and cities[0].population >= LARGE) or _CITY_CUE.search(before) is not None
    return "city" if judged else "", truth.is_city(name, cities)
