"""GeoChain: 21 questions on a street photo, from the objects in it to its place on earth.

The paper reports 13 of the 21 tasks, but does not name them. `--tasks 13` takes those of yes or no.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_r1.data import Sample
from geo_r1.errors import UserError
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down
from geo_r1.eval.geochain_answers import judge, read_coordinates
from geo_r1.eval.geochain_truths import (
    ALL_RANKS,
    BINARY_RANKS,
    CITY,
    CITY_FACTS,
    COORDINATES,
    COUNTRY,
    LANGUAGES,
    QUESTIONS,
    STATE,
    YES_NO,
    Task,
    Truth,
    read_city_facts,
    read_tasks,
    truths,
)
from geo_r1.eval.geolocation import distances, placed
from geo_r1.eval.rows import add_data, coordinates_of, first_of, read_table
from geo_r1.places import open_gazetteer

RIGHT_KM = 25  # coordinates in the same city are right: the public code states no threshold
SMALLEST_CITY = 1000  # inhabitants, for where a photo is: as in the public generator's reverse geocoder

ASKED_FOR = {
    YES_NO: "yes or no",
    COUNTRY: "the name of the country",
    LANGUAGES: "the name of the language, or of each",
    STATE: "the name of the state or province",
    CITY: "the name of the city, town or village",
    COORDINATES: "two decimal numbers, (latitude, longitude), south and west negative",
}


def _configure(parser: argparse.ArgumentParser) -> None:
    folder = "folder of <city>/<sub_folder>/images/<key>.jpg"
    add_data(parser, "test_samples.csv of GeoChain", folder, required=True)
    add = parser.add_argument
    add("--questions", type=Path, default=QUESTIONS, help="a questions.csv; default: the 21 of GeoChain")
    add("--per-city", type=Path, default=CITY_FACTS, help="a per_city_answers.csv; default: GeoChain's")
    add("--tasks", default="all", help="all; 13, those of yes or no; or ranks: 8,10,21 (13,: the 13th)")
    add("--photos", type=int, help="only the first photos")


def _questions(options: argparse.Namespace) -> list[Question]:
    """A question for each photo and task that has a truth.

    A photo without coordinates is only asked about what can be seen. The number of questions that were left
    out for want of a truth is in each sample's metadata, and in the summary.

    Raises:
        UserError: a file or an option is malformed, a photo is there twice or outside of the folder of
            images; names file and row.
    """
    tasks, city_facts = read_tasks(options.questions), read_city_facts(options.per_city)
    ranks, gazetteer = _ranks(options.tasks, tasks), open_gazetteer(SMALLEST_CITY)
    if options.photos is not None and options.photos < 1:
        raise UserError(f"--photos must be at least 1, got {options.photos}")
    asked: list[tuple[dict[str, Any], Path, Task, Truth]] = []
    seen: dict[str, str] = {}
    for where, row in itertools.islice(read_table(options.data), options.photos):
        key = first_of(row, ("key",), where)
        if key in seen:
            raise UserError(f"{where}: the key {key!r:.60} is that of {seen[key]} too")
        seen[key] = where
        for column in ("lat", "lon", "class_mapping"):
            if column not in row:
                raise UserError(f"{where}: no column {column}; its columns are {', '.join(row)[:200]}")
        image = _image_path(options.images, row, where, options.predictions is None)
        metadata: dict[str, Any] = {"image": key, "city": str(row["city"])}
        missing = any(str(row[column]).lower() in ("none", "nan") for column in ("lat", "lon"))
        point = None if missing else coordinates_of(row, where)
        if point:
            metadata |= dict(zip(("latitude", "longitude"), point, strict=True))
        found = truths(_classes(row["class_mapping"]), point, gazetteer, city_facts)
        asked += [(metadata, image, tasks[rank], found[rank]) for rank in ranks if rank in found]
    if not asked:
        nothing = "no photo that these tasks can be asked of" if seen else "no photos"
        raise UserError(f"{options.data} holds {nothing}")
    left_out = len(seen) * len(ranks) - len(asked)
    return [_question(row | {"left_out": left_out}, image, task, truth) for row, image, task, truth in asked]


def _ranks(option: str, tasks: Mapping[int, Task]) -> list[int]:
    if option == "all":
        return sorted(tasks)
    if option == "13":
        wanted = list(BINARY_RANKS)
    else:
        parts = [part.strip() for part in option.strip(" ,").split(",")]
        if not set(parts) <= set(map(str, ALL_RANKS)):
            raise UserError(
                f"--tasks must be all, 13, or ranks from 1 to 21 with commas, got {option[:60]!r}"
            )
        wanted = sorted({int(part) for part in parts})
    if missing := [rank for rank in wanted if rank not in tasks]:
        raise UserError(f"--tasks: the file of questions has no rank {missing[0]}")
    return wanted


def _image_path(root: Path, row: Mapping[str, Any], where: str, wanted: bool) -> Path:
    city, folder, key = (first_of(row, (column,), where) for column in ("city", "sub_folder", "key"))
    for name in (city, folder, key):
        if name in (".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(
                f"{where}: city, sub_folder and key must be names without slashes, got {name!r:.60}"
            )
    path = root / city / folder / "images" / f"{key}.jpg"
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):  # also for a circle of links
        raise UserError(f"{where}: image {path} leads out of {root}")
    if wanted and not path.is_file():
        raise UserError(f"{where}: there is no image {path}")
    return path


def _classes(mapping: Any) -> set[str]:
    """Names of the classes; none where the mapping cannot be read, as in the public generator."""
    try:
        value = json.loads(mapping)
    except (TypeError, ValueError, RecursionError):
        return set()
    return {name.strip() for name in value} if isinstance(value, dict) else set()


def _question(metadata: dict[str, Any], image: Path, task: Task, truth: Truth) -> Question:
    form = ASKED_FOR.get(truth["kind"]) or "one of " + ", ".join(truth["options"])
    text = f"{task.text} Think in <think> </think>, then give {form}, alone, in <answer> </answer>."
    content = [{"type": "image"}, {"type": "text", "text": text}]
    sample = Sample(
        f"{metadata['image']}/{task.rank}",
        ({"role": "user", "content": content},),
        (image,),
        answer=", ".join([truth["answer"]] if isinstance(truth["answer"], str) else truth["answer"]),
        metadata=metadata | {"rank": task.rank, "difficulty": task.difficulty, "category": task.category},
    )
    return Question(sample, truth)


def score(question: Question, text: str) -> dict[str, Any]:
    """Read an answer, and compare it with the truth; see `judge` and `Benchmark.score`.

    Country, state and city are right by any of their names, also with the region: "Ottawa, Ontario".
    Languages are right if one of the true ones is named. Coordinates are right within 25 km; only their
    records have a place on the map.
    """
    metadata, truth = question.sample.metadata, question.truth
    record = {
        name: metadata[name] for name in ("image", "rank", "difficulty", "category", "city", "left_out")
    }
    point = metadata.get("latitude"), metadata.get("longitude")
    if truth["kind"] != COORDINATES:
        read, right = judge(text, truth, point, open_gazetteer())
        return record | {"answered": read is not None, "right": right, "read": read}
    found = read_coordinates(text)
    record |= {"latitude": point[0], "longitude": point[1], **placed(metadata, found)}
    return record | {
        "answered": found is not None,
        "right": found is not None and record["distance_km"] <= RIGHT_KM,
        "read": None if found is None else f"{found[0]}, {found[1]}",
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records; by rank, difficulty, category and city."""
    groups = {
        f"by_{name}": broken_down(records, operator.itemgetter(name), _figures)
        for name in ("rank", "difficulty", "category", "city")
    }
    return _figures(records) | {"left_out": records[0]["left_out"]} | groups


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of all questions; the pass score is the mean, over photos, of the share that is right."""
    photos: dict[str, list[bool]] = {}
    for record in records:
        photos.setdefault(record["image"], []).append(record["right"])
    located = [record for record in records if "distance_km" in record]
    return {
        "accuracy": sum(record["right"] for record in records) / len(records),
        "pass_score": statistics.fmean(map(statistics.fmean, photos.values())),
        "answered": sum(record["answered"] for record in records) / len(records),
        "coordinates": distances(located) if located else None,
        "num_samples": len(records),
        "num_images": len(photos),
    }


BENCHMARK = Benchmark(
    name="geochain",
    help="GeoChain: 21 questions on a street photo, from what is seen to coordinates; accuracy by question",
    configure=_configure,
    questions=_questions,
    score=score,
    summarise=summarise,
    columns=(
        Column("right", "accuracy", "share"),
        Column("pass score", "pass_score", "share"),
        Column("answered", "answered", "share"),
        Column("within 25 km", "coordinates.within.25", "share"),
        Column("median, km", "coordinates.median_km", "km"),
        Column("questions", "num_samples", "count"),
        Column("no truth", "left_out", "count"),
    ),
    breakdowns=("by_rank", "by_difficulty", "by_category", "by_city"),
    note="The truths are the public generator's; how answers are judged is ours: coordinates within 25 km.",
)
