"""Files of samples: JSONL, JSON and parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from geo_r1.data.journal import read_lines
from geo_r1.data.parquet import read_parquet
from geo_r1.data.sample import Sample, sample_of
from geo_r1.errors import UserError, one_line

MAX_JSON = 2 * 2**30  # bytes of a .json file, which is parsed in one piece
Check = Callable[[Sample], object]  # raises UserError


def read_samples(
    path: Path | str,
    image_root: Path | str | None = None,
    *,
    check: Check | None = None,
    bad: dict[str, str] | None = None,
) -> list[Sample]:
    """Read the samples in a JSONL or parquet file, or in a .json file with one list of them.

    Columns: `prompt` (text with `<image>` markers, or chat messages), `images` (a list of paths, relative to
    `image_root` or else to the file; or of {"path", "bytes"} as Hugging Face datasets store them; or of data
    URIs), `response`, `answer`, `id`; or what `own_columns` reads in their place. Other columns become
    metadata; null and NaN count as absent. If a prompt marks no image, all images go before its first user
    text.

    Args:
        image_root: the folder of the image files; one that leads out of it cannot be opened.
        check: called with each sample; raises UserError if it does not serve.
        bad: if given, gets the reason of each row that is no sample, by file and row; they are left out.

    Raises:
        UserError: the file is missing, empty or of another type; or a row is malformed, and `bad` is not
            given. Names file and row (the line in JSONL).
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    samples: dict[str, tuple[int, Sample]] = {}

    def refuse(number: int, error: UserError) -> None:
        if bad is None:
            raise error
        where = f"{path}, row {number}"
        reason = str(error).removeprefix(f"{where}: ").removeprefix(f"{path}, line {number}: ")
        bad[where] = reason.removeprefix(f"{path}: ")

    for number, row in read_rows(path, refuse):
        try:
            sample = sample_of(row, f"{path}, row {number}", root, fenced=image_root is not None)
            if sample.id in samples:
                raise UserError(
                    f"{path}: rows {samples[sample.id][0]} and {number} share the id {sample.id!r}"
                )
            if check is not None:
                check(sample)
        except UserError as error:
            refuse(number, error)
        else:
            samples[sample.id] = number, sample
    if not samples and not bad:
        raise UserError(f"{path} holds no samples")
    return [sample for _, sample in samples.values()]


def read_rows(
    path: Path, refuse: Callable[[int, UserError], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a JSONL, JSON or parquet file, numbered from 1; in JSONL, row numbers are lines.

    The `datasets` package is not used: it writes a cache and wants one type per column.

    Args:
        refuse: called with the number of a line that is not JSON and with the error; None raises it.

    Raises:
        UserError: the file is missing, of another type, or cannot be read; names it.
    """
    if not os.path.isfile(path):  # unlike `Path.is_file`, also for names that no file can have
        raise UserError(f"data file {path} {'is not a file' if os.path.exists(path) else 'does not exist'}")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise UserError(f"data file {path}: expected .jsonl, .json or .parquet")
    size = path.stat().st_size
    if size == 0:
        return
    if path.suffix == ".jsonl":
        yield from read_lines(path, refuse)
    elif path.suffix == ".parquet":
        yield from enumerate(read_parquet(path), 1)
    else:
        try:
            if size > MAX_JSON:
                raise UserError(f"it takes more than {MAX_JSON >> 30} GiB; .jsonl has no limit")
            rows = json.loads(path.read_text("utf-8-sig"))
            if not isinstance(rows, list):
                raise UserError(f"it is a {type(rows).__name__}, not a list of samples")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"data file {path} cannot be read: {one_line(error)}") from error
        yield from enumerate(rows, 1)
