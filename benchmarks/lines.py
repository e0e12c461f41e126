"""The lines that a part writes and `gpu.py` reads; imports nothing that has to be installed."""

from __future__ import annotations

import json
from pathlib import Path

LOST = 70  # exit code of a run whose GPU does nothing more; pytest's own end at 5


def begun(lines: list[dict]) -> set[str]:
    """Tests that a run has begun, without those that it had to leave for another."""
    found: set[str] = set()
    for line in lines:
        found |= {line["begun"]} if "begun" in line else set()
        found -= {line["again"]} if "again" in line else set()
    return found


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file; the last one may have been cut off, and the file may not be there."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def write_line(path: Path, **line: object) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
