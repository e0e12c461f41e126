"""The curves of a run: which plots exist, what each shows, how each looks.

Drawn with matplotlib's figure objects, never pyplot: no display, no state shared with the caller.
"""

import io
import re

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from geo_r1.files import data_uri
from geo_r1.train.report.metrics import Metrics

PHASE_ORDER = ("sync", "rollout", "reward", "reference", "update")
# On a light and on a dark page.
PALETTE_OF = {
    "#1f5fa8": "#6fa8ea", "#d5702a": "#f0985a", "#2c8f6b": "#52c99c", "#b04a86": "#dd82b7",
    "#8a6d1f": "#cdb05c", "#4fa3d1": "#8fd0f2", "#7a5fc0": "#ab94ee", "#666c75": "#a3a9b3",
}  # fmt: skip
INK, TITLE, FRAME, GRID, CHANCE = "#555b66", "#20242b", "#c9cdd4", "#eceef1", "#8a9099"
DARK = PALETTE_OF | {INK: "#a4abb6", TITLE: "#e6e8eb", FRAME: "#4a505a", GRID: "#2f343c", CHANCE: "#8b929c"}
PALETTE = tuple(PALETTE_OF)
SIZE = (4.3, 2.8)  # inches; at a third of the page its letters are 10 pixels tall
FAR_APART = 5.0  # curves whose peaks differ by more share a logarithmic axis
MANY_POINTS = 400  # above it raw dots are drawn as one bitmap inside the SVG

Curve = dict[int, float]  # step -> value


def draw_plots(metrics: Metrics, *, chance: float | None = None) -> dict[str, Figure]:
    """Draw each plot that has data: name (also that of its PNG) -> figure, in the order of the page.

    `chance`, a fraction, is the accuracy of guessing, drawn as a dashed line.
    """
    with rc_context({"text.parse_math": False}):  # a reward's name may have a dollar
        return _draw_plots(metrics, chance)


