"""IMAGEO-Bench: address and coordinates, in JSON, of street views (GSS) or places of business (UPC).

Its public scoring leaves missing answers out of the denominator and takes a coordinate of exactly 0 as
missing. Here every sample counts, 0 is a coordinate, and names are compared as the gazetteer reads them
("USA" is "United States"). The published kind of accuracy, by equal lower-case text, is shown beside it.
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
from geo_r1.eval.geolocation import agrees, distances, placed, share
from geo_r1.eval.rows import SEARCHED, Images, add_data, first_of, literal, name_of, place_of, read_table
from geo_r1.places import is_coordinate, open_gazetteer

LEVELS = ("city", "state", "country")
MOST_READ = 65536  # characters of an answer
MOST_TRIES = 64  # failed attempts to read JSON from a brace
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
    """The last `reverse_geocoding` object in an answer's JSON; empty if there is none.

    Without JSON, the text between the outermost braces may be a Python literal.
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
    names = {level: name_of(address.get(level) if isinstance(address, dict) else None) for level in LEVELS}
    point = _coordinates(answer.get("coordinates"))
    record: dict[str, Any] = {**truth, **{f"predicted_{level}": name for level, name in names.items()}}
    record |= placed(truth, point)
    record["answered"] = point is not None or any(names.values())
    same = {"city": gazetteer.same_city, "state": gazetteer.same_state, "country": gazetteer.same_country}
    for level, name in names.items():
        record[f"{level}_correct"] = agrees(name, truth[level], same[level])
        record[f"{level}_exact"] = agrees(name, truth[level], lambda x, y: x.lower() == y.lower())
    return record


def _coordinates(value: Any) -> tuple[float, float] | None:
    pair = [value.get("latitude"), value.get("longitude")] if isinstance(value, dict) else []
    numbers: list[Any] = [x for x in pair if isinstance(x, str) or is_finite(x)]
    try:
        latitude, longitude = map(float, numbers)
    except ValueError:  # not numbers, or not two of them
        return None
    return (latitude, longitude) if is_coordinate(latitude, longitude) else None


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = distances(records)
    for level in LEVELS:
        figures[f"{level}_accuracy"] = share(records, f"{level}_correct")
        figures[f"{level}_exact"] = share(records, f"{level}_exact")
    return figures


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records, and by continent."""
    return _figures(records) | {"by_continent": broken_down(records, lambda r: r["continent"], _figures)}


def _configure(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "dataset1_info.csv (GSS) or dataset2_info.csv (UPC)", SEARCHED)


def _questions(options: argparse.Namespace) -> list[Question]:
    images, questions = Images(options), []
    for where, row in read_table(options.data):
        name = first_of(row, ("image_id",), where)
        place = place_of(row, (*LEVELS, "continent"), where)
        # GSS gives the path on the machine that downloaded the image
        file_name = Path(str(row.get("img_path") or name)).name
        questions.append(Question(images.sample(name, QUESTION, file_name, where), place))
    return questions


BENCHMARK = Benchmark(
    name="imageo",
    help="IMAGEO-Bench, GSS or UPC: city, state and country of an image, mean and median distance",
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
        name: dict(zip(("city_exact", "country_exact", "mean_km", "median_km"), figures, strict=True))
        for name, figures in (
            ("Geo-R1 (GSS)", (0.3272, 0.8146, 568.32, 69.40)),
            ("GeoCLIP (GSS)", (0.1086, 0.6361, 943.48, 266.90)),
        )
    },
    breakdowns=("by_continent",),
    note="Published rows leave out samples without an answer. Distances are over answers with coordinates.",
)
