"""The plots of docs/results.md, from the rows of a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import SCALING, Row

AXES = {"completions": "completions", "images": "images", "length": "tokens of a completion"}
COLOURS = {"ours": "tab:blue", "peer": "tab:orange", "floor": "tab:gray"}
Curves = dict[str, list[tuple[float, float]]]  # (x, milliseconds) by provider


def figure_of(rows: int, columns: int, height: float):
    """A figure drawn without a screen, and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(13, height), squeeze=False)


def save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of milliseconds, one panel per case: ours, peers, and the floor."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "ms" in row and row["op"] != SCALING:
            cases.setdefault((row["op"], row["size"]), []).append(row)
    if not cases:
        return
    num_rows = -(-len(cases) // 2)
    figure, grid = figure_of(num_rows, 2, 0.6 + 2.1 * num_rows)
    panels = list(grid.flat)
    for panel, ((op, size), timed) in zip(panels, cases.items(), strict=False):
        timed = sorted(timed, key=lambda row: -row["ms"])
        colours = [COLOURS[row["kind"]] for row in timed]
        bars = panel.barh([row["provider"] for row in timed], [row["ms"] for row in timed], color=colours)
        panel.bar_label(bars, [f" {row['ms']:.3g}" for row in timed], fontsize=8)
        panel.set_title(f"{op}: {size}", fontsize=9)
        panel.set_xlabel("ms", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
    for panel in panels[len(cases) :]:
        panel.axis("off")
    figure.suptitle(f"{title}: ours, peers, and the floor", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    save(figure, path)


def curves(rows: Sequence[Row]) -> dict[str, Curves]:
    """How the cost of a training step grows: for each axis, the points that differ only in it, in order.

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


def draw_scaling(rows: Sequence[Row], title: str, path: Path) -> None:
    """Milliseconds of a step against each number; each panel starts at 0, so lines through it are linear."""
    figure, ((*panels,),) = figure_of(1, len(AXES), 3.8)
    kinds = {row["provider"]: row["kind"] for row in rows}
    for panel, (axis, by_provider) in zip(panels, curves(rows).items(), strict=True):
        for provider, points in by_provider.items():
            x, ms = zip(*points, strict=True)
            panel.plot(x, ms, marker="o", color=COLOURS[kinds[provider]], label=provider)
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("ms a step")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}: cost of a training step", fontsize=11)
    figure.tight_layout()
    save(figure, path)
