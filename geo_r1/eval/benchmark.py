"""A benchmark: its questions, the scoring of answers, and the summary of scores."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from geo_r1.data import Sample


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        sample: prompt and images; the id is unique in the benchmark.
        truth: JSON values that the scorer compares the answer with.
    """

    sample: Sample
    truth: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a benchmark's table.

    Attributes:
        title: printed title, with its unit.
        key: key of a summary; a dot enters a nested mapping: "within.25".
        unit: decides how a value is printed.
    """

    title: str
    key: str
    unit: Literal["share", "interval", "km", "number", "count"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as functions.

    Attributes:
        name: its name on the command line.
        help: one line for the command's help.
        configure: adds its options to a parser.
        questions: options -> all questions. Raises UserError with file and row if data is malformed.
        score: (question, the model's text or "") -> a record of JSON values. "answered" is true if an
            answer could be read. A record for the map also has "latitude", "longitude", "predicted_latitude",
            "predicted_longitude" and "distance_km", the last three None if the answer names no place.
        summarise: (records of all questions, each with "id" and "length" in tokens or None) -> figures.
            Every question is in the denominator; "answered" is the share that could be read.
        columns: the table's columns.
        published: other models' figures by model name, with a summary's keys; shares from 0 to 1.
        breakdowns: keys of a summary that hold a summary by group, shown as further tables.
        note: tells the table's reader how the figures are measured.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    questions: Callable[[argparse.Namespace], list[Question]]
    score: Callable[[Question, str], dict[str, Any]]
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    columns: Sequence[Column]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    breakdowns: Sequence[str] = ()
    note: str = ""


def broken_down(
    records: Sequence[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], Any],
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Summarise the records of each key, in the order of the keys; a record whose key is None is left out."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        if (name := key(record)) is not None:
            groups.setdefault(name, []).append(record)
    alike = len({isinstance(name, str) for name in groups}) < 2
    return {str(name): summarise(groups[name]) for name in sorted(groups, key=None if alike else str)}


def is_finite(value: Any) -> bool:
    """True if a value is a finite number that a float can hold."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion. Source: Wilson's score interval, 1927."""
    share = successes / trials
    spread = Z_95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
