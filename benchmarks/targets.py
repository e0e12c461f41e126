"""The targets, and whether a record reaches them. All are ratios within one run.

Our fastest implementation is judged, and its name stands before the figures: `impl=None` takes it on that
device once the table in `geo_r1/kernels/impls.py` names the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.measure import Row


@dataclass(frozen=True)
class Finding:
    """One condition of a target: the measurement, and whether it reaches the target; None if not measured."""

    text: str
    met: bool | None


# Findings about a case, given our fastest row and all rows of the case.
Judge = Callable[[Row, Sequence[Row]], list[Finding]]


@dataclass(frozen=True)
class Target:
    """What to reach in one or more cases of an op.

    Attributes:
        work, reach: in words.
        device: "cuda" or "cpu".
        ways: ends of our providers' names; each is judged separately.
        own: leave out "flash", which calls a library and would be judged against itself.
    """

    work: str
    reach: str
    device: str
    op: str
    sizes: tuple[str, ...]
    judge: Judge
    ways: tuple[str, ...] = ("",)
    own: bool = False

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Findings about our fastest in each case and way; the first finding names it."""
        found = []
        for size, way in product(self.sizes, self.ways):
            case = [row for row in rows if (row["op"], row["size"]) == (self.op, size)]
            case = [row for row in case if row["kind"] != "ours" or self._judges(row["provider"], way)]
            if (ours := best(case)) is None:
                continue
            if "ms" in ours:
                first, *others = self.judge(ours, case)
            else:
                met = None if ours["status"] == "missing" else False
                first, others = Finding(f"{ours['status']} ({ours['reason']})", met), []
            where = f"{size}, " if len(self.sizes) > 1 else ""
            found += [Finding(f"{where}{short(ours)}: {first.text}", first.met), *others]
        return found

    def _judges(self, provider: str, way: str) -> bool:
        return provider.endswith(way) and not (self.own and provider.endswith(" flash"))


def verdict(findings: Sequence[Finding]) -> str:
    """yes, no, or that measurements are missing."""
    if any(finding.met is False for finding in findings):
        return "no"
    if all(finding.met for finding in findings):
        return "yes"
    return "not fully measured" if any(finding.met for finding in findings) else "not measured"


def fastest(rows: Sequence[Row], *kinds: str) -> Row | None:
    timed = [row for row in rows if row["kind"] in kinds and "ms" in row]
    return min(timed, key=lambda row: row["ms"], default=None)


def best(rows: Sequence[Row]) -> Row | None:
    """Our fastest implementation; if none has a time, the one that users get by default."""
    ours = next((row for row in rows if row["kind"] == "ours"), None)  # measured in the order of preference
    return fastest(rows, "ours") or ours


def named(rows: Sequence[Row], provider: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider), None)


def short(ours: Row) -> str:
    return ours["provider"].removeprefix("geo_r1 ")


def compare(ours: Row, other: Row | None, what: str, judge: Callable[[float, float], Finding]) -> Finding:
    """The finding about our time and another provider's; the reason if the other has no time."""
    if other is None or "ms" not in other:
        return Finding(f"{what}: {(other or {}).get('reason', 'not measured')}", None)
    return judge(ours["ms"], other["ms"])


def times_as_long(most: float, provider: str, what: str) -> Judge:
    """Ours may take at most `most` times as long as another provider."""

    def finding(ms: float, other_ms: float) -> Finding:
        return Finding(f"{ms / other_ms:.2f} × {what}", ms / other_ms <= most)

    return lambda ours, rows: [compare(ours, named(rows, provider), what, finding)]


def times_as_fast(ours: Row, other: Row | None, least: float, what: str = "library kernels") -> Finding:
    """Ours must be at least `least` times as fast as another."""
    name = "" if other is None else other["provider"]

    def finding(ms: float, other_ms: float) -> Finding:
        return Finding(f"{other_ms / ms:.2f} × as fast as {name}", other_ms / ms >= least)

    return compare(ours, other, what, finding)


