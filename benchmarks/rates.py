"""What a training step's record says beside its time: rates, memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.phases import PHASES

STEP, SCALING = "training step", "training step, scaling"
HEADER = ("step", "by", "tokens/s", "completions/s", "MFU", "peak MiB", *PHASES)


def rate_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells under HEADER, one row a way that was timed.

    Args:
        rows: measurements as a record holds them, of any ops.
    """
    found = []
    for row in rows:
        facts = row.get("facts", {})
        if row["op"] != STEP or "ms" not in row or not facts.keys() >= {"completions", *PHASES}:
            continue
        seconds = row["ms"] / 1e3
        found.append(
            [
                row["size"],
                row["provider"],
                f"{facts['tokens'] / seconds:,.0f}",
                f"{facts['completions'] / seconds:.3g}",
                f"{row['share']:.0%}",
                f"{row['peak_mib']:,.0f}",
                *(f"{facts[phase]:.0%}" for phase in PHASES),
            ]
        )
    return found