def _draw_plots(metrics: Metrics, chance: float | None) -> dict[str, Figure]:
    grpo = metrics.get("grpo", {})
    keys = sorted({key for values in grpo.values() for key in values})
    rewards = {key.split("/")[1]: key for key in keys if re.fullmatch(r"rewards/[^/]+/mean", key)}
    accuracy = {name: key for name, key in rewards.items() if "accuracy" in name}
    phases = [key.removeprefix("time/") for key in keys if key.startswith("time/") and key != "time/step"]
    by_phase = {phase: f"time/{phase}" for phase in sorted(phases, key=_phase_rank)}
    mismatch = "sampling/logp_difference/mean"
    tuning = {stage: steps for stage, steps in metrics.items() if stage != "grpo"}

    def of_grpo(names: dict[str, str]) -> dict[str, Curve]:
        return {name: _curve(grpo, key) for name, key in names.items()}

    def of_stages(stages: Metrics, key: str) -> dict[str, Curve]:
        return {stage: _curve(steps, key) for stage, steps in stages.items()}

    figures = {
        "reward": _draw_lines("Reward", "mean", of_grpo({"total": "reward", **rewards})),
        "accuracy": _draw_lines("Accuracy of sampled completions", "%", of_grpo(accuracy), 100, chance),
        "length": _draw_lines("Completion length", "tokens", of_grpo({"": "completions/mean_length"})),
        "kl": _draw_lines("KL to the reference", "nats a token", of_grpo({"": "kl"})),
        "entropy": _draw_lines("Entropy", "nats a token", of_grpo({"": "entropy"})),
        "mismatch": _draw_lines("Rollout engine against trainer", "nats a token", of_grpo({"": mismatch})),
        "no_signal": _draw_lines("Groups of equal rewards", "%", of_grpo({"": "frac_reward_zero_std"}), 100),
        "held_out": _draw_lines(
            "Accuracy on held-out samples", "%", of_stages(metrics, "eval/accuracy"), 100, chance
        ),
        "loss": _draw_lines("Loss", "nats a token", of_stages(tuning, "loss")),
        "learning_rate": _draw_lines("Learning rate", "", of_stages(metrics, "learning_rate"), small=True),
        "grad_norm": _draw_lines("Gradient norm, before clipping", "", of_stages(metrics, "grad_norm")),
        "time": _draw_stack("Time of a GRPO step", "seconds", of_grpo(by_phase)),
        "throughput": _draw_lines("Throughput", "tokens / s", of_stages(metrics, "tokens_per_second")),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _phase_rank(phase: str) -> int:
    return PHASE_ORDER.index(phase) if phase in PHASE_ORDER else len(PHASE_ORDER)


def _curve(steps: dict[int, dict[str, float]], key: str) -> Curve:
    return {step: steps[step][key] for step in sorted(steps) if key in steps[step]}


def _draw_lines(
    title: str,
    unit: str,
    curves: dict[str, Curve],
    scale: float = 1,
    chance: float | None = None,
    small: bool = False,
) -> Figure | None:
    """Raw dots under a moving average, a colour a curve.

    Args:
        small: values far below 1, as 1e-6; if the curves' peaks are far apart, on a logarithmic axis, which
            leaves out points at 0.
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    highest = [max(curve.values()) for curve in curves.values()]
    log = small and min(highest) > 0 and max(highest) > FAR_APART * min(highest)
    if log:
        curves = {name: {x: y for x, y in curve.items() if y > 0} for name, curve in curves.items()}
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, curve) in enumerate(curves.items()):
        color, x, y = PALETTE[i % len(PALETTE)], np.array(list(curve)), scale * np.array(list(curve.values()))
        rasterized = len(x) > MANY_POINTS
        axes.plot(x, y, ".", color=color, alpha=0.35, markersize=4, markeredgewidth=0, rasterized=rasterized)
        axes.plot(x, _smooth(y), color=color, linewidth=1.7, label=name, marker="o" if len(x) == 1 else None)
    if chance is not None:
        axes.axhline(scale * chance, color=CHANCE, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    _dress(figure, title, unit, small, log)
    return figure


def _draw_stack(title: str, unit: str, curves: dict[str, Curve]) -> Figure | None:
    """Moving averages piled up; a step that lacks a value counts as zero there."""
    steps = sorted({step for curve in curves.values() for step in curve})
    if len(steps) < 2:
        return None  # an area needs two ends
    figure = Figure(figsize=SIZE, layout="constrained")
    heights = [_smooth(np.array([curve.get(step, 0.0) for step in steps])) for curve in curves.values()]
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(curves))]
    figure.add_subplot().stackplot(
        steps, *heights, labels=list(curves), colors=colors, alpha=0.8, linewidth=0
    )
    _dress(figure, title, unit)
    return figure


def _dress(figure: Figure, title: str, unit: str, small: bool = False, log: bool = False) -> None:
    axes, labels = figure.axes[0], figure.axes[0].get_legend_handles_labels()[1]
    if labels:
        columns = max(1, 52 // (4 + max(len(label) for label in labels)))  # about 52 letters fit in a line
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8.5,
                    labelcolor=INK, handlelength=1.1, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    figure.suptitle(title, x=0.015, ha="left", fontsize=11, fontweight="bold", color=TITLE)
    axes.set_xlabel("step", fontsize=8.5, color=INK)
    axes.set_ylabel(unit, fontsize=8.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):  # no power of ten above the axis
        plain = ScalarFormatter(useOffset=False)
        plain.set_powerlimits((-5, 12))
        axis.set_major_formatter(plain)
    if small or max(map(abs, axes.get_ylim())) < 1e-3:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.tick_params(labelsize=8.5, labelcolor=INK, color=FRAME, length=3)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)


def number(value: float) -> str:
    """A tick's or a bar's number: 1,500 and 1e-6, not 1.5e+03 and 1e-06."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("e-0", "e-")


def svg_text(figure: Figure) -> str:
    """A plot as SVG that is light or dark as its reader's pages are, and the same for the same figure."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "geo_r1"}):
        figure.savefig(file, format="svg", dpi=160, transparent=True, metadata={"Date": None})
    svg = file.getvalue().decode("utf-8")
    for index, light in enumerate(DARK):
        svg = svg.replace(light, f"var(--c{index})")
    light_style, dark_style = (
        "".join(f"--c{index}:{color};" for index, color in enumerate(colors))
        for colors in (DARK, DARK.values())
    )
    style = f"<style>:root{{{light_style}}}@media(prefers-color-scheme:dark){{:root{{{dark_style}}}}}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


def svg_of(figure: Figure) -> str:
    """The address of `svg_text`, for an image of a page."""
    return data_uri("image/svg+xml", svg_text(figure).encode("utf-8"))


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the run, at most 25 points, narrower at the ends."""
    window = np.ones(min(25, max(1, len(y) // 10)) | 1)
    half = len(window) // 2
    inside = slice(half, half + len(y))
    return np.convolve(y, window)[inside] / np.convolve(np.ones_like(y), window)[inside]
