"""The numbers to reach, and whether a record reaches them. All are ratios within one run.

The fastest implementation of ours is judged, and its name stands before the figures: it is what `impl=None`
takes on that device once the table of `geo_r1/kernels/impls.py` names the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measure import Row


@dataclass(frozen=True)
class Finding:
    """One condition of a target: what was measured, and whether that reaches it; None if it could not be."""

    text: str
    met: bool | None


# Findings about a case, given the fastest of ours and all rows of the case.
Judge = Callable[[Row, Sequence[Row]], list[Finding]]


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


def fastest(rows: Sequence[Row], *kinds: str) -> Row | None:
    timed = [row for row in rows if row["kind"] in kinds and "ms" in row]
    return min(timed, key=lambda row: row["ms"], default=None)


def best(rows: Sequence[Row]) -> Row | None:
    """The fastest implementation of ours; if none has a time, the one that users get by default."""
    ours = next((row for row in rows if row["kind"] == "ours"), None)  # measured in the order of preference
    return fastest(rows, "ours") or ours


def short(ours: Row) -> str:
    return ours["provider"].removeprefix("geo_r1 ")


def judged(rows: Sequence[Row], judge: Judge) -> list[Finding]:
    """Findings about the fastest of ours, which the first of them names; or why there is no time of ours."""
    if (ours := best(rows)) is None:
        return []
    if "ms" in ours:
        first, *others = judge(ours, rows)
    else:
        met = None if ours["status"] == "missing" else False
        first, others = Finding(f"{ours['status']} ({ours['reason']})", met), []
    return [Finding(f"{short(ours)}: {first.text}", first.met), *others]


def of_case(op: str, size: str, judge: Judge) -> Callable[[Sequence[Row]], list[Finding]]:
    return lambda rows: judged([row for row in rows if (row["op"], row["size"]) == (op, size)], judge)


def named(rows: Sequence[Row], provider: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider), None)


def unmeasured(row: Row | None, what: str) -> Finding | None:
    """Why there is no ratio to another's time; None if there is one."""
    if row is not None and "ms" in row:
        return None
    return Finding(f"{what}: {'not measured' if row is None else row.get('reason', 'not measured')}", None)


def times_as_long(ours: Row, other: Row | None, most: float, what: str) -> Finding:
    """Ours may take at most `most` times as long as another."""
    if (why := unmeasured(other, what)) is not None:
        return why
    ratio = ours["ms"] / other["ms"]  # type: ignore[index]
    return Finding(f"{ratio:.2f} × {what}", ratio <= most)


def times_as_fast(ours: Row, other: Row | None, least: float, what: str = "library kernels") -> Finding:
    """Ours has to be at least `least` times as fast as another."""
    if (why := unmeasured(other, what)) is not None:
        return why
    ratio = other["ms"] / ours["ms"]  # type: ignore[index]
    return Finding(f"{ratio:.2f} × as fast as {other['provider']}", ratio >= least)  # type: ignore[index]


