"""Geolocation of single photographs: the distance between the answer and the true place.

Reads MP16-Reason, IM2GPS3k, YFCC4k and OSV-5M, which differ only in their column names. An answer
in coordinates is taken as it is; one in words is looked up in the gazetteer: the city, else the country's
capital. Distances are great circles on a sphere of 6371 km, as in ISNs and OSV-5M; GeoCLIP's geodesic on the
ellipsoid differs by at most 0.6 %. An answer without a place is a miss at every distance.
"""

from __future__ import annotations

import argparse
import html
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from geo_r1.answers import MOST_READ, said
from geo_r1.errors import UserError
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down
from geo_r1.eval.rows import SEARCHED, Images, add_data, first_of, name_of, place_of, read_table
from geo_r1.places import Gazetteer, distance_km, open_gazetteer, parse_coordinates

THRESHOLDS_KM = (1, 25, 200, 750, 2500)  # street, city, region, country, continent
ID_COLUMNS = ("img_id", "image_id", "id", "img_file")
QUESTION = (
    "Where was this photograph taken? Reason from what is visible: signs, script, architecture, vegetation, "
    "terrain, vehicles and the side they drive on. Think in <think> </think>, then answer in "
    "<answer> </answer> with two lines: country: NAME and city: NAME."
)
SMALLEST_CITY = 1000  # inhabitants: answers name small places too
LONG = 120  # most characters of a place without labels
_LABEL = re.compile(
    r"(?<![^\W_])(country|city|town|place|location|pa[ií]s|ciudad|国家|城市)(?: name)?[\"'*_\s]{0,4}[:：=]",
    re.IGNORECASE,
)
_LEVEL = dict.fromkeys(("country", "país", "pais", "国家"), "country")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_LEAD = re.compile(r"^.*(?:\b(?:in|near|at|is|from|of|around|outside|likely|answer)\b|:)\s+", re.IGNORECASE)
_NEAR = re.compile(r"^(?:near|around|outside|close to|in|the city of|greater)\s+", re.IGNORECASE)
_OR = re.compile(r"\s*/\s*|\s+or\s+", re.IGNORECASE)


def answered_place(text: str, gazetteer: Gazetteer) -> dict[str, Any]:
    """Country, city and coordinates of an answer, each None if missing.

    Coordinates outrank names; two different pairs count as none. "located_by" is "coordinates", "city", or
    for an unknown city its country's "capital".
    """
    block = html.unescape(_TAG.sub(" ", said(text)[-MOST_READ:])).replace("\r", "\n")
    country, city, whole = _named(block, gazetteer)
    pairs = set(parse_coordinates(block))
    place: dict[str, Any] = {"country": country, "city": city, "coordinates": None, "located_by": None}
    if pairs:
        return place | ({"coordinates": pairs.pop(), "located_by": "coordinates"} if len(pairs) == 1 else {})
    known = gazetteer.country(country) if country else None
    found = gazetteer.cities(whole) if whole else []
    found = found or (gazetteer.cities(city, known.code if known else None) if city else [])
    if found:
        return place | {"coordinates": (found[0].latitude, found[0].longitude), "located_by": "city"}
    capital = gazetteer.locate(None, country)
    return place | ({"coordinates": capital, "located_by": "capital"} if capital else {})


def _named(block: str, gazetteer: Gazetteer) -> tuple[str | None, str | None, str | None]:
    """Country, city, and the city with its state, as in "Birmingham, AL", if the answer has both."""
    labels = list(_LABEL.finditer(block))
    if labels:
        values: dict[str, str | None] = {}
        for label, following in zip(labels, [*labels[1:], None], strict=True):
            value = block[label.end() : following.start() if following else len(block)].strip().split("\n")[0]
            values.setdefault(_LEVEL.get(label[1].lower(), "city"), name_of(value))
        city = _one(values.get("city"))
        return values.get("country"), city, city if city and "," in city else None
    lines = [line for line in block.split("\n") if line.strip()]
    parts = [part for part in ",".join(lines).split(",") if part.strip()]
    if not parts or len(lines) > 2 or len(block) > LONG:
        return None, None, None
    first, *more = parts
    lead = first if gazetteer.cities(first) or gazetteer.country(first) else _LEAD.sub("", first)
    if not more:
        name = name_of(lead)
        return (name, None, None) if name and gazetteer.country(name) else (None, _one(name), None)
    city, last = _one(name_of(lead)), name_of(more[-1])
    return last, city, f"{city}, {last}" if city and last and gazetteer.is_region(last) else None


def _one(city: str | None) -> str | None:
    """A city without words such as "near"; None for a choice between two."""
    if city is None or len(_OR.split(city)) > 1:
        return None
    return name_of(_NEAR.sub("", city))


def score(question: Question, text: str) -> dict[str, Any]:
    """Distance in km, and whether city and country are right; see `Benchmark.score`."""
    gazetteer, truth = open_gazetteer(SMALLEST_CITY), question.truth
    place = answered_place(text, gazetteer)
    record = {**truth, "predicted_city": place["city"], "predicted_country": place["country"]}
    record |= placed(truth, place["coordinates"])
    record |= {"answered": place["coordinates"] is not None, "located_by": place["located_by"]}
    for level, same in (("city", gazetteer.same_city), ("country", gazetteer.same_country)):
        record[f"{level}_correct"] = agrees(place[level], truth[level], same)
    return record


