"""Tables as people have them, CSV or parquet: read row by row, and what was left out of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geo_r1.data.journal import MAX_LINE

NAMED = 5  # rows that are named for each reason


@dataclass
class Drops:
    """What was left out: how often for each reason, and the first few by name."""

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
    """Yields the number of each row of a .csv (its line) or .parquet and its columns by name.

    Args:
        needed: columns that the header must have.
        more: columns that it may have; others may be left out.

    Returns:
        The columns; None for a row that is longer or shorter than the header.

    Raises:
        ValueError: the file is missing, of another type, cannot be read, or lacks a column; names it.
    """
    if path.suffix == ".csv":
        rows = csv_rows(path)
        header = [name.strip() for name in next(rows, (0, []))[1]]
        _check_header(path, header, needed)
        for number, row in rows:
            yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else None
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, needed, more)
    else:
        raise ValueError(f"{path}: expected .csv or .parquet")


def _parquet_rows(
    path: Path, needed: Sequence[str], more: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            _check_header(path, names, needed)
            batches = table.iter_batches(columns=[name for name in (*needed, *more) if name in names])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise ValueError(f"{path}: {reason}") from error


def _check_header(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    if not set(needed) <= set(names) or len(set(names)) != len(names):
        found = ", ".join(names) or "nothing"
        raise ValueError(f"{path}: the header must have {', '.join(needed)}, each once; it has {found:.200}")


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with their line numbers, from 1; blank lines are passed over.

    Raises:
        ValueError: as `lines_of`; or a field is longer than the csv module allows.
    """
    rows = csv.reader(line for _, line in lines_of(path))
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, row {rows.line_num}: {error}") from error


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; what is not UTF-8 becomes U+FFFD.

    Raises:
        ValueError: the file cannot be read, or a line is longer than `MAX_LINE`; names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}, row {number}: longer than {MAX_LINE >> 20} MiB")
                yield number, line
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
