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
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from geo_r1.answers import DEFAULT_NUM_CHOICES, TAGS, extract_answer, extract_choice, well_formed
from geo_r1.data.paths import moved_row
from geo_r1.data.sample import Sample, read_rows, sample_of
from geo_r1.data.teaching.claims import contradictions
from geo_r1.data.teaching.endpoint import Endpoint, EndpointConfig, Reply, add_endpoint_arguments
from geo_r1.files import write_text, written_beside
from geo_r1.places import Gazetteer, open_gazetteer

FORM = ("structure", "steps", "conclusion", "length", "repetition", "unjudged")  # another try may mend it
KEPT, AGAIN, REJECTED = "kept", "again", "rejected"
STEPS = ("visual cues", "knowledge", "evidence", "conclusion")
_STEP = re.compile(
    r"(?:^|[\n.>!?])[\s#*_\d.)(-]{0,12}(?:step \d[\s:.-]{0,3})?"
    r"(?:(visual cues?|cues?|observations?)|(knowledge(?: association)?)|"
    r"(evidence(?: corroboration)?)|(conclusion))"
    r"[\s*_]{0,4}(?::|\n)",
    re.IGNORECASE,
)
_LETTER = re.compile(  # A and I are words, E and the like may belong to a coordinate or an abbreviation
    r"(?<![\w.'’°-])([B-HJ-Z])(?![\w'’-]|\.\w)(?<!\d [NESW])"
    r"|(?i:tiles?|images?|options?|candidates?|answer|labelled|pick|choose)(?: is)?:? ?\(?([A-Z])(?![\w'’-])"
    r"|(?<![\w.'’-])(A)(?=[.,;)]|$)"
)
JUDGE = (
    "You check a chain of thought about where pictures were taken against what is known of the place. "
    'Answer with one JSON object: {"contradictions": ["what it says, and what is known instead", …]}. '
    "List only statements that the known facts make false; an empty list where there are none."
)


@dataclass(frozen=True)
class Limits:
    """What a chain of thought may be.

    Attributes:
        min_words, max_words: of the whole response.
        max_repetition: share of its 6-grams of words that stood before.
        city_km, coordinate_km: how far from the place a named city and coordinates may be.
    """

    min_words: int = 20
    max_words: int = 1500
    max_repetition: float = 0.3
    city_km: float = 100.0
    coordinate_km: float = 50.0


@dataclass(frozen=True)
class Finding:
    """What is wrong with a chain of thought.

    Attributes:
        kind: one of `FORM`, "answer", "judge", or a kind of `claims.Contradiction`.
        reason: in words.
    """

    kind: str
    reason: str


def check(sample: Sample, gazetteer: Gazetteer, limits: Limits) -> list[Finding]:
    """Everything that the rules find wrong with a sample's response."""
    text = sample.response or ""
    words = text.split()
    findings = []
    if not well_formed(text):
        findings.append(
            Finding("structure", "it is not one think block and one answer block with text in it")
        )
    if not limits.min_words <= len(words) <= limits.max_words:
        allowed = f"{limits.min_words} to {limits.max_words}"
        findings.append(Finding("length", f"{len(words)} words, allowed are {allowed}"))
    if (repeated := _repetition(words)) > limits.max_repetition:
        findings.append(Finding("repetition", f"{repeated:.0%} of its 6-grams stood before"))
    steps = _steps(text)
    if missing := [name for name in STEPS if not steps.get(name, "").strip()]:
        findings.append(Finding("steps", f"missing, empty or out of order: {', '.join(missing)}"))
    findings += _of_answer(sample, text, steps.get("conclusion", ""))
    conclusion = steps.get("conclusion", "")
    far = limits.city_km, limits.coordinate_km
    for found in contradictions(text, sample.metadata, gazetteer, *far, conclusion):
        findings.append(Finding(found.kind, f"says {found.said!r:.120}, known is {found.known}"))
    return findings


def _repetition(words: list[str], n: int = 6) -> float:
    grams = [tuple(word.lower() for word in words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _steps(text: str) -> dict[str, str]:
    """The text of each step, as far as they stand in order."""
    thought = text.partition("</think>")[0].removeprefix("<think>")
    found = [(STEPS[match.lastindex - 1], match) for match in _STEP.finditer(thought) if match.lastindex]
    steps: dict[str, str] = {}
    for i, (name, match) in enumerate(found):
        end = found[i + 1][1].start() if i + 1 < len(found) else len(thought)
        if STEPS.index(name) >= len(steps):
            steps.setdefault(name, thought[match.end() : end])
    return steps


def _of_answer(sample: Sample, text: str, conclusion: str) -> Iterator[Finding]:
    if sample.answer is None:
        return
    truth = sample.answer.strip()
    block = extract_answer(text)
    if len(truth) != 1 or not truth.isalpha():
        if (block or "").casefold().split() != truth.casefold().split():
            yield Finding("answer", f"answers {block!r:.80}, the truth is {truth!r:.80}")
        return
    num_choices = sample.metadata.get("num_choices", DEFAULT_NUM_CHOICES)
    said = extract_choice(text, num_choices) if any(tag in text for tag in TAGS) else None
    if said != truth.upper():
        yield Finding("answer", f"answers {said or 'nothing that can be read'}, the truth is {truth}")
    concluded = {match[1] or match[2] or match[3] for match in _LETTER.finditer(conclusion)}
    if said is not None and concluded and said not in concluded:
        yield Finding("conclusion", f"concludes {', '.join(sorted(concluded))}, answers {said}")


def outcome(findings: list[Finding]) -> str:
    """Which file a sample goes to."""
    if not findings:
        return KEPT
    return AGAIN if all(finding.kind in FORM for finding in findings) else REJECTED


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
        from geo_r1.data.teaching.planted import measure

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
