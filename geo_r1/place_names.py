"""Compare the names of places, and read coordinates in prose."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

_LETTERS = {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"}
_WORDS = re.compile(r"[^ ]{1,256}")  # normal forms take quadratic time on a long run of accents
_SAINT = re.compile(r"\bst(e?)(?![^ ])")


class _Folded(dict[int, str]):
    """The folded form of each character, computed on first use."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = "".join(
            "" if "\u0300" <= c <= "\u036f" or "\u02b0" <= c <= "\u02ff"  # accents and modifier letters
            else _LETTERS.get(c, c) if unicodedata.category(c)[0] in "LMN"
            else " and " if c == "&"
            else "" if unicodedata.category(c) == "Cf"
            else " "
            for c in unicodedata.normalize("NFKD", chr(code)).casefold()
        )  # fmt: skip
        return folded


_FOLDED = _Folded()


def fold(name: str) -> str:
    """A name's form for comparison: no case, accents or punctuation, single spaces, St. as Saint.

    Scripts other than Latin stay, so that 東京 can be found. Words of over 256 letters are split.
    """
    text = name.translate(_FOLDED)
    if text.isascii():
        text = " ".join(text.split())
    else:
        text = " ".join(unicodedata.normalize("NFC", word) for word in _WORDS.findall(text))
    return _SAINT.sub(r"saint\1", text) if "st" in text else text


def is_coordinate(latitude: float, longitude: float) -> bool:
    """Whether a latitude and a longitude in degrees are finite and on the globe."""
    return abs(latitude) <= 90 and abs(longitude) <= 180  # NaN compares false


_LAT, _LON = "lat(?:itude)?", "(?:lon(?:g(?:itude)?)?|lng)"
_AND = r"[\s,/&]{1,3}(?:and\s)?"
_SKIP = r"(?:[^\w+−–-]|[-–](?=\s)){0,8}"  # between a label and its number
_SMALL = r"\d{1,2}(?:\.\d{1,20})?"
_ANGLE = re.compile(  # every repetition is bounded, so that matching takes linear time
    rf"""
    (?: (?<![^\W_])(?P<label>(?i:{_LAT}(?:{_AND}{_LON})?|{_LON}(?:{_AND}{_LAT})?))\b{_SKIP}
        (?:(?i:is|of|at|about|around|near|roughly|approx|approximately)\b{_SKIP}){{0,2}}
        (?:(?P<label_before>[NSEW])\s?)?
      | (?<!\w)(?P<before>[NSEW])\s? | (?<![\w.]) )
    (?P<sign>[+−–-]?) (?P<degrees>\d{{1,3}}(?:\.\d{{1,20}})?(?:[eE][+-]\d{{1,3}})?) (?!\d|\.\d)
    (?:\s?(?P<mark>[°º˚]|deg(?:rees?)?\b)
        (?:\s?(?P<minutes>{_SMALL})\s?['′’] (?:\s?(?P<seconds>{_SMALL})\s?(?:["″”]|['′’]{{2}}))?)?)?
    (?(before)|(?(label_before)|(?:\s?(?P<after>[NSEW](?![^\W\d]|['’])|(?i:north|south|east|west)\b))?))
    (?![^\WNSEW]|\s?%|\s(?:km|m|miles?|met(?:er|re)s?)\b)
    """,
    re.VERBOSE,
)
_LINK = re.compile(r"[ \t]+|[\"']?\s*[,;]\s*[\"']?")
_CLOSE = 64  # most characters between the two numbers of a pair


class _Angle(NamedTuple):
    value: float
    axes: str  # "lat" or "lon"; "lat lon" or "lon lat" for this and the next; "" if unknown
    sure: bool  # it has decimals or a degree sign
    start: int
    end: int


def _angle(match: re.Match[str]) -> _Angle:
    minutes, seconds = float(match["minutes"] or 0), float(match["seconds"] or 0)
    value = float(match["degrees"]) + minutes / 60 + seconds / 3600
    if max(minutes, seconds) >= 60:
        value = math.nan  # counts as off the globe
    hemisphere = (match["before"] or match["label_before"] or match["after"] or "")[:1].upper()
    if match["sign"] in ("-", "−", "–") or (hemisphere and hemisphere in "SW"):
        value = -value
    axes = ""
    if hemisphere:
        axes = "lat" if hemisphere in "NS" else "lon"
    elif match["label"]:
        axes = " ".join(re.findall("lat|lon|lng", match["label"].lower())).replace("lng", "lon")
    sure = "." in match["degrees"] or match["mark"] is not None
    return _Angle(value, axes, sure, match.start(), match.end())


def _pair(text: str, one: _Angle, other: _Angle) -> tuple[float, float] | None:
    """The latitude and longitude in two consecutive angles; None if they are not a pair."""
    gap = text[one.end : other.start]
    if len(gap) > _CLOSE:
        return None
    axes = f"{one.axes} {other.axes}".strip()
    if one.axes and other.axes:
        belong = not any(map(str.isdigit, gap))
    else:
        before, after = text[max(0, one.start - 3) : one.start], text[other.end : other.end + 3]
        bracketed = before.rstrip().endswith(("(", "[", "{")) and after.lstrip().startswith((")", "]", "}"))
        belong = bool(_LINK.fullmatch(gap)) and bool(axes or bracketed or (one.sure and other.sure))
        axes = axes or "lat lon"
    if not belong or axes not in ("lat lon", "lon lat"):
        return None
    return (one.value, other.value) if axes == "lat lon" else (other.value, one.value)


def parse_coordinates(text: str) -> list[tuple[float, float]]:
    """Every pair of latitude and longitude in a text, in order, in degrees.

    It reads decimals ("48.8566, 2.3522": latitude first), brackets ("(48, 2)"), hemispheres ("48.85° N,
    2.35° E", "N 48.85 E 2.35"), minutes and seconds ("48°51'24\"N 2°21'08\"E") and names in either order
    ("longitude: 2.35, latitude: 48.85"). Two bare whole numbers are no pair, nor are numbers off the globe.
    """
    pairs = []
    waiting: _Angle | None = None
    for match in _ANGLE.finditer(text):
        angle = _angle(match)
        pair = _pair(text, waiting, angle) if waiting else None
        waiting = None if pair else angle
        if pair and is_coordinate(*pair):
            pairs.append(pair)
    return pairs
