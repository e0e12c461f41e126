"""Geolocation of single photographs: how far is the answer from where the picture was taken?

Reads MP16-Reason, IM2GPS3k, YFCC4k and OSV-5M, which differ only in the names of their columns. An answer
in coordinates is taken as it is; one in words is looked up in the gazetteer: the city, else the country's
capital. Distances are great circles on a sphere of 6371 km, as ISNs and OSV-5M have it; GeoCLIP's geodesic on
the ellipsoid differs by at most 0.6 %. An answer that gives no place is a miss at every distance.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_r1.answers import MOST_READ, extract_answer
from geo_r1.data import Sample
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down
from geo_r1.eval.rows import Pictures, coordinates_of, first_of, name_of, read_table
from geo_r1.places import Gazetteer, distance_km, open_gazetteer, parse_coordinates

THRESHOLDS_KM = (1, 25, 200, 750, 2500)  # street, city, region, country, continent
ID_COLUMNS = ("img_id", "image_id", "id", "img_file")
QUESTION = (
    "Where was this photograph taken? Reason from what is visible: signs, script, architecture, vegetation, "
    "terrain, vehicles and the side they drive on. Think in <think> </think>, then answer in "
    "<answer> </answer> with two lines: country: NAME and city: NAME."
)
SMALLEST_CITY = 1000  # inhabitants: answers name small places too
_LINE = re.compile(r"^[\W_]*(country|city|town|place|location)[\W_]*:([^\n]*)$", re.IGNORECASE | re.MULTILINE)


def answered_place(text: str, gazetteer: Gazetteer) -> dict[str, Any]:
    """What an answer says of a place: country, city, and coordinates, each None where it does not.

    Coordinates in the answer count before names; two different pairs are none.
    """
    block = extract_answer(text) if "<answer>" in text else text
    block = " ".join((block or "")[-MOST_READ:].replace("\r", "\n").split(" "))
    lines = {name.lower(): name_of(value) for name, value in _LINE.findall(block)}
    country = lines.get("country")
    city = lines.get("city") or lines.get("town") or lines.get("place") or lines.get("location")
    if not lines and "," in block and "\n" not in block.strip():  # "Lyon, France"
        city, _, country = map(name_of, block.rpartition(","))
    elif not lines and "\n" not in block.strip():
        name = name_of(block)
        country, city = (name, None) if name and gazetteer.country(name) else (None, name)
    pairs = set(parse_coordinates(block))
    found = pairs.pop() if len(pairs) == 1 else None
    if found is None and not pairs:
        found = gazetteer.locate(city, country)
    return {"country": country, "city": city, "coordinates": found}


def score(question: Question, text: str) -> dict[str, Any]:
    """Distance in km, and whether city and country are named rightly; see `Benchmark.score`."""
    gazetteer, truth = open_gazetteer(SMALLEST_CITY), question.truth
    place = answered_place(text, gazetteer)
    record: dict[str, Any] = {**truth, "predicted_city": place["city"], "predicted_country": place["country"]}
    latitude, longitude = place["coordinates"] or (None, None)
    distance = None
    if place["coordinates"] is not None:
        distance = float(distance_km(truth["latitude"], truth["longitude"], latitude, longitude))
    record |= {"predicted_latitude": latitude, "predicted_longitude": longitude, "distance_km": distance}
    record["answered"] = distance is not None
    for level, same in (("city", gazetteer.same_city), ("country", gazetteer.same_country)):
        true, said = truth[level], place[level]
        record[f"{level}_correct"] = None if true is None else said is not None and same(said, true)
    return record


def distances(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares within each threshold, over all records; mean and median in km over those with a distance."""
    known = [r["distance_km"] for r in records if r["distance_km"] is not None]
    return {
        "within": {str(km): sum(d <= km for d in known) / len(records) for km in THRESHOLDS_KM},
        "mean_km": statistics.fmean(known) if known else None,
        "median_km": statistics.median(known) if known else None,
        "answered": sum(r["answered"] for r in records) / len(records),
        "num_samples": len(records),
    }


def share(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Share of the records that know (not None) where it is true; None where none knows."""
    known = [r[key] for r in records if r[key] is not None]
    return sum(known) / len(known) if known else None


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = {f"{x}_accuracy": share(records, f"{x}_correct") for x in ("city", "country")}
    return distances(records) | accuracies


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records, and by true country."""
    return _figures(records) | {"by_country": broken_down(records, lambda r: r["country"], _figures)}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="CSV or parquet: IMG_ID or id, LAT and LON, perhaps city, country",
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of the pictures; subfolders are searched"
    )


def _questions(options: argparse.Namespace) -> list[Question]:
    rows = list(read_table(options.data))
    if rows and _swapped([row for _, row in rows]):
        raise ValueError(
            f"{options.data}: LAT has values beyond 90 and LON has none: their names are swapped, as in the "
            "first edition of im2gps3k_places365.csv; exchange the two names in its first line"
        )
    pictures = Pictures(options.images)
    return [_question(row, where, pictures) for where, row in rows]


def _question(row: Mapping[str, Any], where: str, pictures: Pictures) -> Question:
    name = first_of(row, ID_COLUMNS, where)
    latitude, longitude = coordinates_of(row, where)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    sample = Sample(name, ({"role": "user", "content": content},), (pictures.find(name, where),))
    place = {level: None if row.get(level) is None else str(row[level]) for level in ("city", "country")}
    return Question(sample, {"latitude": latitude, "longitude": longitude, **place})


def _swapped(rows: Sequence[Mapping[str, Any]]) -> bool:
    def beyond(name: str) -> bool:
        for row in rows:
            try:
                if abs(float(row.get(name) or 0)) > 90:
                    return True
            except ValueError:
                continue
        return False

    return "lat" in rows[0] and beyond("lat") and not beyond("lon")


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
    note="Published rows: MP16-Reason, whose names were located by another gazetteer, online.",
)
