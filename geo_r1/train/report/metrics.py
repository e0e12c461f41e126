"""metrics.jsonl: a line for each step of a stage, as a running or a killed process left it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geo_r1.eval.benchmark import is_finite
from geo_r1.train.recipe.run_sections import STAGES

Metrics = dict[str, dict[int, dict[str, float]]]  # stage -> step -> key -> finite value
MOST_STEPS = 2**53  # a float holds smaller integers exactly


def read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """The lines that hold a step's figures, each with its row, and the number of other lines.

    A kill tears a line, a full disk leaves zeros, and people write into the file: such lines are left out.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.is_file() else []
    rows = [(line, row) for line in lines if (row := _row(line)) is not None]
    return rows, len(lines) - len(rows)


def read_metrics(path: Path) -> tuple[Metrics, int]:
    """The finite figures by stage, in the order of training, step and key; and the number of other lines.

    If a step was logged twice (a resumed run), the last line counts. A missing file is an empty run.
    """
    metrics: Metrics = {}
    rows, num_skipped = read_lines(path)
    for _, row in rows:
        values = {key: float(value) for key, value in row.items() if key != "step" and is_finite(value)}
        metrics.setdefault(row["stage"], {})[row["step"]] = values
    return dict(sorted(metrics.items(), key=lambda item: STAGES.index(item[0]))), num_skipped


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("stage") not in list(STAGES):
        return None
    step = row.get("step")
    return row if type(step) is int and 0 < step < MOST_STEPS else None
