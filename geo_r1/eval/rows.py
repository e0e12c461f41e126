"""Read a benchmark's table, CSV or parquet, with any usual column names, and find its images."""

from __future__ import annotations

import argparse
import ast
import csv
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from geo_r1.data.rows import read_rows
from geo_r1.data.sample import Sample
from geo_r1.errors import UserError, one_line
from geo_r1.places import is_coordinate

FIELD_LIMIT = 2**24  # characters of a CSV field
NO_NAME = ("", "none", "null", "nan", "unknown", "n/a", "not known", "not visible", "unclear", "undetermined")
LONGEST_PATH = 1000  # characters
SUFFIXES = ("", ".jpg", ".png", ".jpeg", ".webp")

# Help of --images.
RELATIVE = "image paths are relative to this folder, not to the file"
SEARCHED = "folder of the images; subfolders are searched"


def add_data(parser: argparse.ArgumentParser, data: str, images: str, **options: Any) -> None:
    """Add --data and --images with their help; `options` go to --images."""
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--images", type=Path, help=images, **options)


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's location, for errors, and its values by lower-case column name; empty ones are None.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    if path.suffix == ".parquet":
        for number, row in read_rows(path):
            yield f"{path}, row {number}", {str(k).strip().lower(): v for k, v in row.items()}
        return
    if path.suffix != ".csv":
        raise UserError(f"{path}: expected .csv or .parquet")
    before = csv.field_size_limit(FIELD_LIMIT)  # of the whole process
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(csv.DictReader(file, restkey="", strict=True), 1):
                row = {k.strip().lower(): (v or "").strip() or None for k, v in line.items() if k}
                yield f"{path}, row {number}", row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} is not a table: {one_line(error)}") from error
    finally:
        csv.field_size_limit(before)


def first_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The value of the first of these columns that the row has, as text.

    Raises:
        UserError: it has none of them.
    """
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        raise UserError(f"{where}: no value in {' or '.join(names)}; its columns are {', '.join(row)}"[:400])
    return str(value)


def texts_of(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str | None]:
    """Some columns of a row as text; None without a value."""
    return {name: None if row.get(name) is None else str(row[name]) for name in names}


def literal(text: str) -> Any:
    """The value of a Python literal, such as a printed list; None for any other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of odd numbers and escapes
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def name_of(value: Any) -> str | None:
    """A name in an answer, stripped; None for words such as "unknown"."""
    name = value.strip(" \t\n*_`\"'.,;:(){}[]/|-") if isinstance(value, str) else ""
    return None if name.lower() in NO_NAME else name


def coordinates_of(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Latitude and longitude in degrees.

    Raises:
        UserError: they are missing, not numbers, or not on the globe.
    """
    found = [first_of(row, names, where) for names in (("lat", "latitude"), ("lon", "lng", "longitude"))]
    try:
        latitude, longitude = map(float, found)
    except ValueError:
        raise UserError(f"{where}: coordinates must be numbers, got {found[0]!r} and {found[1]!r}") from None
    if not is_coordinate(latitude, longitude):
        raise UserError(
            f"{where}: latitude {latitude} and longitude {longitude} are not on the globe (within 90 and 180)"
        )
    return latitude, longitude


def place_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """The true place of a row: latitude, longitude, and these columns as text."""
    latitude, longitude = coordinates_of(row, where)
    return {"latitude": latitude, "longitude": longitude, **texts_of(row, names)}


class Images:
    """Image files under a folder, found by the name in a row, with or without suffix.

    A name without a folder is searched for in subfolders, too.

    Args:
        options: --images names the folder. With --predictions the answers are given, and no images are
            needed.

    Raises:
        UserError: the folder is not given, or does not exist.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.root: Path | None = None
        if options.predictions is None:
            if options.images is None:
                raise UserError("--images must name the folder of the images")
            if not options.images.is_dir():
                raise UserError(f"image folder {options.images} does not exist")
            self.root = Path(os.path.realpath(options.images))

    def sample(self, name: str, text: str, file_name: str, where: str) -> Sample:
        """A question about one photograph, without it if no images are needed. Raises like `find`."""
        images = () if self.root is None else (self.find(file_name, where),)
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        return Sample(name, ({"role": "user", "content": content},), images)

    def find(self, name: str, where: str) -> Path:
        """The path of an image under the folder.

        Raises:
            UserError: there is none, there are several, or the name leads out of the folder.
        """
        assert self.root is not None
        if len(name) > LONGEST_PATH:
            raise UserError(f"{where}: image {name!r:.80} has a name that no file can have")
        for suffix in SUFFIXES:
            path = Path(os.path.realpath(self.root / f"{name}{suffix}"))
            if not path.is_relative_to(self.root):
                raise UserError(f"{where}: image {name!r:.120} leads out of {self.root}")
            if path.is_file():
                return path
        found = [] if "/" in name else self._by_name.get(name, [])
        if len(found) > 1:
            raise UserError(f"{where}: image {name!r:.80} is both {found[0]} and {found[1]}")
        if not found:
            raise UserError(f"{where}: there is no image {name!r:.120} under {self.root}")
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """Images in subfolders, such as test/00/ID.jpg of OSV-5M, by name with and without suffix."""
        found: dict[str, list[Path]] = {}
        for folder, _, names in os.walk(self.root or ""):
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES[1:] and not path.is_symlink():
                    for key in (name, path.stem):
                        found.setdefault(key, []).append(path)
        return found
