"""The plots of docs/results.md and of the README, from the rows of a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from benchmarks.measure import SCALING, STEP, Row
from benchmarks.targets import best, fastest
from geo_r1.files import write_text, written_beside
from geo_r1.train.report.plots import FRAME, GRID, INK, PALETTE, TITLE, number, svg_text

AXES = {"completions": "completions", "images": "images", "length": "tokens of a completion"}
COLOURS = {"ours": PALETTE[0], "peer": PALETTE[1], "floor": PALETTE[-1]}
LEGEND = {"ours": "geo_r1", "peer": "peers", "floor": "bare products or copies: the least that is possible"}
SHOWN = {"parameters", "images", "prompt", "completions", "length", "tokens"}  # facts of a training step
HEAD = 0.55  # inches of a figure for its title and legend
ROOM = 1.25  # of the longest bar, so that its label has a place
Curves = dict[str, list[tuple[float, float]]]  # (x, milliseconds) by provider


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of milliseconds, one panel per case: ours, peers, and the floor."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "ms" in row and row["op"] != SCALING:
            cases.setdefault((row["op"], row["size"]), []).append(row)
    if not cases:
        return
    pairs = [[*cases.items()][i : i + 2] for i in range(0, len(cases), 2)]
    heights = [max(len(timed) for _, timed in pair) + 1.3 for pair in pairs]
    figure = Figure(figsize=(11, 1.0 + 0.27 * sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(pairs), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panels, pair in zip(grid, pairs, strict=True):
        for panel, ((op, size), timed) in zip(panels, pair, strict=False):
            timed = sorted(timed, key=lambda row: -row["ms"])
            bars(
                panel, [(row["provider"], row["ms"], row["kind"], f"{number(row['ms'])} ms") for row in timed]
            )
            panel.set_ylim(len(timed) - max(len(t) for _, t in pair) - 0.6, len(timed) - 0.4)
            panel.set_title(f"{op}: {size}", fontsize=9, fontweight="bold", color=TITLE, loc="left", x=-0.3)
        for panel in panels[len(pair) :]:
            panel.axis("off")
    head(figure, f"Time of every op and of the training step: {title}", LEGEND)
    save(figure, path)


def bars(panel: Axes, rows: Sequence[tuple[str, float, str, str]]) -> None:
    """Horizontal bars of (name, length, kind, label), without frame and axis: the labels say it all."""
    names, lengths, kinds, labels = zip(*rows, strict=True)
    drawn = panel.barh(range(len(rows)), lengths, color=[COLOURS[kind] for kind in kinds], height=0.72)
    panel.set_yticks(range(len(rows)), names)
    panel.bar_label(drawn, labels, padding=4, fontsize=8.5, color=INK)
    panel.set_xlim(0, ROOM * max(lengths))
    panel.set_xticks([])
    panel.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_color(FRAME)


def head(figure: Figure, title: str, names: Mapping[str, str]) -> None:
    """A title at the left, and under it what the colours mean."""
    height = figure.get_figheight()
    style = {"ha": "left", "va": "top", "fontsize": 12, "fontweight": "bold", "color": TITLE}
    figure.text(0.01, 1 - 0.08 / height, title, **style)
    patches = [Patch(color=COLOURS[kind], label=name) for kind, name in names.items()]
    where = {"loc": "upper left", "bbox_to_anchor": (0.005, 1 - 0.3 / height), "borderpad": 0}
    shape = {"handlelength": 1, "handleheight": 0.9, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles=patches, ncols=len(names), **where, **shape)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - HEAD / height))  # type: ignore[union-attr, call-arg]


def steps(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Our fastest training step and the fastest peer's, for each size that both were timed at."""
    found = []
    whole = [row for row in rows if row["op"] == STEP and row.get("facts", {}).keys() >= SHOWN]
    for size in dict.fromkeys(row["size"] for row in whole):
        case = [row for row in whole if row["size"] == size]
        ours, peer = best(case), fastest(case, "peer")
        if ours is not None and "ms" in ours and peer is not None:
            found.append((ours, peer))
    return sorted(found, key=lambda pair: pair[0]["ms"] / pair[1]["ms"])


def draw_steps(rows: Sequence[Row], where: str, path: Path) -> None:
    """How many times as fast our training step is as the fastest peer's: a pair of bars for each size.

    Args:
        where: device, threads, dtype and commit, as the chart's small print.
    """
    pairs = steps(rows)
    figure = Figure(figsize=(8.2, 1.15 + 0.62 * len(pairs)), layout="constrained")
    panel, names = figure.add_subplot(), []
    for y, (ours, peer) in enumerate(reversed(pairs)):
        times, facts = peer["ms"] / ours["ms"], ours["facts"]
        label = {"textcoords": "offset points", "va": "center"}
        for row, length, up in ((ours, times, 0.19), (peer, 1, -0.19)):
            panel.barh(y + up, length, height=0.36, color=COLOURS[row["kind"]])
            rate = f"{row['facts']['tokens'] / row['ms'] * 1e3:,.0f} tokens/s"
            after = 46 if row is ours else 6
            panel.annotate(rate, (length, y + up), (after, 0), fontsize=8.5, color=INK, **label)
        bold = {"fontsize": 10, "fontweight": "bold", "color": TITLE}
        panel.annotate(f"{times:.1f} ×", (times, y + 0.19), (6, 0), **bold, **label)
        names.append(
            f"{facts['parameters'] / 1e6:,.0f} M parameters, {facts['images']} images\n"
            f"prompt {facts['prompt']}, {facts['completions']} × {facts['length']:.0f} tokens"
        )
    panel.set_yticks(range(len(names)), names)
    panel.set_xlim(0, 1.35 * max(peer["ms"] / ours["ms"] for ours, peer in pairs))
    panel.set_xticks([])
    panel.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_color(FRAME)
    peers = ", ".join(dict.fromkeys(peer["provider"] for _, peer in pairs))
    head(figure, "Training step: how many times as fast", {"ours": "geo_r1", "peer": peers})
    figure.supxlabel(where, x=0.01, ha="left", fontsize=8, color=INK)
    write_text(path, svg_text(figure))


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
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    kinds = {row["provider"]: row["kind"] for row in rows}
    panels = figure.subplots(1, len(AXES))
    for panel, (axis, by_provider) in zip(panels, curves(rows).items(), strict=True):
        for provider, points in by_provider.items():
            x, ms = zip(*points, strict=True)
            panel.plot(x, ms, marker="o", color=COLOURS[kinds[provider]], label=provider)
        panel.set_xlabel(AXES[axis], fontsize=9, color=INK)
        panel.set_ylabel("ms a step", fontsize=9, color=INK)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: number(ms)))
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8.5, labelcolor=INK, color=FRAME)
        panel.grid(axis="y", color=GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FRAME)
    panels[0].legend(fontsize=8.5, frameon=False, labelcolor=INK)
    figure.suptitle(f"Cost of a training step: {title}", x=0.01, ha="left", fontsize=12, fontweight="bold",
                    color=TITLE)  # fmt: skip
    save(figure, path)
