"""JSON lines that survive a kill: a whole record is appended at a time, and no line is endless."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_LINE = 16 * 2**20  # bytes: ten pictures fit in a record, what would fill the memory does not


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields each line's number, from 1, and its JSON value; blank lines are passed over.

    Raises:
        ValueError: the file is missing, a line is longer than `MAX_LINE` or is not JSON; names file and line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    most = f"{MAX_LINE >> 20} MiB"
                    raise ValueError(
                        f"{path}, line {number}: longer than {most}; one record a line is expected"
                    )
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, _value(line, f"{path}, line {number}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _value(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:  # the latter of brackets, nested deep
        raise ValueError(f"{where}: broken JSON: {' '.join(str(error).split())}") from error


class Journal:
    """Records by id, appended as they come; what a killed process had written is there at the next start.

    A last line that was cut by a kill is dropped, with a later one of the same id the first one stands. One
    process at a time, which a lock holds; `append` may be called by any one thread.

    Args:
        path: JSONL; each record has a string "id".

    Attributes:
        records: by id, in the order in which they came.

    Raises:
        ValueError: a line other than the last is broken, or has no id; names it. Or another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        path = self.path
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is being written by another process") from None
        if os.fstat(self._file.fileno()).st_size:
            self._drop_cut_line()
            for number, record in read_lines(path):
                if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                    raise ValueError(f"{path}, line {number}: expected a record with an id")
                self.records.setdefault(record["id"], record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record; it is in the system's hands when this returns, and survives this process.

        Raises:
            ValueError: its id has been written before.
        """
        key = record["id"]
        if key in self.records:
            raise ValueError(f"{self.path}: {key!r} is there already")
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(
                f"{self.path}: the record {key!r:.80} takes {len(line)} bytes, too many for a line"
            )
        self._file.write(line)
        self._file.flush()
        self.records[key] = dict(record)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_cut_line(self) -> None:
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end:  # back to the last line's end, a block at a time
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    end = start + found + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
