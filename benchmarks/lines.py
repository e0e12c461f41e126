"""The lines that a stage writes and `gpu.py` reads; imports only the standard library."""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

LOST = 70  # exit code of a run whose GPU has become unusable; pytest's own end at 5
TRIES = 2  # of a test that a kill interrupts, lest one that hangs be tried for ever


def unfinished(lines: list[dict]) -> set[str]:
    """Tests that began and did not end."""
    return {line["begun"] for line in lines if "begun" in line} - {line.get("test") for line in lines}


def settled(lines: list[dict]) -> set[str]:
    """Tests that are not tried again: they ended, or no try ended."""
    tries = Counter(line["begun"] for line in lines if "begun" in line)
    given_up = {test for test in unfinished(lines) if tries[test] >= TRIES}
    return given_up | {line["test"] for line in lines if "test" in line}


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


def read_stage(path: Path) -> list[dict]:
    """The lines of all processes of a stage, `<stage>.<process>.jsonl`, given the file of one."""
    files = path.parent.glob(f"{path.name.split('.')[0]}.*.jsonl")
    return [line for file in sorted(files) for line in read_lines(file)]


def write_line(path: Path, **line: object) -> None:
    """Append a line, also after one that a kill has cut off."""
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(line).encode() + b"\n")


def die_with_parent() -> None:
    """End this process when the one that started it ends, even by SIGKILL: it would go on using the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def stage_options(doc: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a stage that is a module: `record` and `device`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("record", type=Path, help="append JSON lines to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(argv)