def linear_grpo(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    gib = ours["peak_mib"] / 1024
    return [
        *times_as_long(1.10, "bare products", "the bare products")(ours, rows),
        Finding(f"{gib:.2f} GiB", gib <= 1.25),
        times_as_fast(ours, named(rows, "Liger fused-linear GRPO"), 3.0, "Liger"),
    ]


def library(least: float) -> Judge:
    """Ours against the fastest library kernel."""
    return lambda ours, rows: [times_as_fast(ours, fastest(rows, "peer"), least)]


def shared_prompt(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    """flex_attention is left out: its mask shares the prompt, so it repeats nothing."""
    repeating = fastest([row for row in rows if not row["provider"].startswith("flex")], "peer")
    if repeating is None:
        return [Finding("library kernels: not measured", None)]
    saved = ours["facts"]["operations_saved"]
    speed = repeating["ms"] / ours["ms"]
    text = f"{speed:.2f} × as fast as {repeating['provider']}: {speed / saved:.2f} of the {saved:.2f} × saved"
    return [Finding(text, speed / saved >= 0.85)]


def bandwidth(ours: Row, rows: Sequence[Row]) -> list[Finding]:
    """Shares are of the copy's bandwidth, measured by the process that timed the rows."""
    return [Finding(f"{ours['share']:.1%}", ours["share"] >= 0.85)]


def training_step(least: float, least_mfu: float = 0.0, layers: int | None = None) -> Judge:
    """Speed against the fastest peer, MFU, and a peak of memory below the peer's.

    Args:
        layers: text layers of the whole model; a step with fewer, for lack of memory, does not count.
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


QWEN_7B_HEAD = ("R=8192 C=3584 V=152064",)
TEXT = ("causal 4 x 4096", "causal 16K ragged")
LIBRARY = "≥ 0.95 × the best library kernel present"
TARGETS = (
    Target(
        "`linear_grpo_loss` forward + backward, R = 8192, C = 3584, V = 152064",
        "≤ 1.10 × the three bare products; ≤ 1.25 GiB above inputs and gradients; "
        "≥ 3 × Liger's fused-linear GRPO",
        *("cuda", "linear_grpo_loss", QWEN_7B_HEAD, linear_grpo),
    ),
    Target(
        "`linear_logprob`, no gradient",
        "≤ 1.05 × one bare product",
        *("cuda", "linear_logprob", QWEN_7B_HEAD),
        times_as_long(1.05, "bare products", "the bare product"),
    ),
    Target(
        "`grpo_loss` rows, loss and gradient, V = 152064, bfloat16",
        "≥ 85 % of the copy bandwidth of the same run",
        *("cuda", "grpo_loss rows", ("R=4096 V=152064",), bandwidth),
        ways=(", in place", ", out of place"),
    ),
    Target(
        "`packed_attention`, plain varlen causal, D = 128, 28/4 heads, 16 K tokens",
        *(LIBRARY, "cuda", "packed_attention", TEXT, library(0.95)),
        own=True,
    ),
    Target(
        "`packed_attention` forward, D = 128, 28/4 heads, 16 K tokens",
        *(LIBRARY, "cuda", "packed_attention forward", TEXT, library(0.95)),
        own=True,
    ),
    Target(
        "`packed_attention`, prompt 4.3 K, 8 completions of 400",
        "≥ 0.85 × (operations saved) faster than the best library kernel on repeated prompts",
        *("cuda", "packed_attention", ("shared prompt 4300 + 8 x 400",), shared_prompt),
    ),
    Target(
        "vision windows (64 tokens, D = 80), full images",
        "≥ 1.3 × the best library kernel present",
        *("cuda", "packed_attention", ("vision windows", "vision whole images"), library(1.3)),
        own=True,
    ),
    Target(
        "training step, Qwen2.5-VL-7B (random weights), 6 images, M = 8",
        "≥ 4 × tokens/s of the padded, repeated-prompt step; MFU ≥ 45 %; peak memory below it",
        *("cuda", "training step", ("Qwen2.5-VL-7B, 6 images, 8 completions",)),
        training_step(4.0, 0.45, 28),
    ),
    Target(
        "`linear_grpo_loss` on a CPU, R = 384, C = 128, V = 50021, float32",
        "≤ 1.3 × plain torch with full logits",
        *("cpu", "linear_grpo_loss", ("R=384 C=128 V=50021",)),
        times_as_long(1.3, "eager torch", "plain torch with full logits"),
    ),
    Target(
        "training step on a CPU, Qwen2.5-VL of 100 M parameters (random weights), 6 images, M = 8, "
        "prompt 438, completions of 40",
        "≥ 2.5 × tokens/s of the padded, repeated-prompt step; peak memory below it",
        *("cpu", "training step", ("100M, prompt 438, 8 completions of 40",), training_step(2.5)),
    ),
)
