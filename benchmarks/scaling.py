"""How the cost of a training step grows: `docs/scaling-<device>.png` from a record.

A panel for each of three numbers of the group, with the other two held: completions, images, and the mean
length of a completion. Each panel is drawn through the records' own facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rates import SCALING

AXES = {"completions": "completions", "images": "images", "length": "tokens of a completion"}
Curves = dict[str, list[tuple[float, float]]]  # (x, milliseconds) by provider


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """For each axis the points that differ in it alone, of every provider, in order.

    Args:
        rows: measurements as a record holds them, of any ops; those without a time are left out.
    """
    timed = [row for row in rows if row["op"] == SCALING and "ms" in row]
    if not timed:
        return {}
    found = {}
    for axis in AXES:
        held = [tuple(row["facts"][name] for name in AXES if name != axis) for row in timed]
        ((most, _),) = Counter(held).most_common(1)
        by_provider: Curves = {}
        for row, others in zip(timed, held, strict=True):
            if others == most:
                by_provider.setdefault(row["provider"], []).append((row["facts"][axis], row["ms"]))
        found[axis] = {name: sorted(points) for name, points in by_provider.items()}
    return found


def draw_scaling(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Milliseconds of a step against each number; each panel starts at 0, so lines through it are linear."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 3.8))
    ours = {row["provider"] for row in rows if row["kind"] == "ours"}
    for panel, (axis, by_provider) in zip(panels, curves(rows).items(), strict=True):
        for provider, points in by_provider.items():
            colour = "tab:blue" if provider in ours else "tab:orange"
            panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=provider)
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("ms a step")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}: cost of a training step", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
