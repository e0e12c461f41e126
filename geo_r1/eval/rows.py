"""Rows of a benchmark's table: CSV or parquet, columns by any of their usual names, pictures found."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_r1.places import is_coordinate

FIELD_LIMIT = 2**24  # characters of a CSV field
NO_NAME = ("", "none", "null", "nan", "unknown", "n/a", "not known", "not visible", "unclear", "undetermined")
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
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table: {error}") from error


def first_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The value of the first of these columns that the row has, as text.

    Raises:
        ValueError: it has none of them.
    """
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        raise ValueError(f"{where}: no value in {' or '.join(names)}; its columns are {', '.join(row)}"[:400])
    return str(value)


def name_of(value: Any) -> str | None:
    """A name in an answer, stripped; None for what stands for no name."""
    name = value.strip(" \t\n*_`\"'.()[]") if isinstance(value, str) else ""
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


class Pictures:
    """Picture files under a folder, found by the name in a row, with or without folders and suffix."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"image folder {root} does not exist")
        self.root = root.resolve()
        self._by_name: dict[str, Path] | None = None

    def find(self, name: str, where: str) -> Path:
        """The path of a picture, which is under the root.

        Raises:
            ValueError: there is none, or the name leads out of the root.
        """
        for suffix in SUFFIXES:
            path = (self.root / f"{name}{suffix}").resolve()
            if not path.is_relative_to(self.root):
                raise ValueError(f"{where}: image {name!r:.120} leads out of {self.root}")
            if path.is_file():
                return path
        if self._by_name is None:  # such as test/00/ID.jpg of OSV-5M: listed once
            self._by_name = {}
            for path in sorted(self.root.rglob("*")):
                if path.suffix.lower() in SUFFIXES[1:] and path.resolve().is_relative_to(self.root):
                    self._by_name.setdefault(path.name, path)
                    self._by_name.setdefault(path.stem, path)
        found = self._by_name.get(Path(name).name)
        if found is None:
            raise ValueError(f"{where}: there is no image {name!r:.120} under {self.root}")
        return found
