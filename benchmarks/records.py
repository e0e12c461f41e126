"""The record that the lines of all stages are merged into, and what identifies it; imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.lines import settled
from benchmarks.stages import Stage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".toml")  # of sources
Record = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def stage_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was written when the stage last ended; empty if it never did."""
    return next((line["stage"] for line in reversed(lines) if "stage" in line), {})


def read_results(lines: Sequence[dict[str, Any]], record: Record) -> dict[str, Any]:
    """Counts of tests, failures, reasons for skips; device, ceilings and measurements go to the record."""
    ended: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "device" in line:
            versions = record["device"].get("versions", {}) | line["device"]["versions"]
            record["device"] |= line["device"] | {"versions": versions}
            record["ceilings"] |= line.get("ceilings", {})
        if "test" in line:
            ended[line["test"]] = ended.get(line["test"], {}) | line
    for test in sorted(settled(lines) - ended.keys()):
        ended[test] = {"outcome": "failed", "reason": "did not end"}
    rows = [line["measurement"] for line in ended.values() if "measurement" in line]
    again = [case_of(row) for row in rows]
    record["measurements"] = [row for row in record["measurements"] if case_of(row) not in again] + rows
    record["launches"] += best_launches([line["trial"] for line in ended.values() if "trial" in line])
    counts = Counter(line["outcome"] for line in ended.values())
    skipped = Counter(line.get("reason", "") for line in ended.values() if line["outcome"] == "skipped")
    result: dict[str, Any] = {
        "tests": dict(counts),
        "skipped": dict(skipped),
        "failures": {test: line["reason"] for test, line in ended.items() if line["outcome"] == "failed"},
        "found": {test: line["found"] for test, line in ended.items() if "found" in line},
    }
    return {name: value for name, value in result.items() if value}


def best_launches(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each launch row that was tried: its time, and the options that were fastest with right results."""
    found = []
    for row in dict.fromkeys(trial["row"] for trial in trials):
        timed = [trial for trial in trials if trial["row"] == row and "ms" in trial]
        own = [trial["ms"] for trial in timed if trial["own"]]
        if own:
            best = min(timed, key=lambda trial: trial["ms"])
            tried = {
                trial["launch"]: trial.get("ms", trial.get("reason"))
                for trial in trials
                if trial["row"] == row
            }
            found.append(
                {"row": row, "ms": own[0], "best": best["launch"], "best_ms": best["ms"], "tried": tried}
            )
    return found


def case_of(row: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("op", "size", "provider"))


def digest(stage: Stage, state: Sequence[object]) -> str:
    """Of a stage's arguments, of its sources and the files that the arguments name, and of a state."""
    total = hashlib.sha256(json.dumps([stage.arguments, *state]).encode())
    words = [word for word in stage.arguments if re.fullmatch(r"[\w./-]+", word)]
    for word in (*stage.sources, *words, *(f"{word.replace('.', '/')}.py" for word in words)):
        path = ROOT / word
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.suffix in SUFFIXES and file.is_file():
                total.update(os.path.relpath(file, ROOT).encode() + file.read_bytes())
    return total.hexdigest()[:8]


def git_state() -> tuple[str, bool | None]:
    """Short name of the commit, and whether the checkout differs from it; records themselves do not count."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:  # a copy inside another repository
            return "unknown", None
        commit = git("rev-parse", "--short", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def device_slug(device: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.get("name", "unknown").lower()).strip("-")


def record_name(record: Record) -> str:
    kind = "-rehearsal" * record["rehearsal"]
    return f"{device_slug(record['device'])}{kind}-{record['commit']}{'-dirty' * bool(record['dirty'])}.json"


def summary(result: dict[str, Any]) -> str:
    counts = [f"{count} {outcome}" for outcome, count in result.get("tests", {}).items()]
    return ", ".join([result["status"], *([result["reason"]] if "reason" in result else []), *counts])
