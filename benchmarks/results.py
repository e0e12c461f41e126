"""Turns the records in benchmarks/results/ into the tables and plots of docs/results.md: `make results`.

The newest record of each device counts. Every table and plot names its device and commit; a target without a
record is "not measured". Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import SCALING, STEP, Row
from benchmarks.plots import curves, draw, draw_scaling, draw_steps, steps
from benchmarks.records import RESULTS, ROOT, Record, device_slug
from benchmarks.tables import rate_table, table
from benchmarks.targets import TARGETS, Target, best, fastest, short, verdict
from geo_r1.errors import UserError, exit_code_of
from geo_r1.files import write_text
from geo_r1.train.report.plots import number

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COUNTED = ("tests of the kernels", "compute-sanitizer")  # stages whose tests a record's first line counts


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables and draw the plots; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="plots go beside it")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: write_page(options.records, options.page))


def write_page(folder: Path, page: Path) -> None:
    """Put the tables between the page's markers, and the plots beside it.

    Raises:
        UserError: the page cannot be read or lacks its markers, or a file is not a record.
    """
    records = newest_records(folder)
    try:
        text = replace_section(page.read_text(encoding="utf-8"), section(records))
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}") from error
    for record in records:
        title, rows = title_of(record), record["measurements"]
        draw(rows, title, page.parent / plot_name(record))
        if steps(rows):
            draw_steps(rows, small_print(record), page.parent / step_name(record))
        if curves(rows):
            draw_scaling(rows, title, page.parent / plot_name(record, "scaling"))
    write_text(page, text)
    print(f"{page}: {len(records)} records")


def newest_records(folder: Path) -> list[Record]:
    """The newest record of each device, GPUs first; rehearsals do not count.

    Raises:
        UserError: a file is not a record; the message names it.
    """
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            device, date = record["device"]["name"], record["date"]
            if record.get("rehearsal"):
                continue
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a record: {error!r}") from error
        if device not in newest or date > newest[device]["date"]:
            newest[device] = record
    return sorted(newest.values(), key=lambda r: (r["device"]["type"] == "cpu", r["device"]["name"]))


def replace_section(page: str, section: str) -> str:
    """Put a section between the markers.

    Raises:
        UserError: the markers are missing, repeated or out of order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"the page needs one {BEGIN} and after it one {END}")
    before, rest = page.split(BEGIN)
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
    rows, title = record["measurements"], title_of(record)
    targets = [target for target in TARGETS if target.device == record["device"]["type"]]
    blocks = [f"**{title}.** {'; '.join(facts(record))}.", target_table(targets, rows), peer_table(rows)]
    if steps(rows):
        blocks.append(f"![Our training step beside the fastest peer's on {title}]({step_name(record)})")
    if rates := rate_table(rows):
        blocks.append("\n".join(rates))
    gaps = [
        f"{name} ({part['status']}: {part.get('reason', 'no reason given')})"
        for name, part in record["parts"].items()
        if part["status"] != "ok"
    ]
    if gaps:
        blocks.append(f"Not done, or not to the end: {'; '.join(gaps)}.")
    wrong = [row for row in rows if row["status"] in ("wrong", "failed")]
    missing = [row for row in rows if row["status"] == "missing" and "not installed" in row["reason"]]
    absent = {f"{row['provider']} ({row['status']}: {row['reason']})" for row in wrong}
    absent |= {row["reason"] for row in missing}
    if absent:
        blocks.append(f"Not compared: {'; '.join(sorted(absent))}.")
    blocks.append(f"![Times of every provider on {title}]({plot_name(record)})")
    if curves(rows):
        blocks.append(f"![Cost of a training step on {title}]({plot_name(record, 'scaling')})")
    return blocks


def facts(record: Record) -> list[str]:
    """Date, device, versions, ceilings, and how many tests passed; other gaps are listed below the tables."""
    device, ceilings = record["device"], record["ceilings"]
    built = f"for {device['extension']}" if device.get("extension") else "not built"
    tests = {name: record["parts"].get(name, {}).get("tests", {}) for name in COUNTED}
    return [
        record["date"][:10],
        *([device["processor"]] if "processor" in device else []),
        *([f"driver {device['driver']}"] if "driver" in device else []),
        f"torch {device['versions']['torch']}",
        f"triton {device['versions'].get('triton', 'not installed')}",
        *([f"CUDA kernels {built}"] if device["type"] == "cuda" else []),
        f"ceilings of the run {ceilings['matmul_tflops']:.4g} TFLOP/s and {ceilings['copy_gbps']:.4g} GB/s",
        *(
            f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}"
            for name, counts in tests.items()
            if counts
        ),
    ]


def title_of(record: Record) -> str:
    dirty = " with uncommitted changes" if record["dirty"] else ""
    return f"{record['device']['name']}, commit {record['commit']}{dirty}"


def plot_name(record: Record, kind: str = "results") -> str:
    return f"{kind}-{device_slug(record['device'])}.png"


def step_name(record: Record) -> str:
    return f"step-{device_slug(record['device'])}.svg"


def small_print(record: Record) -> str:
    """Where and when a record was made, in one line."""
    device = record["device"]
    name = device.get("processor", device["name"])
    threads = [f"{device['threads']} threads"] if "threads" in device else []
    dtypes = dict.fromkeys(
        row["dtype"] for row in record["measurements"] if row["op"] == STEP and "dtype" in row
    )
    kind = "CPU" if device["type"] == "cpu" else "GPU"
    return ", ".join([f"{kind}: {name}", *threads, *dtypes, "random weights", f"commit {record['commit']}",
                      record["date"][:10]])  # fmt: skip


def target_table(targets: Sequence[Target], rows: Sequence[Row]) -> str:
    """One row per target: work, target, measured, met or not."""
    found = []
    for target in targets:
        findings = target.findings(rows)
        measured = "; ".join(finding.text for finding in findings) or "not measured"
        found.append((target.work, target.reach, measured, verdict(findings) if findings else "–"))
    return "\n".join(table(("work", "reach", "measured", "met"), found))


def peer_table(rows: Sequence[Row]) -> str:
    """One row per case: our fastest beside the fastest peer. Scaling of a step has its own plot."""
    rows = [row for row in rows if row["op"] != SCALING]
    header = ("op", "size", "ours", "ms", "of ceiling", "peak MiB", "error", "fastest peer", "ms")
    found = []
    for op, size in dict.fromkeys((row["op"], row["size"]) for row in rows):
        case = [row for row in rows if (row["op"], row["size"]) == (op, size)]
        ours, peer = best(case), fastest(case, "peer")
        if ours is None or "ms" not in ours:
            mine = [ours["status"] if ours else "not measured", "", "", "", ""]
        else:
            mine = [short(ours), number(ours["ms"]), f"{ours['share']:.0%}", f"{ours['peak_mib']:,.0f}"]
            mine += [f"{ours['error']:.0e}" if "error" in ours else ""]
        theirs = [peer["provider"], number(peer["ms"])] if peer else ["none", ""]
        found.append((op, size, *mine, *theirs))
    return "\n".join(table(header, found))


if __name__ == "__main__":
    sys.exit(main())
