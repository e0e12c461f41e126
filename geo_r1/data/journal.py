"""JSON lines that survive a kill: each record is appended in one piece, and its length is limited."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from geo_r1.data.paths import naming
from geo_r1.errors import UserError, one_line

MAX_LINE = 16 * 2**20  # bytes: enough for a record with ten images, too little to exhaust the memory


def read_lines(
    path: Path, refuse: Callable[[int, UserError], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields each line's number, from 1, and its JSON value; blank lines are skipped.

    Args:
        refuse: called with the number of a bad line and the error, and the line is left out; None raises it.

    Raises:
        UserError: the file is missing, or a line is longer than `MAX_LINE` or not JSON; names file and line.
    """
    with naming(path, "read"), path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
            try:
                if len(line) > MAX_LINE:
                    while refuse is not None and line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                    raise UserError(f"longer than {MAX_LINE >> 20} MiB; one record a line is expected")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                value = json.loads(line.rstrip()) if line.strip() else None
            except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
                reason = error if isinstance(error, UserError) else f"broken JSON: {one_line(error)}"
                bad = UserError(f"{path}, line {number}: {reason}")
                if refuse is None:
                    raise bad from error
                refuse(number, bad)
                continue
            if line.strip():
                yield number, value


class Journal:
    """Records by id, appended as they come; after a kill, the next start finds them again.

    A last line that a kill cut off is dropped. If two lines have the same id, the first counts. One process
    at a time may use the file (it holds a lock), and one thread at a time may call `append`.

    Args:
        path: JSONL; each record has a string "id".

    Attributes:
        records: by id, in the order of arrival.

    Raises:
        UserError: a line before the last is broken or has no id; names it. Or another process has the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path} is being written by another process") from None
        if os.fstat(self._file.fileno()).st_size:
            self._drop_cut_line()
            for number, record in read_lines(self.path):
                if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                    raise UserError(f"{self.path}, line {number}: expected a record with an id")
                self.records.setdefault(record["id"], record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record; once this returns, the record survives the end of this process.

        Raises:
            ValueError: the id has already been written.
            UserError: the record is too long for a line, or the disk is full.
        """
        key = record["id"]
        if key in self.records:
            raise ValueError(f"{self.path}: {key!r} is there already")
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise UserError(
                f"{self.path}: the record {key!r:.80} takes {len(line)} bytes, too many for a line"
            )
        with naming(self.path):
            self._file.write(line)
            self._file.flush()
        self.records[key] = dict(record)

    def close(self) -> None:
        with naming(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_cut_line(self) -> None:
        with self.path.open("rb+") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end:  # search backwards for the last line end, block by block
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                end = start + found + 1
                if found >= 0:
                    break
            if end < size:
                file.truncate(end)
