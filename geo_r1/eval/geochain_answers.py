"""Read answers to GeoChain as a person would, and judge them; the public code has no scorer.

An answer is the answer block, or in a text with no tags the last line. Two different answers are none.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

from geo_r1.answers import TAGS, extract_answer
from geo_r1.eval.geochain_truths import CITIES_OF, CITY, CITY_OF, COUNTRY, LANGUAGES, STATE, STATES, YES_NO
from geo_r1.places import Country, Gazetteer, distance_km, fold, parse_coordinates

ELSEWHERE_KM = 100  # from the photo: a city that lies further, named before the true one, is the answer
MOST_READ = 2000  # characters: a longer text is no answer, and looking up its words would be slow
MOST_PARTS = 6  # of a name with its regions, or of languages: more are a list of guesses
MOST_WORDS = 5  # of an unknown name

OTHER_WORDS = {"arid": "Dry", "australia": "Oceania"}
OTHER_LANGUAGES = {
    "Filipino": ("tagalog", "pilipino"),
    "Norwegian": ("bokmal", "nynorsk", "norsk"),
    "Swahili": ("kiswahili",),
}
# Folded name to country and first name; abbreviations are words in other languages.
STATE_NAMES = {
    fold(name): (country, names[0])
    for (country, _), names in STATES.items()
    for name in names
    if not name.isupper()
}
CITY_NAMES = {fold(city): city for city in [*CITY_OF.values(), *CITIES_OF["CA"], *CITIES_OF["US"]]}
_REFUSAL = re.compile(r"\b(?:unknown|unclear|unsure|not sure|cannot|can't|don't know|do not know|n/a|none)\b")
_ASKED = re.compile(r"\b(?:state or province|city(?: or|,) town,?(?: or village)?|town or village)\b")

Read = tuple[str | None, bool]  # what was read, if an answer was, and whether it is right
Lookup = Callable[[str], str | None]


def judge(text: str, truth: Mapping[str, Any], point: tuple[Any, Any], gazetteer: Gazetteer) -> Read:
    """Read an answer of any kind but coordinates, and compare it with the truth.

    Args:
        text: a completion, or only its answer.
        point: latitude and longitude of the photo, in degrees; only cities need them.
    """
    said = re.sub(r'\\(?:boxed|text)\b|[*_`"“”$\\{}]', " ", answer_part(text)).replace("’", "'")
    said = re.sub(r"(?<=\b[A-Za-z])\.", "", said).strip()  # U.S.
    kind, answer = truth["kind"], truth["answer"]
    if kind == LANGUAGES:
        return _languages(said, answer)
    if kind == STATE:
        read, answer = _state(said, answer), answer[0]
    elif kind == CITY:
        read = _city(said, truth, point, gazetteer)
    elif kind == COUNTRY:
        read = _country(said, gazetteer)
    else:
        read = _yes_no(said) if kind == YES_NO else _option(said, truth["options"])
    return read, read == answer


def read_coordinates(text: str) -> tuple[float, float] | None:
    """The one pair of latitude and longitude in an answer; without tags, in the last line or the last two."""
    for lines in (1, 2):
        said = answer_part(text, lines)
        pairs = {*(parse_coordinates(said) or parse_coordinates(f"({said})"))}  # "12, 77" is a pair here
        if pairs:
            return pairs.pop() if len(pairs) == 1 else None
    return None


def answer_part(text: str, lines: int = 1) -> str:
    """The answer without mark-up; "" if it is too long."""
    if any(tag in text for tag in TAGS):
        said = extract_answer(text) or ""
    else:
        said = "\n".join(text.rstrip().rsplit("\n", lines)[-lines:])
    return "" if len(said) > MOST_READ else re.sub(r"<[^<>]{0,200}>", " ", html.unescape(said)).strip()


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _named(text: str, lookup: Lookup, most: int = 4) -> set[str]:
    """The names in a text: the longest runs of words, up to `most`, that a lookup knows, without ""."""
    words, found, start = re.findall(r"\w+", text), set(), 0
    while start < len(words):
        for end in range(min(start + most, len(words)), start, -1):
            if (name := lookup(" ".join(words[start:end]))) is not None:
                found.add(name)
                start = end
                break
        else:
            start += 1
    return found - {""}


def _parts(text: str) -> list[str]:
    return [part for raw in re.split(r"[,;:()|/\n]", text) if (part := raw.strip(" \t\r.!?'-–—"))]


def _yes_no(text: str) -> str | None:
    """One that opens the answer or ends a clause counts before one in passing: "Yes, there are no clouds"."""
    text = text.lower()
    firm = set(re.findall(r"^(?:yes|no)\b|\b(?:yes|no)(?=\s{0,9}(?:[,.;:!?/]|$))", text))
    return _only(firm or set(re.findall(r"\b(?:yes|no)\b", text)))


def _option(text: str, options: list[str]) -> str | None:
    names = OTHER_WORDS | {option.lower(): option for option in options}
    return _only(_named(text.lower(), names.get) & {*options})


def _country(text: str, gazetteer: Gazetteer) -> str | None:
    """Parts that are a country's name count before names in passing: "New Jersey, USA"."""

    def lookup(phrase: str) -> str | None:
        if gazetteer.continent(phrase):
            return ""  # "South America" is not America
        country = _country_of(phrase, gazetteer)
        return country.name if country else None

    if country := gazetteer.country(text):
        return country.name
    return _only({name for part in _parts(text) if (name := lookup(part))} or _named(text, lookup))


