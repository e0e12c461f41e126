"""Rules of the fact check: form, steps, answer, conclusion, length, repetition, claims about the place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from geo_r1.answers import DEFAULT_NUM_CHOICES, extract_answer, extract_choice, well_formed
from geo_r1.data.sample import Sample
from geo_r1.data.teaching.claims import contradictions
from geo_r1.errors import UserError
from geo_r1.places import Gazetteer

FORM = ("structure", "steps", "conclusion", "length", "repetition", "unjudged")  # another try may help
KEPT, AGAIN, REJECTED = "kept", "again", "rejected"
STEPS = ("visual cues", "knowledge", "evidence", "conclusion")
_STEP = re.compile(
    r"(?:^|[\n.>!?])[\s#*_\d.)(-]{0,12}(?:step \d[\s:.-]{0,3})?"
    r"(?:(visual cues?|cues?|observations?)|(knowledge(?: association)?)|"
    r"(evidence(?: corroboration)?)|(conclusion))"
    r"[\s*_]{0,4}(?::|\n)",
    re.IGNORECASE,
)
_LETTER = re.compile(  # A and I are words; E and others may be part of a coordinate or an abbreviation
    r"(?<![\w.'’°-])([B-HJ-Z])(?![\w'’-]|\.\w)(?<!\d [NESW])"
    r"|(?i:tiles?|images?|options?|candidates?|answer|labelled|pick|choose)(?: is)?:? ?\(?([A-Z])(?![\w'’-])"
    r"|(?<![\w.'’-])(A)(?=[.,;)]|$)"
)


@dataclass(frozen=True)
class Limits:
    """Limits on a chain of thought.

    Attributes:
        min_words, max_words: of the whole response.
        max_repetition: share of the 6-grams of words that repeat earlier ones.
        city_km, coordinate_km: how far a named city and coordinates may be from the place.
    """

    min_words: int = 20
    max_words: int = 1500
    max_repetition: float = 0.3
    city_km: float = 100.0
    coordinate_km: float = 50.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise UserError(f"--min-words {self.min_words} must be 0 to --max-words {self.max_words}")
        if not 0 <= self.max_repetition <= 1:
            raise UserError(f"--max-repetition must be 0 to 1, got {self.max_repetition}")
        if not (0 <= self.city_km < math.inf and 0 <= self.coordinate_km < math.inf):
            raise UserError(
                f"--city-km and --coordinate-km must be distances, got {self.city_km}, {self.coordinate_km}"
            )


@dataclass(frozen=True)
class Finding:
    """A fault in a chain of thought.

    Attributes:
        kind: one of `FORM`, "answer", "judge", or a kind of `claims.Contradiction`.
        reason: the fault in words.
    """

    kind: str
    reason: str


def check(sample: Sample, gazetteer: Gazetteer, limits: Limits) -> list[Finding]:
    """All faults that the rules find in a sample's response."""
    text = sample.response or ""
    words = text.split()
    findings = []
    if not well_formed(text):
        findings.append(
            Finding("structure", "it is not one think block and one answer block with text in it")
        )
    if not limits.min_words <= len(words) <= limits.max_words:
        allowed = f"{limits.min_words} to {limits.max_words}"
        findings.append(Finding("length", f"{len(words)} words; {allowed} are allowed"))
    if (repeated := _repetition(words)) > limits.max_repetition:
        findings.append(Finding("repetition", f"{repeated:.0%} of its 6-grams repeat earlier ones"))
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
    """The text of each step that is in order."""
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
    if block is None:
        yield Finding("structure", "there is no answer block")
        return
    if len(truth) != 1 or not truth.isalpha():
        if block.casefold().split() != truth.casefold().split():
            yield Finding("answer", f"answers {block!r:.80}, the truth is {truth!r:.80}")
        return
    num_choices = sample.metadata.get("num_choices", DEFAULT_NUM_CHOICES)
    if not isinstance(num_choices, int) or not 2 <= num_choices <= 26:
        raise UserError(f"sample {sample.id}: num_choices must be 2 to 26, got {num_choices!r:.40}")
    said = extract_choice(text, num_choices)
    if said is None:
        yield Finding("structure", f"no choice can be read in its answer {block!r:.80}")
    elif said != truth.upper():
        yield Finding("answer", f"answers {said}, the truth is {truth}")
    concluded = {match[1] or match[2] or match[3] for match in _LETTER.finditer(conclusion)}
    if said is not None and concluded and said not in concluded:
        yield Finding("conclusion", f"concludes {', '.join(sorted(concluded))}, answers {said}")


def outcome(findings: list[Finding]) -> str:
    """The name of the file for a sample with these findings."""
    if not findings:
        return KEPT
    return AGAIN if all(finding.kind in FORM for finding in findings) else REJECTED
