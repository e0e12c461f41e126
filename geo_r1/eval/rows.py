"""Rows of a benchmark's table: CSV or parquet, columns by any of their usual names, pictures found."""

from __future__ import annotations

import argparse
import ast
import csv
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_r1.data import Sample
from geo_r1.places import is_coordinate

FIELD_LIMIT = 2**24  # characters of a CSV field
NO_NAME = ("", "none", "null", "nan", "unknown", "n/a", "not known", "not visible", "unclear", "undetermined")
LONGEST_PATH = 1000  # characters
SUFFIXES = ("", ".jpg", ".png", ".jpeg", ".webp")


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where a row stands, for errors, and the row by its column names, lower-cased; empty is None.

    Raises:
        ValueError: the file is missing, empty or malformed.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: expected .csv or .parquet")
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as table:
                for number, row in enumerate(
                    (row for batch in table.iter_batches(1024) for row in batch.to_pylist()), 1
                ):
                    yield f"{path}, row {number}", {str(k).strip().lower(): v for k, v in row.items()}
            return
        before = csv.field_size_limit(FIELD_LIMIT)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                for number, line in enumerate(csv.DictReader(file, restkey="", strict=True), 1):
                    row = {k.strip().lower(): v for k, v in line.items() if k}
                    cells = {k: v.strip() if isinstance(v, str) else None for k, v in row.items()}
                    yield f"{path}, row {number}", {k: v or None for k, v in cells.items()}
        finally:
            csv.field_size_limit(before)
    except OSError as error:  # pyarrow's are among them, without a number
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is not a table: {' '.join(str(error).split())}") from error


def first_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The value of the first of these columns that the row has, as text.

    Raises:
        ValueError: it has none of them.
    """
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        raise ValueError(f"{where}: no value in {' or '.join(names)}; its columns are {', '.join(row)}"[:400])
    return str(value)


def literal(text: str) -> Any:
    """The value of a Python literal, such as a list that was printed; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd numbers and escapes
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def name_of(value: Any) -> str | None:
    """A name in an answer, stripped; None for what stands for no name."""
    name = value.strip(" \t\n*_`\"'.,;:(){}[]/|-") if isinstance(value, str) else ""
    return None if name.lower() in NO_NAME else name


def coordinates_of(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Latitude and longitude in degrees.

    Raises:
        ValueError: they are missing, not numbers, or not on the globe.
    """
    found = [first_of(row, names, where) for names in (("lat", "latitude"), ("lon", "lng", "longitude"))]
    try:
        latitude, longitude = map(float, found)
    except ValueError:
        raise ValueError(f"{where}: coordinates must be numbers, got {found[0]!r} and {found[1]!r}") from None
    if not is_coordinate(latitude, longitude):
        raise ValueError(
            f"{where}: latitude {latitude} and longitude {longitude} are not on the globe (within 90 and 180)"
        )
    return latitude, longitude


def photo_sample(name: str, text: str, image: Path | None) -> Sample:
    """A question about one photograph; without its picture where nobody is going to look at it."""
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
    images = () if image is None else (image,)
    return Sample(name, ({"role": "user", "content": content},), images)


class Pictures:
    """Picture files under a folder, found by the name in a row, with or without suffix.

    A name without a folder is looked for in subfolders, too.

    Args:
        root: None where the answers are there already: then no picture is looked for.
    """

    def __init__(self, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise ValueError(f"image folder {root} does not exist")
        self.root = None if root is None else Path(os.path.realpath(root))
        self._by_name: dict[str, list[Path]] | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Pictures:
        """Those of --images, which only answers in --predictions can do without.

        Raises:
            ValueError: it is not given, or is no folder.
        """
        if options.predictions is not None:
            return cls(None)
        if options.images is None:
            raise ValueError("--images must name the folder of the pictures")
        return cls(options.images)

    def find(self, name: str, where: str) -> Path | None:
        """The path of a picture, which is under the root.

        Raises:
            ValueError: there is none, there are several, or the name leads out of the root.
        """
        if self.root is None:
            return None
        if len(name) > LONGEST_PATH:
            raise ValueError(f"{where}: image {name!r:.80} has a name that no file can have")
        for suffix in SUFFIXES:
            path = Path(os.path.realpath(self.root / f"{name}{suffix}"))
            if not path.is_relative_to(self.root):
                raise ValueError(f"{where}: image {name!r:.120} leads out of {self.root}")
            if path.is_file():
                return path
        found = [] if "/" in name else self._listed().get(name, [])
        if len(found) > 1:
            raise ValueError(f"{where}: image {name!r:.80} is both {found[0]} and {found[1]}")
        if not found:
            raise ValueError(f"{where}: there is no image {name!r:.120} under {self.root}")
        return found[0]

    def _listed(self) -> dict[str, list[Path]]:
        """Pictures in subfolders, such as test/00/ID.jpg of OSV-5M, by name with and without suffix."""
        if self._by_name is None:
            self._by_name = {}
            assert self.root is not None
            for folder, _, names in os.walk(self.root):
                for name in sorted(names):
                    path = Path(folder, name)
                    if path.suffix.lower() in SUFFIXES[1:] and not path.is_symlink():
                        for key in (name, path.stem):
                            self._by_name.setdefault(key, []).append(path)
        return self._by_name
