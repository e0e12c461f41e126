"""IMAGEO-Bench: address and coordinates, in JSON, of street views (GSS) or places of business (UPC).

Its public scoring leaves missing answers out of the denominator and takes a coordinate of exactly 0 for
missing. Here every sample counts, 0 is the equator, and names are compared as the gazetteer reads them
("USA" is "United States"); the accuracy by equal lower-case text, as published, stands beside.
Source: IMAGEO-Bench, arXiv:2508.01608.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_r1.answers import said
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down, is_finite
from geo_r1.eval.geolocation import distances, share
from geo_r1.eval.rows import Pictures, coordinates_of, first_of, literal, name_of, photo_sample, read_table
from geo_r1.places import Gazetteer, distance_km, is_coordinate, open_gazetteer, same_state

LEVELS = ("city", "state", "country")
MOST_READ = 65536  # characters of an answer
MOST_TRIES = 64  # braces at which no JSON begins
QUESTION = (
    "Where was this picture taken? Answer with one JSON object and nothing after it:\n"
    '{"image_information": {"environment": "indoor or outdoor", "scene_type": "building, scenery, street or '
    'mixed", "setting": "urban, suburban, rural or natural"}, "reasoning": {"landmark_recognition": "", '
    '"text_and_signage": "", "cultural_indicators": "", "spatial_context": ""}, "reverse_geocoding": '
    '{"confidence": "1 to 5", "address": {"street": "", "city": "", "state": "", "country": ""}, '
    '"coordinates": {"latitude": "degrees", "longitude": "degrees"}}}\n'
    "First think about landmarks, text and signs, cultural indicators and the surroundings."
)


def parse_answer(text: str) -> dict[str, Any]:
    """The object `reverse_geocoding` of the last JSON object in an answer that has one; empty without.

    Where there is no JSON, what stands between the outermost braces may be a Python literal.
    """
    text, decoder = said(text)[-MOST_READ:], json.JSONDecoder()
    found: dict[str, Any] = {}
    start, tries = text.find("{"), 0
    while start >= 0 and tries < MOST_TRIES:
        try:
            value, start = decoder.raw_decode(text, start)
            found = _geocoded(value) or found
        except (ValueError, RecursionError):
            start, tries = start + 1, tries + 1
        start = text.find("{", start)
    if not found:
        found = _geocoded(literal(text[text.find("{") : text.rfind("}") + 1]))
    return found


def _geocoded(value: Any) -> dict[str, Any]:
    inner = value.get("reverse_geocoding", value) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) and ("address" in inner or "coordinates" in inner) else {}


def score(question: Question, text: str) -> dict[str, Any]:
    """Names and coordinates of an answer against the truth; see `Benchmark.score`."""
    gazetteer, truth = open_gazetteer(), question.truth
    answer = parse_answer(text)
    address = answer.get("address")
    address = address if isinstance(address, dict) else {}
    names = {level: name_of(address.get(level)) for level in LEVELS}
    latitude, longitude = _coordinates(answer.get("coordinates"))
    record: dict[str, Any] = {**truth, **{f"predicted_{level}": names[level] for level in LEVELS}}
    record |= {"predicted_latitude": latitude, "predicted_longitude": longitude, "distance_km": None}
    if latitude is not None:
        distance = distance_km(truth["latitude"], truth["longitude"], latitude, longitude)
        record["distance_km"] = float(distance)
    record["answered"] = latitude is not None or any(names.values())
    for level in LEVELS:
        true, name = truth[level], names[level]
        record[f"{level}_correct"] = (
            None if true is None else name is not None and _same(gazetteer, level, name, true)
        )
        exact = name is not None and true is not None and name.lower() == true.lower()
        record[f"{level}_exact"] = None if true is None else exact
    return record


def _same(gazetteer: Gazetteer, level: str, one: str, other: str) -> bool:
    if level == "state":
        return same_state(one, other)
    return (gazetteer.same_city if level == "city" else gazetteer.same_country)(one, other)


def _coordinates(value: Any) -> tuple[float | None, float | None]:
    pair = [value.get("latitude"), value.get("longitude")] if isinstance(value, dict) else []
    numbers: list[Any] = [x for x in pair if isinstance(x, str) or is_finite(x)]
    try:
        latitude, longitude = (float(number) for number in numbers)
    except ValueError:  # no numbers, or other than two
        return None, None
    return (latitude, longitude) if is_coordinate(latitude, longitude) else (None, None)


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = {f"{level}_accuracy": share(records, f"{level}_correct") for level in LEVELS}
    exact = {f"{level}_exact": share(records, f"{level}_exact") for level in LEVELS}
    return distances(records) | accuracies | exact


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records, and by continent."""
    return _figures(records) | {"by_continent": broken_down(records, lambda r: r["continent"], _figures)}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, help="dataset1_info.csv (GSS) or dataset2_info.csv (UPC)"
    )
    parser.add_argument("--images", type=Path, help="folder of the pictures; subfolders are searched")


def _questions(options: argparse.Namespace) -> list[Question]:
    pictures, questions = Pictures.of(options), []
    for where, row in read_table(options.data):
        name = first_of(row, ("image_id",), where)
        latitude, longitude = coordinates_of(row, where)
        sample = photo_sample(name, QUESTION, pictures.find(_file_of(row, name), where))
        truth = {
            level: None if row.get(level) is None else str(row[level]) for level in (*LEVELS, "continent")
        }
        questions.append(Question(sample, {"latitude": latitude, "longitude": longitude, **truth}))
    return questions


def _file_of(row: Mapping[str, Any], name: str) -> str:
    """A picture's name: GSS has a path of the place it was downloaded to, which need not be ours."""
    return Path(str(row.get("img_path") or name)).name


BENCHMARK = Benchmark(
    name="imageo",
    help="IMAGEO-Bench, GSS or UPC: city, state and country of a picture, mean and median distance",
    configure=_configure,
    questions=_questions,
    score=score,
    summarise=summarise,
    columns=(
        Column("city", "city_accuracy", "share"),
        Column("city, equal text", "city_exact", "share"),
        Column("state", "state_accuracy", "share"),
        Column("country", "country_accuracy", "share"),
        Column("country, equal text", "country_exact", "share"),
        Column("mean, km", "mean_km", "km"),
        Column("median, km", "median_km", "km"),
        Column("answered", "answered", "share"),
        Column("with coordinates", "located", "share"),
        Column("samples", "num_samples", "count"),
    ),
    # Source: Geo-R1, arXiv:2510.00072, IMAGEO-GSS.
    published={
        "Geo-R1 (GSS)": {
            "city_exact": 0.3272,
            "country_exact": 0.8146,
            "mean_km": 568.32,
            "median_km": 69.40,
        },
        "GeoCLIP (GSS)": {
            "city_exact": 0.1086,
            "country_exact": 0.6361,
            "mean_km": 943.48,
            "median_km": 266.90,
        },
    },
    breakdowns=("by_continent",),
    note="Published rows leave out samples without an answer. Distances are of those with coordinates.",
)
