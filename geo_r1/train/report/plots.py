"""The curves of a run: which plots exist, what each shows, how each looks.

Drawn with matplotlib's figure objects, never pyplot: no display, no state shared with the caller.
"""

import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from geo_r1.train.report.metrics import Metrics

PHASE_ORDER = ("sync", "rollout", "reward", "reference", "update")
PALETTE = ("#1f5fa8", "#d5702a", "#2c8f6b", "#b04a86", "#8a6d1f", "#4fa3d1", "#7a5fc0", "#666c75")
SIZE = (4.3, 2.8)  # inches; at a third of the page its letters are 10 pixels tall
MANY_POINTS = 400  # above it raw dots are drawn as one bitmap inside the SVG

Curve = dict[int, float]  # step -> value


def draw_plots(metrics: Metrics, *, chance: float | None = None) -> dict[str, Figure]:
    """Draw each plot that has data: name (also that of its PNG) -> figure, in the order of the page.

    `chance`, a fraction, is the accuracy of guessing, drawn as a dashed line.
    """
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
        "loss": _draw_lines("Loss", "nats a token", of_stages(tuning, "loss")),
        "time": _draw_stack("Time of a GRPO step", "seconds", of_grpo(by_phase)),
        "throughput": _draw_lines("Throughput", "tokens / s", of_stages(metrics, "tokens_per_second")),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _phase_rank(phase: str) -> int:
    return PHASE_ORDER.index(phase) if phase in PHASE_ORDER else len(PHASE_ORDER)


def _curve(steps: dict[int, dict[str, float]], key: str) -> Curve:
    return {step: steps[step][key] for step in sorted(steps) if key in steps[step]}


def _draw_lines(
    title: str, unit: str, curves: dict[str, Curve], scale: float = 1, chance: float | None = None
) -> Figure | None:
    """Raw dots under a moving average, a colour a curve."""
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, curve) in enumerate(curves.items()):
        color, x, y = PALETTE[i % len(PALETTE)], np.array(list(curve)), scale * np.array(list(curve.values()))
        rasterized = len(x) > MANY_POINTS
        axes.plot(x, y, ".", color=color, alpha=0.35, markersize=4, markeredgewidth=0, rasterized=rasterized)
        axes.plot(x, _smooth(y), color=color, linewidth=1.7, label=name, marker="o" if len(x) == 1 else None)
    if chance is not None:
        axes.axhline(scale * chance, color="#8a9099", linewidth=1, linestyle=(0, (4, 3)), label="chance")
    _dress(figure, title, unit)
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


def _dress(figure: Figure, title: str, unit: str) -> None:
    axes, ink, labels = figure.axes[0], "#555b66", figure.axes[0].get_legend_handles_labels()[1]
    if labels:
        columns = max(1, 52 // (4 + max(len(label) for label in labels)))  # about 52 letters fit in a line
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8.5,
                    labelcolor=ink, handlelength=1.1, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    figure.suptitle(title, x=0.015, ha="left", fontsize=11, fontweight="bold", color="#20242b")
    axes.set_xlabel("step", fontsize=8.5, color=ink)
    axes.set_ylabel(unit, fontsize=8.5, color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8.5, labelcolor=ink, color="#c9cdd4", length=3)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd4")


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the run, at most 25 points, narrower at the ends."""
    window = np.ones(min(25, max(1, len(y) // 10)) | 1)
    half = len(window) // 2
    inside = slice(half, half + len(y))
    return np.convolve(y, window)[inside] / np.convolve(np.ones_like(y), window)[inside]
