"""Check and sort chains of thought: `python -m geo_r1.data fact-check`.

Rules check the form, the four steps, the answer and the conclusion, length and repetition, and compare claims
about the place with the sample's metadata (see `claims`). A judge, a model behind an endpoint, may check the
samples that pass the rules. A sample is kept, asked for again (its form is wrong, and another try may help)
or rejected (it contradicts known facts), with the reasons.

    <out>/kept.jsonl  again.jsonl  rejected.jsonl  card.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from geo_r1.data.columns import own_columns
from geo_r1.data.journal import Journal
from geo_r1.data.paths import moved_row, naming
from geo_r1.data.rows import read_rows
from geo_r1.data.sample import Sample, sample_of
from geo_r1.data.teaching.endpoint import Endpoint, EndpointConfig, Reply, add_endpoint_arguments
from geo_r1.data.teaching.rules import AGAIN, KEPT, REJECTED, Finding, Limits, check, outcome
from geo_r1.errors import UserError
from geo_r1.files import written_beside
from geo_r1.places import open_gazetteer

JUDGE = (
    "You check a chain of thought about where pictures were taken against what is known of the place. "
    'Answer with one JSON object: {"contradictions": ["what it says, and what is known instead", …]}. '
    "List only statements that the known facts make false; an empty list where there are none."
)


def judge_messages(sample: Sample) -> list[dict[str, Any]]:
    """Messages that ask a judge about a sample; the judge sees no images."""
    facts = {key: value for key, value in sample.metadata.items() if isinstance(value, str | int | float)}
    asked = f"Known: {json.dumps(facts | {'answer': sample.answer})}\n\nChain of thought:\n{sample.response}"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": asked}]


def read_verdict(text: str) -> list[Finding] | None:
    """A judge's findings; None if its answer cannot be read."""
    start, end = text.find("{"), text.rfind("}")
    try:
        listed = json.loads(text[start : end + 1])["contradictions"]
        return [Finding("judge", " ".join(str(item).split())[:300]) for item in list(listed)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _judged(passed: Mapping[str, Sample], config: EndpointConfig, path: Path) -> dict[str, list[Finding]]:
    """A judge's findings for samples that pass the rules; no sample is judged twice."""
    findings: dict[str, list[Finding]] = {}
    with Journal(path) as verdicts, Endpoint(config) as endpoint:
        asked: dict[str, str] = {}
        for name, sample in passed.items():
            messages = json.dumps([config.model, *judge_messages(sample)])
            key = f"{name}/{hashlib.sha256(messages.encode()).hexdigest()[:16]}"
            if key in verdicts.records:
                findings[name] = [Finding("judge", reason) for reason in verdicts.records[key]["reasons"]]
            else:
                asked[name] = key
        requests = ((name, partial(judge_messages, passed[name])) for name in asked)
        for name, answer in track(endpoint.run(requests), "judge", len(asked), console=Console(stderr=True)):
            verdict = read_verdict(answer.text) if isinstance(answer, Reply) else None
            if verdict is None:
                findings[name] = [Finding("unjudged", "the judge gave no verdict")]
            else:
                findings[name] = verdict
                verdicts.append({"id": asked[name], "reasons": [finding.reason for finding in verdict]})
    return findings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--data", type=Path, help="JSONL or parquet of samples with responses")
    parser.add_argument("--out", type=Path, help="folder for the samples kept, asked for again and rejected")
    parser.add_argument("--images", type=Path, help="folder of relative image paths; default: that of --data")
    for name, value in asdict(Limits()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    add_endpoint_arguments(parser.add_argument_group("a judge, if its url is given"), "judge")


def command(options: argparse.Namespace) -> None:
    """Check the samples of a file and sort them."""
    limits = Limits(**{name: getattr(options, name) for name in asdict(Limits())})
    console = Console(stderr=True)
    if options.data is None or options.out is None:
        raise UserError("fact-check needs --data and --out")
    judge = EndpointConfig.of(options, "judge") if options.judge_url or options.judge_model else None
    arguments = asdict(limits) | {"data": str(options.data), "judge": judge and judge.model}
    _check_folder(options.data, options.out)
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[str, Sample] = {}
    found: dict[str, list[Finding]] = {}
    gazetteer, root = open_gazetteer(), options.images or options.data.parent
    for number, row in track(read_rows(options.data), "rules", console=console):
        where = f"{options.data}, row {number}"
        sample = sample_of(row, where, root)
        if sample.id in samples:
            raise UserError(f"{where}: the id {sample.id!r} stands there twice")
        if any(isinstance(image, bytes) for image in sample.images):
            raise UserError(f"{where}: its images are in the table; save them as files first (cot does)")
        rows[sample.id] = moved_row({**own_columns(row), "id": sample.id}, root, options.out)
        samples[sample.id], found[sample.id] = sample, check(sample, gazetteer, limits)
    if not samples:
        raise UserError(f"{options.data} holds no samples")
    if judge is not None:
        passed = {name: samples[name] for name, findings in found.items() if not findings}
        found |= _judged(passed, judge, options.out / "verdicts.jsonl")
    card = _card(found, arguments)
    with naming(options.out, "written or read"), ExitStack() as whole:
        options.out.mkdir(parents=True, exist_ok=True)
        # the files are renamed together, so that no sample is in two of them
        for name in (KEPT, AGAIN, REJECTED):
            partial_path = whole.enter_context(written_beside(options.out / f"{name}.jsonl"))
            partial_path.write_text("".join(_lines(rows, found, name)), encoding="utf-8")
        whole.enter_context(written_beside(options.out / "card.json")).write_text(json.dumps(card, indent=2))
    console.print(_shown(card))


def _check_folder(data: Path, out: Path) -> None:
    """Refuse an output folder in which this check would replace another file's samples."""
    if data.resolve().parent == out.resolve():
        raise UserError(f"--data {data} is in --out, where files are replaced: choose another --out")
    if (out / "card.json").exists():
        try:
            before = json.loads((out / "card.json").read_text(encoding="utf-8"))["arguments"]["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out / 'card.json'} is not a fact check's: choose another --out") from error
        if before != str(data):
            raise UserError(f"{out} holds what was found in {before}: choose another --out")


def _lines(
    rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, list[Finding]], name: str
) -> Iterator[str]:
    """The rows with one outcome, with only this check's reasons."""
    for key, row in rows.items():
        if outcome(found[key]) == name:
            # `cot` writes the response anew, so a sample to be asked for again must not have one
            left_out = {"fact_check", *(("response", "teacher", "usage") if name == AGAIN else ())}
            reasons = {"fact_check": [asdict(finding) for finding in found[key]]} if found[key] else {}
            row = {column: value for column, value in row.items() if column not in left_out}
            yield json.dumps({**row, **reasons}, default=str) + "\n"


def _card(found: Mapping[str, list[Finding]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of samples by file, and of findings by kind."""
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
