"""GeoChain's test_samples.csv, made for a test, and its questions."""

import argparse
import csv

from geo_r1.eval.geochain import BENCHMARK

HEADER = ("key", "locatability_score", "lat", "lon", "city", "sub_folder", "class_mapping", "sequence_key")
NAIROBI, GOA, TRONDHEIM = (-1.2921, 36.8219), (15.4989, 73.8278), (63.4305, 10.3951)
MELBOURNE, OTTAWA, PARIS = (-37.8136, 144.9631), (45.4215, -75.6972), (48.8566, 2.3522)


def row(key, point, city="nairobi", classes="{}", folder="query"):
    return (key, "0.3", *point, city, folder, classes, f"s-{key}")


def write(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def ask(path, rows, tasks="all", **options):
    data = write(path / "test_samples.csv", rows)
    parser = argparse.ArgumentParser()
    BENCHMARK.configure(parser)
    arguments = ["--data", str(data), "--images", str(path / "images"), "--tasks", tasks]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    found = parser.parse_args(arguments)
    found.predictions = path  # no image is looked for
    return BENCHMARK.questions(found)


def answers(questions):
    return {q.sample.metadata["rank"]: q.sample.answer for q in questions}


def one(path, rank, point, city=""):
    """The only question of a rank on a photo."""
    [question] = ask(path, [row("p", point, city or "somewhere")], str(rank) + ",")
    return question
