"""A map of true places and predicted ones, on the dots of the gazetteer's cities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from geo_r1.eval.benchmark import is_finite
from geo_r1.places import open_gazetteer

LINES = 3000  # at most: more hide the map
RIGHT, WRONG, LAND = "#2c8f6b", "#c0392b", "#dfe3e8"
NEAREST, FARTHEST = 1.0, 20000.0  # km: the ends of the colours


def draw_map(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the records that have a place; None if there are none.

    With distances, each place is coloured by its error and joined to the predicted place; else it is green
    where the answer is right and red where it is wrong.
    """
    placed = [r for r in records if is_finite(r.get("latitude")) and is_finite(r.get("longitude"))]
    located = [r for r in placed if is_finite(r.get("distance_km"))]
    if not placed:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    cities = open_gazetteer().all_cities
    land = np.array([(city.longitude, city.latitude) for city in cities])
    axes.plot(land[:, 0], land[:, 1], ".", color=LAND, markersize=1.6, markeredgewidth=0, zorder=0)
    if located:
        _errors(figure, axes, located)
        missing = [r for r in placed if "distance_km" in r and r["distance_km"] is None]
        _dots(axes, missing, "no answer", color=WRONG, marker="x", s=10, linewidth=0.8)
    else:
        for right, color, label in ((True, RIGHT, "right"), (False, WRONG, "wrong")):
            chosen = [r for r in placed if bool(r.get("correct")) is right]
            _dots(axes, chosen, label, color=color, marker="o", s=9, linewidth=0, alpha=0.7)
    axes.set_xlim(-180, 180)
    axes.set_ylim(
        min(-60, *(r["latitude"] - 2 for r in placed)), max(82, *(r["latitude"] + 2 for r in placed))
    )
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#c9cdd4")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", frameon=False, fontsize=8.5)
    return figure


def _dots(axes: Any, records: Sequence[Mapping[str, Any]], label: str, **style: Any) -> None:
    if records:
        x, y = [r["longitude"] for r in records], [r["latitude"] for r in records]
        axes.scatter(x, y, label=f"{label} ({len(records)})", **style)


def _errors(figure: Figure, axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    norm = LogNorm(NEAREST, FARTHEST)
    km = np.clip([r["distance_km"] for r in records], NEAREST, FARTHEST)
    segments, of_segment = [], []
    for record, distance in list(zip(records, km, strict=True))[:LINES]:
        x, y = record["longitude"], record["latitude"]
        to_x, to_y = record["predicted_longitude"], record["predicted_latitude"]
        turn = 360 * round((x - to_x) / 360)
        pieces = [((x, y), (to_x + turn, to_y))]
        if turn:  # the short way crosses the date line: two halves, drawn past the map's edges
            pieces.append(((x - turn, y), (to_x, to_y)))
        segments += pieces
        of_segment += [distance] * len(pieces)
    lines = LineCollection(segments, cmap="viridis_r", norm=norm, linewidths=0.5, alpha=0.45)
    lines.set_array(np.array(of_segment))
    axes.add_collection(lines)
    x, y = [r["longitude"] for r in records], [r["latitude"] for r in records]
    dots = axes.scatter(x, y, c=km, cmap="viridis_r", norm=norm, s=8, linewidth=0)
    bar = figure.colorbar(dots, ax=axes, shrink=0.7, pad=0.01)
    bar.set_label("from the true place to the answer, km", fontsize=8.5)
    bar.ax.tick_params(labelsize=8.5)