def linear_grpo(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    gib = ours["peak_mib"] / 1024
    return [
        times_as_long(ours, named(rows, "bare products"), 1.10, "the bare products"),
        Finding(f"{gib:.2f} GiB", gib <= 1.25),
        times_as_fast(ours, named(rows, "Liger fused-linear GRPO"), 3.0, "Liger"),
    ]


def linear_logprob(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    return [times_as_long(ours, named(rows, "bare products"), 1.05, "the bare product")]


def cpu_loss(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    return [times_as_long(ours, named(rows, "eager torch"), 1.3, "plain torch with full logits")]


def against_library(op: str, *sizes: str, least: float) -> Callable[[Sequence[Row]], list[Finding]]:
    """Ours against the fastest library kernel of each size."""

    def library(ours: Row, rows: Sequence[Row]) -> list[Finding]:
        return [times_as_fast(ours, fastest(rows, "peer"), least)]

    def judge(rows: Sequence[Row]) -> list[Finding]:
        found = [(size, finding) for size in sizes for finding in of_case(op, size, library)(rows)]
        return [Finding(f"{size}, {finding.text}", finding.met) for size, finding in found]

    return judge


def shared_prompt(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    """flex_attention is left out: its mask knows the shared prompt, so it repeats nothing."""
    repeating = fastest([row for row in rows if not row["provider"].startswith("flex")], "peer")
    if repeating is None:
        return [Finding("library kernels: not measured", None)]
    saved = ours["facts"]["operations_saved"]
    speed = repeating["ms"] / ours["ms"]
    text = f"{speed:.2f} × as fast as {repeating['provider']}: {speed / saved:.2f} of the {saved:.2f} × saved"
    return [Finding(text, speed / saved >= 0.85)]


def loss_rows(rows: Sequence[Row]) -> list[Finding]:
    """A share is of the copy's bandwidth, which the process that timed the rows measured itself."""

    def share(ours: Row, rows: Sequence[Row]) -> list[Finding]:
        return [Finding(f"{ours['share']:.1%}", ours["share"] >= 0.85)]

    case = [row for row in rows if (row["op"], row["size"]) == ("grpo_loss rows", "R=4096 V=152064")]
    in_place = [row for row in case if row["provider"].endswith(", in place")]
    out_of_place = [row for row in case if row["provider"].endswith(", out of place")]
    return judged(in_place, share) + judged(out_of_place, share)


def training_step(least: float, least_mfu: float = 0.0, layers: int | None = None) -> Judge:
    """Speed against the fastest peer, MFU, and a peak of memory below the peer's.

    Args:
        layers: text layers of the whole model; a step with fewer, for lack of memory, is not the target's.
    """

    def judge(ours: Row, rows: Sequence[Row]) -> list[Finding]:
        facts, padded = ours["facts"], fastest(rows, "peer")
        tokens_per_second = facts["tokens"] / ours["ms"] * 1e3
        speed = times_as_fast(ours, padded, least, "the padded step")
        mfu = f"MFU {ours['share']:.0%} ({facts['teraflop']:.3g} TFLOP)"
        findings = [
            Finding(f"{tokens_per_second:,.0f} tokens/s, {speed.text}", speed.met),
            Finding(mfu, ours["share"] >= least_mfu),
        ]
        if padded is not None:
            mine, theirs = (row["peak_mib"] / 1024 for row in (ours, padded))
            findings.append(Finding(f"{mine:.1f} GiB against {theirs:.1f} above the weights", mine < theirs))
        if layers is not None and facts["layers"] != layers:
            findings.append(Finding(f"with {facts['layers']:.0f} of {layers} text layers", None))
        return findings

    return judge


TARGETS = (
    Target(
        "`linear_grpo_loss` forward + backward, R = 8192, C = 3584, V = 152064",
        "≤ 1.10 × the three bare products; ≤ 1.25 GiB above inputs and gradients; "
        "≥ 3 × Liger's fused-linear GRPO",
        "cuda",
        of_case("linear_grpo_loss", "R=8192 C=3584 V=152064", linear_grpo),
    ),
    Target(
        "`linear_logprob`, no gradient",
        "≤ 1.05 × one bare product",
        "cuda",
        of_case("linear_logprob", "R=8192 C=3584 V=152064", linear_logprob),
    ),
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
        of_case("packed_attention", "shared prompt 4300 + 8 x 400", shared_prompt),
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
        of_case("training step", "Qwen2.5-VL-7B, 6 images, 8 completions", training_step(4.0, 0.45, 28)),
    ),
    Target(
        "`linear_grpo_loss` on a CPU, R = 384, C = 128, V = 50021, float32",
        "≤ 1.3 × plain torch with full logits",
        "cpu",
        of_case("linear_grpo_loss", "R=384 C=128 V=50021", cpu_loss),
    ),
    Target(
        "training step on a CPU, Qwen2.5-VL of 100 M parameters (random weights), 6 images, M = 8, "
        "prompt 438, completions of 40",
        "≥ 2.5 × tokens/s of the padded, repeated-prompt step; peak memory below it",
        "cpu",
        of_case("training step", "100M, prompt 438, 8 completions of 40", training_step(2.5)),
    ),
)
