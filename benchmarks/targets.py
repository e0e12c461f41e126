"""The numbers to reach, and whether a record reaches them. All are ratios within one run.

What is judged is the fastest implementation of ours, and its name stands before the figures: what `impl=None`
takes on that device once the table of `geo_r1/kernels/impls.py` names the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # a measurement, as a record holds it


@dataclass(frozen=True)
class Finding:
    """One condition of a target: what was measured, and whether that reaches it; None if it could not be."""

    text: str
    met: bool | None


@dataclass(frozen=True)
class Target:
    work: str
    reach: str
    device: str  # "cuda" or "cpu"
    judge: Callable[[Sequence[Row]], list[Finding]]


def verdict(findings: Sequence[Finding]) -> str:
    """yes, no, or what is missing for a yes."""
    if any(finding.met is False for finding in findings):
        return "no"
    if all(finding.met for finding in findings):
        return "yes"
    return "not fully measured" if any(finding.met for finding in findings) else "not measured"


def of_case(rows: Sequence[Row], op: str, size: str) -> list[Row]:
    return [row for row in rows if row["op"] == op and row["size"] == size]


def best(rows: Sequence[Row]) -> Row | None:
    """The fastest implementation of ours; where none has a time, the one that users get by default."""
    ours = next((row for row in rows if row["kind"] == "ours"), None)  # measured in the order of preference
    return fastest(rows, "ours") or ours


def short(ours: Row) -> str:
    return ours["provider"].removeprefix("geo_r1 ")


def by(ours: Row, *findings: Finding) -> list[Finding]:
    """Findings about one of ours, which the first of them names."""
    first, *others = findings
    return [Finding(f"{short(ours)}: {first.text}", first.met), *others]


def untimed(ours: Row | None) -> list[Finding]:
    """What there is to say where ours has no time."""
    if ours is None:
        return []
    met = None if ours["status"] == "missing" else False
    return by(ours, Finding(f"{ours['status']} ({ours['reason']})", met))


def fastest(rows: Sequence[Row], *kinds: str) -> Row | None:
    timed = [row for row in rows if row["kind"] in kinds and "ms" in row]
    return min(timed, key=lambda row: row["ms"], default=None)


def named(rows: Sequence[Row], provider: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider), None)


def times_as_long(ours: Row, other: Row | None, most: float, what: str) -> Finding:
    """Ours may take at most `most` times as long as another."""
    if other is None or "ms" not in other:
        return Finding(f"{what}: {_why(other)}", None)
    ratio = ours["ms"] / other["ms"]
    return Finding(f"{ratio:.2f} × {what}", ratio <= most)


def times_as_fast(ours: Row, other: Row | None, least: float, what: str = "") -> Finding:
    """Ours has to be at least `least` times as fast as another."""
    if other is None or "ms" not in other:
        return Finding(f"{what or 'library kernels'}: {_why(other)}", None)
    ratio = other["ms"] / ours["ms"]
    return Finding(f"{ratio:.2f} × as fast as {other['provider']}", ratio >= least)


def _why(row: Row | None) -> str:
    return "not measured" if row is None else row.get("reason", "not measured")


def linear_grpo(rows: Sequence[Row]) -> list[Finding]:
    rows = of_case(rows, "linear_grpo_loss", "R=8192 C=3584 V=152064")
    if (ours := best(rows)) is None or "ms" not in ours:
        return untimed(ours)
    gib = ours["peak_mib"] / 1024
    return by(
        ours,
        times_as_long(ours, named(rows, "bare products"), 1.10, "the bare products"),
        Finding(f"{gib:.2f} GiB", gib <= 1.25),
        times_as_fast(ours, named(rows, "Liger fused-linear GRPO"), 3.0, "Liger"),
    )


def linear_logprob(rows: Sequence[Row]) -> list[Finding]:
    rows = of_case(rows, "linear_logprob", "R=8192 C=3584 V=152064")
    if (ours := best(rows)) is None or "ms" not in ours:
        return untimed(ours)
    return by(ours, times_as_long(ours, named(rows, "bare products"), 1.05, "the bare product"))


def against_library(op: str, *sizes: str, least: float) -> Callable[[Sequence[Row]], list[Finding]]:
    """Ours against the fastest library kernel of each size."""

    def judge(rows: Sequence[Row]) -> list[Finding]:
        findings = []
        for size in sizes:
            case = of_case(rows, op, size)
            if (ours := best(case)) is None or "ms" not in ours:
                found = untimed(ours)
            else:
                found = by(ours, times_as_fast(ours, fastest(case, "peer"), least))
            findings += [Finding(f"{size}, {finding.text}", finding.met) for finding in found]
        return findings

    return judge


def shared_prompt(rows: Sequence[Row]) -> list[Finding]:
    """flex_attention is left out: its mask knows the shared prompt, so it repeats nothing."""
    rows = of_case(rows, "packed_attention", "shared prompt 4300 + 8 x 400")
    ours = best(rows)
    repeating = fastest([row for row in rows if not row["provider"].startswith("flex")], "peer")
    if ours is None or "ms" not in ours:
        return untimed(ours)
    if repeating is None:
        return by(ours, Finding("library kernels: not measured", None))
    saved = ours["facts"]["operations_saved"]
    speed = repeating["ms"] / ours["ms"]
    text = f"{speed:.2f} × as fast as {repeating['provider']}: {speed / saved:.2f} of the {saved:.2f} × saved"
    return by(ours, Finding(text, speed / saved >= 0.85))


def loss_rows(rows: Sequence[Row]) -> list[Finding]:
    """A share is of the copy's bandwidth, which the process that timed the rows measured itself."""
    case = of_case(rows, "grpo_loss rows", "R=4096 V=152064")
    findings = []
    for place in ("in place", "out of place"):
        ours = best([row for row in case if row["provider"].endswith(f", {place}")])
        if ours is None or "ms" not in ours:
            findings += untimed(ours)
        else:
            findings += by(ours, Finding(f"{ours['share']:.1%}", ours["share"] >= 0.85))
    return findings


