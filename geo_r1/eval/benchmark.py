"""A benchmark: its questions, how an answer is scored, and how scores are summed up."""

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
        sample: its prompt and pictures; its id is unique in the benchmark.
        truth: JSON values that the scorer compares with.
    """

    sample: Sample
    truth: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a benchmark's table.

    Attributes:
        title: as it is printed, with its unit.
        key: of a summary; a dot goes into a mapping: "within.25".
        unit: how a value is shown.
    """

    title: str
    key: str
    unit: Literal["share", "interval", "km", "number", "count"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as functions.

    Attributes:
        name: on the command line.
        help: one line.
        configure: adds its options to a parser.
        questions: options -> all questions. Raises UserError with file and row where the data is malformed.
        score: (question, the model's text or "") -> a record of JSON values. It has "answered" (an answer
            could be read); for a place on the map also "latitude", "longitude", "predicted_latitude",
            "predicted_longitude" and "distance_km", the latter three None where the answer names no place.
        summarise: (records of all questions, each with "id" and "length" in tokens or None) -> figures.
            Every question is in the denominator; "answered" is the share that could be read.
        columns: of the table.
        published: figures of other models, by name, with the keys of a summary; shares from 0 to 1.
        breakdowns: keys of a summary that hold a summary by group, shown as further tables.
        note: how the figures are measured, for the table's reader.
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
    """A summary for each group of records that have a key, in the keys' order."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        if (name := key(record)) is not None:
            groups.setdefault(name, []).append(record)
    alike = len({isinstance(name, str) for name in groups}) < 2
    return {str(name): summarise(groups[name]) for name in sorted(groups, key=None if alike else str)}


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
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
