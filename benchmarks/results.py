"""From the records in benchmarks/results/ to the README's tables and the plots of docs/: `make results`.

Of each device the newest record counts. Every table and plot names its device and commit; a target without a
record is "not measured". Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import RESULTS, ROOT, write_whole
from benchmarks.rates import HEADER, SCALING, rate_rows
from benchmarks.scaling import curves, draw_scaling
from benchmarks.targets import TARGETS, Target, best, fastest, short, verdict

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables and draw the plots; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs")
    options = parser.parse_args(argv)
    try:
        records = newest_records(options.records)
        text = replace_section(options.readme.read_text(encoding="utf-8"), section(records))
    except (OSError, ValueError) as error:
        print(f"make results: {error}", file=sys.stderr)
        return 2
    for record in records:
        draw(record, options.plots / plot_name(record))
        if curves(record["measurements"]):
            path = options.plots / plot_name(record, "scaling")
            draw_scaling(record["measurements"], title_of(record), path)
    write_whole(options.readme, text)
    print(f"{options.readme}: {len(records)} records")
    return 0


def newest_records(folder: Path) -> list[Record]:
    """The newest record of each device, GPUs first.

    Raises:
        ValueError: a file is not a record; names it.
    """
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            device, date = record["device"]["name"], record["date"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a record: {error!r}") from error
        if device not in newest or date > newest[device]["date"]:
            newest[device] = record
    return sorted(newest.values(), key=lambda r: (r["device"]["type"] == "cpu", r["device"]["name"]))


def replace_section(readme: str, section: str) -> str:
    """Put a section between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README needs one {BEGIN} and after it one {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def section(records: Sequence[Record]) -> str:
    """Everything between the markers."""
    blocks = [block for record in records for block in record_blocks(record)]
    measured = {record["device"]["type"] for record in records}
    left = [target for target in TARGETS if target.device not in measured]
    if left:
        blocks.append(target_table(left, []))
    if "cuda" not in measured:
        blocks.append(
            "No GPU has run this version: `make gpu` on a machine that has one writes a record, "
            "and `make results` this table."
        )
    return "\n\n".join(blocks)


def record_blocks(record: Record) -> list[str]:
    device, rows = record["device"], record["measurements"]
    versions, ceilings = device["versions"], record["ceilings"]
    title = title_of(record)
    counted = [
        f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(part['tests'].items()))}"
        for name in ("tests of the kernels", "compute-sanitizer")
        if "tests" in (part := record["parts"].get(name, {}))
    ]
    built = f"for {device['extension']}" if device.get("extension") else "not built"
    facts = [
        f"{record['date'][:10]}",
        *([device["processor"]] if "processor" in device else []),
        *([f"driver {device['driver']}"] if "driver" in device else []),
        f"torch {versions['torch']}",
        f"triton {versions.get('triton', 'not installed')}",
        *([f"CUDA kernels {built}"] if device["type"] == "cuda" else []),
        f"ceilings of the run {ceilings['matmul_tflops']:.4g} TFLOP/s and {ceilings['copy_gbps']:.4g} GB/s",
        *counted,  # what was not run is named below
    ]
    targets = [target for target in TARGETS if target.device == device["type"]]
    blocks = [f"**{title}.** {'; '.join(facts)}.", target_table(targets, rows), peer_table(rows)]
    if rates := rate_rows(rows):
        blocks.append("\n".join([cells(*HEADER), cells(*["---"] * len(HEADER)), *(cells(*r) for r in rates)]))
    gaps = [
        f"{name} ({part['status']}: {part.get('reason', 'no reason given')})"
        for name, part in record["parts"].items()
        if part["status"] != "ok"
    ]
    if gaps:
        blocks.append(f"Not done, or not to the end: {'; '.join(gaps)}.")
    absent = sorted(
        {
            f"{row['provider']} ({row['status']}: {row['reason']})"
            for row in rows
            if row["status"] in ("wrong", "failed")
        }
        | {row["reason"] for row in rows if row["status"] == "missing" and "not installed" in row["reason"]}
    )
    if absent:
        blocks.append(f"Not compared: {'; '.join(absent)}.")
    blocks.append(f"![Times of every provider on {title}](docs/{plot_name(record)})")
    if curves(rows):
        blocks.append(f"![Cost of a training step on {title}](docs/{plot_name(record, 'scaling')})")
    return blocks


def title_of(record: Record) -> str:
    dirty = " with uncommitted changes" if record["dirty"] else ""
    return f"{record['device']['name']}, commit {record['commit']}{dirty}"


def target_table(targets: Sequence[Target], rows: Sequence[dict[str, Any]]) -> str:
    """One row a target: work, target, measured, met or not."""
    lines = ["| work | reach | measured | met |", "| --- | --- | --- | --- |"]
    for target in targets:
        findings = target.judge(rows)
        measured = "; ".join(finding.text for finding in findings) or "not measured"
        lines.append(cells(target.work, target.reach, measured, verdict(findings) if findings else "–"))
    return "\n".join(lines)


def peer_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a case: the fastest of ours beside the fastest peer. How a step scales is a plot of its own."""
    rows = [row for row in rows if row["op"] != SCALING]
    lines = [
        "| op | size | ours | ms | of ceiling | peak MiB | error | fastest peer | ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op, size in dict.fromkeys((row["op"], row["size"]) for row in rows):
        case = [row for row in rows if (row["op"], row["size"]) == (op, size)]
        ours, peer = best(case), fastest(case, "peer")
        if ours is None or "ms" not in ours:
            mine = [ours["status"] if ours else "not measured", "", "", "", ""]
        else:
            mine = [
                short(ours),
                f"{ours['ms']:.3g}",
                f"{ours['share']:.0%}",
                f"{ours['peak_mib']:,.0f}",
                f"{ours['error']:.0e}" if "error" in ours else "",
            ]
        theirs = [peer["provider"], f"{peer['ms']:.3g}"] if peer else ["none", ""]
        lines.append(cells(op, size, *mine, *theirs))
    return "\n".join(lines)


def cells(*texts: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def plot_name(record: Record, kind: str = "results") -> str:
    device = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    return f"{kind}-{device}.png"


def draw(record: Record, path: Path) -> None:
    """Bars of milliseconds, a panel a case: ours, peers, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["measurements"]:
        if "ms" in row and row["op"] != SCALING:
            cases.setdefault((row["op"], row["size"]), []).append(row)
    if not cases:
        return
    colours = {"ours": "tab:blue", "peer": "tab:orange", "floor": "tab:gray"}
    num_rows = -(-len(cases) // 2)
    figure, grid = plt.subplots(num_rows, 2, figsize=(13, 0.6 + 2.1 * num_rows), squeeze=False)
    panels = list(grid.flat)
    for panel, ((op, size), rows) in zip(panels, cases.items(), strict=False):
        rows = sorted(rows, key=lambda row: -row["ms"])
        bars = panel.barh(
            [row["provider"] for row in rows],
            [row["ms"] for row in rows],
            color=[colours[row["kind"]] for row in rows],
        )
        panel.bar_label(bars, [f" {row['ms']:.3g}" for row in rows], fontsize=8)
        panel.set_title(f"{op}: {size}", fontsize=9)
        panel.set_xlabel("ms", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
    for panel in panels[len(cases) :]:
        panel.axis("off")
    figure.suptitle(f"{title_of(record)}: ours, peers, and the floor", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