def _country_of(phrase: str, gazetteer: Gazetteer) -> Country | None:
    """As the gazetteer has it, without most two-letter codes: "Phoenix, AZ" is not in Azerbaijan."""
    return gazetteer.country(phrase) if len(phrase) > 2 or phrase in ("US", "UK") else None


def _languages(text: str, truth: list[str]) -> Read:
    """Right where one of the true languages is named; a long list of languages is no answer."""
    names = {other: name for name in truth for other in (fold(name), *OTHER_LANGUAGES.get(name, ()))}
    found = sorted(_named(text, lambda phrase: names.get(fold(phrase))))
    if len(re.split(r"[,;/\n]|\band\b", text)) > MOST_PARTS:
        return None, False
    return (", ".join(found) or _unknown_name(text)), bool(found)


def _unknown_name(text: str) -> str | None:
    """A part of a text that may be a name, though not one that a lookup knows."""
    parts = _parts(text)
    if not parts or _REFUSAL.search(text.lower()) or len(parts[0].split()) > MOST_WORDS:
        return None
    return parts[0]


def _place(text: str, lookup: Lookup) -> str | None:
    """The one place that a text names; alternatives ("Paris or Lyon") must all be the same."""
    if len(_parts(text)) > MOST_PARTS:
        return None
    either = [part for part in re.split(r"/|\bor\b", _ASKED.sub(" ", text)) if part.strip()]
    found = [_named(part, lookup) for part in either]
    names: set[str] = set().union(*found)
    if not names:
        return _unknown_name(text) if len(either) == 1 else None
    return _only(names) if all(found) else None


def _state(text: str, names: list[str]) -> str | None:
    def lookup(phrase: str) -> str | None:
        return names[0] if phrase in names else STATE_NAMES.get(fold(phrase), (None, None))[1]

    return _place(text, lookup)


def _city(
    text: str, truth: Mapping[str, Any], point: tuple[float, float], gazetteer: Gazetteer
) -> str | None:
    """The city that is named; the part of the answer that places it elsewhere, if one does."""
    answer, country = truth["answer"], truth["code"]

    def lookup(phrase: str) -> str | None:
        known = CITY_NAMES.get(fold(phrase))
        other_name = not phrase[0].islower() and gazetteer.same_city(phrase, answer, country)
        return known or (answer if other_name else None)

    said = answer if gazetteer.same_city(text, answer, country) else _place(text, lookup)
    if said == answer:
        before = True
        for part in _parts(text):
            in_country = _country_of(part, gazetteer)
            in_code = in_country.code if in_country else STATE_NAMES.get(fold(part), (None, None))[0]
            named = _named(part, lookup)
            if in_code not in (None, country) and not named:
                return part
            before = before and not named
            if before and in_code is None and _is_elsewhere(part, point, gazetteer):
                return part
    return said


def _is_elsewhere(name: str, point: tuple[float, float], gazetteer: Gazetteer) -> bool:
    """Whether cities have this name, and all of them are far from a point."""
    cities = gazetteer.cities(name) if not name[0].islower() else []
    return bool(cities) and all(distance_km(*point, c.latitude, c.longitude) > ELSEWHERE_KM for c in cities)
