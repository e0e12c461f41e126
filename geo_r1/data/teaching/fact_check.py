"""Keep chains of thought that hold: `python -m geo_r1.data fact-check`.

Rules first: the form, the four steps, the answer and the conclusion, length and repetition, and what is said
of the place against the sample's metadata (see `claims`). A judge, a model behind an endpoint, may look at
what the rules let pass. A sample is kept, asked for again (its form is wrong: another try may mend it), or
rejected (it contradicts what is known), each with its reasons.

    <out>/kept.jsonl  again.jsonl  rejected.jsonl  card.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from geo_r1.data.paths import moved_row
from geo_r1.data.sample import Sample, read_rows, sample_of
from geo_r1.data.teaching.endpoint import Endpoint, EndpointConfig, Reply, add_endpoint_arguments
from geo_r1.data.teaching.planted import measure
from geo_r1.data.teaching.rules import AGAIN, KEPT, REJECTED, Finding, Limits, check, outcome
from geo_r1.files import write_text, written_beside
from geo_r1.places import open_gazetteer

JUDGE = (
    "You check a chain of thought about where pictures were taken against what is known of the place. "
    'Answer with one JSON object: {"contradictions": ["what it says, and what is known instead", …]}. '
    "List only statements that the known facts make false; an empty list where there are none."
)


def judge_messages(sample: Sample) -> list[dict[str, Any]]:
    """What a judge is asked of a sample; it sees no pictures."""
    facts = {key: value for key, value in sample.metadata.items() if isinstance(value, str | int | float)}
    asked = f"Known: {json.dumps(facts | {'answer': sample.answer})}\n\nChain of thought:\n{sample.response}"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": asked}]


def read_verdict(text: str) -> list[Finding] | None:
    """The findings of a judge; None where its answer cannot be read."""
    start, end = text.find("{"), text.rfind("}")
    try:
        listed = json.loads(text[start : end + 1])["contradictions"]
        return [Finding("judge", " ".join(str(item).split())[:300]) for item in list(listed)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _judged(passed: Mapping[str, Sample], options: argparse.Namespace) -> dict[str, list[Finding]]:
    """A judge's findings of the samples that the rules let pass."""
    findings: dict[str, list[Finding]] = {}
    requests = ((name, lambda s=sample: judge_messages(s)) for name, sample in passed.items())
    with Endpoint(EndpointConfig.of(options, "judge")) as endpoint:
        for name, answer in track(endpoint.run(requests), "judge", len(passed), console=Console(stderr=True)):
            verdict = read_verdict(answer.text) if isinstance(answer, Reply) else None
            findings[name] = (
                [Finding("unjudged", "the judge gave no verdict")] if verdict is None else verdict
            )
    return findings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--data", type=Path, help="JSONL or parquet of samples with responses")
    parser.add_argument("--out", type=Path, help="folder of what is kept, asked for again and rejected")
    parser.add_argument("--images", type=Path, help="image paths are relative to it, not to the file")
    for name, value in asdict(Limits()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    parser.add_argument(
        "--measure",
        type=int,
        metavar="N",
        help="instead: plant errors in N exemplars of the world, and count",
    )
    add_endpoint_arguments(parser.add_argument_group("a judge, where its url is given"), "judge")


def command(options: argparse.Namespace) -> None:
    """Check a file, or measure the check."""
    limits = Limits(**{name: getattr(options, name) for name in asdict(Limits())})
    console = Console(stderr=True)
    if options.measure is not None:
        measure(options.measure, limits, console)
        return
    if options.data is None or options.out is None:
        raise ValueError("fact-check needs --data and --out (or --measure)")
    gazetteer = open_gazetteer()
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[str, Sample] = {}
    found: dict[str, list[Finding]] = {}
    root = options.images or options.data.parent
    for number, row in track(read_rows(options.data), "rules", console=console):
        sample = sample_of(row, f"{options.data}, row {number}", root)
        if sample.id in samples:
            raise ValueError(f"{options.data}, row {number}: the id {sample.id!r} stands there twice")
        rows[sample.id], samples[sample.id] = {**row, "id": sample.id}, sample
        found[sample.id] = check(sample, gazetteer, limits)
    if not samples:
        raise ValueError(f"{options.data} holds no samples")
    if options.judge_url:
        found |= _judged({name: samples[name] for name, findings in found.items() if not findings}, options)
    _write(rows, found, root, options.out)
    card = _card(
        found,
        asdict(limits) | {"data": str(options.data), "judge": options.judge_url and options.judge_model},
    )
    write_text(options.out / "card.json", json.dumps(card, indent=2))
    console.print(_shown(card))


def _write(
    rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, list[Finding]], root: Path, out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in (KEPT, AGAIN, REJECTED):
        with written_beside(out / f"{name}.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
            for key, row in rows.items():
                findings = found[key]
                if outcome(findings) != name:
                    continue
                row = moved_row(row, root, out)
                if name == AGAIN:  # as it was before it was answered: `cot` takes it as it is
                    row = {k: v for k, v in row.items() if k != "response"}
                reasons = {"fact_check": [asdict(finding) for finding in findings]} if findings else {}
                file.write(json.dumps({**row, **reasons}) + "\n")


def _card(found: Mapping[str, list[Finding]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How many went where, and what was found how often."""
    counts = Counter(map(outcome, found.values()))
    by_kind = Counter(kind for findings in found.values() for kind in {finding.kind for finding in findings})
    return {
        "arguments": dict(arguments),
        "samples": len(found),
        **{name: counts[name] for name in (KEPT, AGAIN, REJECTED)},
        "share_kept": counts[KEPT] / len(found),
        "found": {kind: {"samples": n, "share": n / len(found)} for kind, n in by_kind.most_common()},
    }


def _shown(card: Mapping[str, Any]) -> Table:
    table = Table(title=f"fact check of {card['samples']} samples")
    table.add_column("")
    table.add_column("samples", justify="right")
    table.add_column("share", justify="right")
    for name in (KEPT, AGAIN, REJECTED):
        table.add_row(name, str(card[name]), f"{card[name] / card['samples']:.1%}")
    table.add_section()
    for kind, row in card["found"].items():
        table.add_row(kind, str(row["samples"]), f"{row['share']:.1%}")
    return table