def placed(truth: Mapping[str, Any], point: tuple[float, float] | None) -> dict[str, Any]:
    """The predicted place of a record and its distance from the true one, in km; None without a point."""
    latitude, longitude = point or (None, None)
    distance = distance_km(truth["latitude"], truth["longitude"], *point) if point else None
    return {"predicted_latitude": latitude, "predicted_longitude": longitude, "distance_km": distance}


def agrees(said: str | None, true: str | None, same: Callable[[str, str], bool]) -> bool | None:
    """True if an answer matches the truth; None if the truth is unknown."""
    return None if true is None else said is not None and same(said, true)


def distances(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares within each threshold, over all records; mean and median in km over those with a distance."""
    known = [r["distance_km"] for r in records if r["distance_km"] is not None]
    return {
        "within": {str(km): sum(d <= km for d in known) / len(records) for km in THRESHOLDS_KM},
        "mean_km": statistics.fmean(known) if known else None,
        "median_km": statistics.median(known) if known else None,
        "located": len(known) / len(records),
        "answered": sum(r["answered"] for r in records) / len(records),
        "num_samples": len(records),
    }


def share(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Share of true values among those that are not None; None if all are None."""
    known = [r[key] for r in records if r[key] is not None]
    return sum(known) / len(known) if known else None


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = {f"{x}_accuracy": share(records, f"{x}_correct") for x in ("city", "country")}
    capitals = sum(r["located_by"] == "capital" for r in records) / len(records)
    return distances(records) | accuracies | {"by_capital": capitals}


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records, and by true country."""
    return _figures(records) | {"by_country": broken_down(records, lambda r: r["country"], _figures)}


def _configure(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "CSV or parquet: IMG_ID or id, LAT and LON, optionally city, country", SEARCHED)


def _questions(options: argparse.Namespace) -> list[Question]:
    rows, images = list(read_table(options.data)), Images(options)
    if rows and _swapped([row for _, row in rows]):
        raise UserError(
            f"{options.data}: LAT has values beyond 90 and LON has none: their names are swapped, as in the "
            "first edition of im2gps3k_places365.csv; exchange the two names in its first line"
        )
    return [_question(row, where, images) for where, row in rows]


def _question(row: Mapping[str, Any], where: str, images: Images) -> Question:
    name = first_of(row, ID_COLUMNS, where)
    place = place_of(row, ("city", "country"), where)
    return Question(images.sample(name, QUESTION, name, where), place)


def _swapped(rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if over a tenth of the latitudes, more than typing mistakes, are beyond 90 and no longitude is."""

    def beyond(name: str) -> int:
        count = 0
        for row in rows:
            with suppress(ValueError):
                count += 90 < abs(float(row.get(name) or 0)) <= 180
        return count

    return "lat" in rows[0] and beyond("lat") > len(rows) / 10 and not beyond("lon")


def _published(*figures: float) -> dict[str, Any]:
    return {"within": {str(km): x / 100 for km, x in zip(THRESHOLDS_KM, figures, strict=True)}}


BENCHMARK = Benchmark(
    name="geolocation",
    help="MP16-Reason, IM2GPS3k, YFCC4k, OSV-5M: shares within 1, 25, 200, 750 and 2500 km; city, country",
    configure=_configure,
    questions=_questions,
    score=score,
    summarise=summarise,
    columns=(
        *(Column(f"{km} km", f"within.{km}", "share") for km in THRESHOLDS_KM),
        Column("median, km", "median_km", "km"),
        Column("city", "city_accuracy", "share"),
        Column("country", "country_accuracy", "share"),
        Column("answered", "answered", "share"),
        Column("by capital", "by_capital", "share"),
        Column("samples", "num_samples", "count"),
    ),
    # Source: Geo-R1, arXiv:2510.00072, MP16-Reason.
    published={
        "Geo-R1": _published(17.98, 61.02, 73.91, 86.78, 93.56),
        "GLOBE-7B": _published(17.99, 62.85, 73.83, 86.68, 92.52),
        "Qwen2.5-VL-7B": _published(15.42, 52.72, 62.86, 75.11, 83.47),
        "InternVL3-8B": _published(12.01, 44.17, 55.66, 75.36, 86.98),
        "GeoReasoner-7B": _published(10.06, 40.44, 50.91, 68.01, 79.68),
        "GeoCLIP": _published(29.28, 52.52, 66.85, 84.07, 93.33),
        "ISNs": _published(26.24, 47.38, 55.88, 68.48, 80.92),
        "Hybrid": _published(0.97, 16.53, 28.72, 50.31, 71.47),
        "RFM-YFCC": _published(11.72, 46.64, 60.46, 77.97, 91.96),
    },
    breakdowns=("by_country",),
    note="Published rows are for MP16-Reason; their names were located by another gazetteer, online.",
)
