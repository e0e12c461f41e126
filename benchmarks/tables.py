"""Tables of measurements in Markdown. Also printed where a GPU is, so it imports no more than torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import PHASES, STEP, Row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def cells(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return [cells(header), cells(["---"] * len(header)), *map(cells, rows)]


def rate_table(rows: Sequence[Row]) -> list[str]:
    """Rates, memory and shares of time, one line for each timed way to do a training step."""
    found = []
    for row in rows:
        facts: dict[str, Any] = row.get("facts", {})
        if row["op"] != STEP or "ms" not in row or not facts.keys() >= {"completions", *PHASES}:
            continue
        seconds = row["ms"] / 1e3
        rates = f"{facts['tokens'] / seconds:,.0f}", f"{facts['completions'] / seconds:.3g}"
        shares = (f"{facts[phase]:.0%}" for phase in PHASES)
        mfu, peak = f"{row['share']:.0%}", f"{row['peak_mib']:,.0f}"
        found.append((row["size"], row["provider"], *rates, mfu, peak, *shares))
    header = ("step", "by", "tokens/s", "completions/s", "MFU", "peak MiB", *PHASES)
    return table(header, found) if found else []
