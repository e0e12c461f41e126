"""Read users' CSV and parquet tables row by row, and count the rows that were left out."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from geo_r1.data.journal import MAX_LINE
from geo_r1.data.parquet import read_parquet
from geo_r1.data.paths import naming
from geo_r1.errors import UserError

NAMED = 5  # rows named per reason


@dataclass
class Drops:
    """Rows that were left out: counts by reason, and the names of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= NAMED:
            self.first.setdefault(reason, []).append(name)

    def report(self) -> dict[str, dict[str, Any]]:
        return {reason: {"count": n, "first": self.first[reason]} for reason, n in self.counts.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{n} x {reason}, first {self.first[reason][0]}" for reason, n in self.counts.items()
        )


def table_rows(
    path: Path, needed: Sequence[str], more: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields each row's number (in .csv its line) and its columns by name, from .csv or .parquet.

    Args:
        needed: columns that the header must have.
        more: columns that it may have; no others are read from parquet.

    Returns:
        The columns; None for a row that is longer or shorter than the header.

    Raises:
        UserError: the file is missing, of another type, cannot be read, or lacks a column; names it.
    """
    if path.suffix == ".csv":
        rows = csv_rows(path)
        header = [name.strip() for name in next(rows, (0, []))[1]]
        _check_header(path, header, needed)
        for number, row in rows:
            yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else None
    elif path.suffix == ".parquet":

        def wanted(names: list[str]) -> list[str]:
            _check_header(path, names, needed)
            return [name for name in (*needed, *more) if name in names]

        yield from enumerate(read_parquet(path, wanted), 1)
    else:
        raise UserError(f"{path}: expected .csv or .parquet")


def _check_header(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    if not set(needed) <= set(names) or len(set(names)) != len(names):
        found = ", ".join(names) or "nothing"
        raise UserError(f"{path}: the header must have {', '.join(needed)}, each once; it has {found:.200}")


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with their line numbers, from 1; blank lines are skipped.

    Raises:
        UserError: as in `lines_of`; or a field is longer than the csv module allows.
    """
    rows = csv.reader(line for _, line in lines_of(path))
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, row {rows.line_num}: {error}") from error


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; bytes that are not UTF-8 become U+FFFD.

    Raises:
        UserError: the file cannot be read, or a line is longer than `MAX_LINE`; names file and line.
    """
    with (
        naming(path, "read"),
        path.open(encoding="utf-8-sig", errors="replace", newline="") as file,
    ):
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), ""), 1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, row {number}: longer than {MAX_LINE >> 20} MiB")
            yield number, line
