"""A summary as a table, ours beside the published rows: on the terminal, and as Markdown.

Names come from models and data files, which may be hostile: they are escaped for Markdown and the terminal.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from geo_r1.errors import one_line
from geo_r1.eval.benchmark import Benchmark, Column

WIDE = 200  # characters of a line in a file
LONGEST_NAME = 80  # characters of a row's name


def rows_of(benchmark: Benchmark, name: str, summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Names and cells of the main table: this model, then the published ones."""
    for row_name, row in {name: summary, **benchmark.published}.items():
        yield row_name, [cell(row, column) for column in benchmark.columns]


def cell(summary: Mapping[str, Any], column: Column) -> str:
    """One figure as text; empty where the summary has none."""
    value: Any = summary
    for key in column.key.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    if column.unit == "interval":
        low, high = value
        return f"{low:.1%} to {high:.1%}"
    shown = {"share": "{:.2%}", "km": "{:.2f}", "number": "{:.1f}", "count": "{:d}"}[column.unit]
    return shown.format(value)


def markdown(benchmark: Benchmark, name: str, summary: Mapping[str, Any]) -> str:
    """All tables of a summary."""
    titles = [column.title for column in benchmark.columns]
    lines = [f"# {benchmark.name}", "", *_lines("model", titles, rows_of(benchmark, name, summary))]
    if benchmark.note:
        lines += ["", benchmark.note]
    for key in benchmark.breakdowns:
        groups = summary.get(key) or {}
        if len(groups) < 2:
            continue
        rows = ((group, [cell(row, c) for c in benchmark.columns]) for group, row in groups.items())
        lines += ["", f"## {key.replace('_', ' ')}", "", *_lines(key.removeprefix("by_"), titles, rows)]
    return "\n".join(lines) + "\n"


def show(benchmark: Benchmark, name: str, summary: Mapping[str, Any]) -> None:
    """Print the main table; at full width where there is no terminal to fit."""
    table = Table(title=benchmark.name, caption=benchmark.note or None)
    table.add_column("model", overflow="fold")
    for column in benchmark.columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row_name, cells in rows_of(benchmark, name, summary):
        table.add_row(Text(_short(row_name)), *cells)
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _lines(first: str, titles: list[str], rows: Iterator[tuple[str, list[str]]]) -> Iterator[str]:
    yield f"| {' | '.join([first, *titles])} |"
    yield f"| --- |{' ---: |' * len(titles)}"
    for name, cells in rows:
        yield f"| {' | '.join([_escaped(name), *cells])} |"


def _escaped(name: str) -> str:
    safe = html.escape(_short(name), quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]#!" else c for c in safe)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