def training_step(rows: Sequence[Row]) -> list[Finding]:
    rows = of_case(rows, "training step", "Qwen2.5-VL-7B, 6 images, 8 completions")
    findings = step_findings(rows, least=4.0, least_mfu=0.45)
    ours = fastest(rows, "ours")
    if ours is not None and (layers := int(ours["facts"]["layers"])) != 28:
        findings.append(Finding(f"with {layers} of 28 text layers", None))
    return findings


def cpu_training_step(rows: Sequence[Row]) -> list[Finding]:
    rows = of_case(rows, "training step", "100M, prompt 438, 8 completions of 40")
    return step_findings(rows, least=2.5, least_mfu=None)


def step_findings(rows: Sequence[Row], least: float, least_mfu: float | None) -> list[Finding]:
    """Speed against the fastest peer, MFU, and a peak of memory below the peer's."""
    ours, padded = fastest(rows, "ours"), fastest(rows, "peer")
    if ours is None:
        return untimed(best(rows))
    facts = ours["facts"]
    tokens_per_second = facts["tokens"] / ours["ms"] * 1e3
    speed = times_as_fast(ours, padded, least, "the padded step")
    mfu = f"MFU {ours['share']:.0%} ({facts['teraflop']:.3g} TFLOP)"
    findings = [
        Finding(f"{tokens_per_second:,.0f} tokens/s, {speed.text}", speed.met),
        Finding(mfu, least_mfu is None or ours["share"] >= least_mfu),
    ]
    if padded is not None:
        text = f"{ours['peak_mib'] / 1024:.1f} GiB against {padded['peak_mib'] / 1024:.1f} above the weights"
        findings.append(Finding(text, ours["peak_mib"] < padded["peak_mib"]))
    return by(ours, *findings)


def cpu_loss(rows: Sequence[Row]) -> list[Finding]:
    rows = of_case(rows, "linear_grpo_loss", "R=384 C=128 V=50021")
    if (ours := best(rows)) is None or "ms" not in ours:
        return untimed(ours)
    return by(ours, times_as_long(ours, named(rows, "eager torch"), 1.3, "plain torch with full logits"))


TARGETS = (
    Target(
        "`linear_grpo_loss` forward + backward, R = 8192, C = 3584, V = 152064",
        "≤ 1.10 × the three bare products; ≤ 1.25 GiB above inputs and gradients; "
        "≥ 3 × Liger's fused-linear GRPO",
        "cuda",
        linear_grpo,
    ),
    Target("`linear_logprob`, no gradient", "≤ 1.05 × one bare product", "cuda", linear_logprob),
    Target(
        "`grpo_loss` rows, loss and gradient, V = 152064, bfloat16",
        "≥ 85 % of the copy bandwidth of the same run",
        "cuda",
        loss_rows,
    ),
    Target(
        "`packed_attention`, plain varlen causal, D = 128, 28/4 heads, 16 K tokens",
        "≥ 0.95 × the best library kernel present",
        "cuda",
        against_library("packed_attention", "causal 4 x 4096", "causal 16K ragged", least=0.95),
    ),
    Target(
        "`packed_attention` forward, D = 128, 28/4 heads, 16 K tokens",
        "≥ 0.95 × the best library kernel present",
        "cuda",
        against_library("packed_attention forward", "causal 4 x 4096", "causal 16K ragged", least=0.95),
    ),
    Target(
        "`packed_attention`, prompt 4.3 K, 8 completions of 400",
        "≥ 0.85 × (operations saved) faster than the best library kernel on repeated prompts",
        "cuda",
        shared_prompt,
    ),
    Target(
        "vision windows (64 tokens, D = 80), full images",
        "≥ 1.3 × the best library kernel present",
        "cuda",
        against_library("packed_attention", "vision windows", "vision whole images", least=1.3),
    ),
    Target(
        "training step, Qwen2.5-VL-7B (random weights), 6 images, M = 8",
        "≥ 4 × tokens/s of the padded, repeated-prompt step; MFU ≥ 45 %; peak memory below it",
        "cuda",
        training_step,
    ),
    Target(
        "`linear_grpo_loss` on a CPU, R = 384, C = 128, V = 50021, float32",
        "≤ 1.3 × plain torch with full logits",
        "cpu",
        cpu_loss,
    ),
    Target(
        "training step on a CPU, Qwen2.5-VL of 100 M parameters (random weights), 6 images, M = 8, "
        "prompt 438, completions of 40",
        "≥ 2.5 × tokens/s of the padded, repeated-prompt step; peak memory below it",
        "cpu",
        cpu_training_step,
    ),
)
