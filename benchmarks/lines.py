"""The lines that a stage writes and `gpu.py` reads; imports only the standard library."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

LOST = 70  # exit code of a run whose GPU has become unusable; pytest's own end at 5


def begun(lines: list[dict]) -> set[str]:
    """Tests that a run has begun."""
    return {line["begun"] for line in lines if "begun" in line}


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file; the last one may have been cut off, and the file may be missing."""
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


def stage_options(doc: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a stage that is a module: `record` and `device`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("record", type=Path, help="append JSON lines to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(argv)
