"""Measure several ways to compute the same thing, side by side.

    TFLOP/s = operations / seconds / 1e12;  GB/s = bytes / seconds / 1e9;  share = rate / ceiling of this run

Operations and bytes are those that the work needs (each input read once), the same for every provider, so a
provider that recomputes is slower, not busier. Each provider is first run once and compared with a float64
truth: one that is wrong is not timed. The rest take turns, one repetition each a round, so that clocks and
heat are shared; the median counts. On a GPU, events time the stream alone: before each repetition the L2
cache is overwritten and the stream is held back for as long as the host needs to enqueue the work. A provider
that fails, of memory or otherwise, is reported with the reason and the rest go on; one that leaves the GPU
unusable ends the process, and `gpu.py` starts another without it.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import CpuMeter, CudaMeter, Prepare, Tensors, device_lost, nothing

MIN_ROUNDS, MAX_ROUNDS = 5, 50
ROUNDS_SECONDS = {"cuda": 2.0, "cpu": 1.0}  # of rounds for all providers of a case together
MIB = 2**20


class DeviceLostError(Exception):
    """After an error of a provider's, an illegal address say, the GPU does nothing more for this process."""

    def __init__(self, measurement: Measurement) -> None:
        super().__init__(f"{measurement.provider} left the GPU unusable: {measurement.reason}")
        self.measurement = measurement


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run, on random data."""

    matmul_tflops: float
    copy_gbps: float  # read + write


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        op: name of the op.
        size: says the sizes; a case's name within its op.
        dtype: of the inputs.
        tolerance: the largest relative error, by norm, of any result.
        flops: operations the work needs, 0 where bytes are what counts.
        bytes: each input and result counted once.
        hold: hold the stream back while the host enqueues; False for a step, whose host time counts.
        rounds: repetitions of each provider; None for as many as fit ROUNDS_SECONDS.
        facts: further figures of the work, carried into every measurement.
    """

    op: str
    size: str
    dtype: torch.dtype
    tolerance: float
    flops: float = 0.0
    bytes: float = 0.0
    hold: bool = True
    rounds: int | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        name: in tables.
        build: makes the function that is measured; imports what it needs. The function returns its results.
        kind: "ours", "peer", or "floor": a part of the work that nothing can go below, whose results are
            not compared.
        missing: why it cannot run here, None if it can.
        unpack: turns results into what the truth holds; not timed. They may be fewer than the truth's.
        prepare: called before each repetition, not timed: puts back inputs that are written over.
        facts: further figures of this way, asked for once it was timed.
    """

    name: str
    build: Callable[[], Callable[[], Tensors]]
    kind: str = "peer"
    missing: str | None = None
    unpack: Callable[[Tensors], Sequence[Tensor]] = tuple
    prepare: Prepare = nothing
    facts: Callable[[], Mapping[str, float]] = dict


@dataclass
class Measurement:
    """What was found out about one provider in one case. Fields that do not apply are None.

    `status` is "measured", "missing", "wrong" or "failed", the last three with a `reason`.
    """

    op: str
    size: str
    dtype: str
    provider: str
    kind: str
    status: str = "measured"
    reason: str | None = None
    error: float | None = None  # largest relative error of `errors`
    errors: list[float] = field(default_factory=list)  # by norm, of each result, against float64
    ms: float | None = None  # median
    ms_of_rounds: list[float] = field(default_factory=list, repr=False)
    host_ms: float | None = None  # until the call returned, without waiting for the device
    tflops: float | None = None
    gbps: float | None = None
    share: float | None = None  # of the ceiling that bounds the work
    peak_mib: float | None = None  # above inputs and results
    facts: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: six digits, what does not apply left out, and of the rounds their number and range."""
        fields = asdict(self) | {"rounds": len(self.ms_of_rounds) or None}
        if times := fields.pop("ms_of_rounds"):
            fields["ms_range"] = [min(times), max(times)]
        return {name: _short(value) for name, value in fields.items() if value not in (None, [], {})}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)  # JSON has no NaN
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    return value


def compare(
    case: Case,
    providers: Sequence[Provider],
    truth: Callable[[], Sequence[Tensor]] | None,
    device: torch.device,
    ceilings: Ceilings,
) -> dict[str, Measurement]:
    """Check every provider against the truth, then time those that are right in turns.

    Args:
        truth: makes the float64 results, with inputs of the same values; None compares nothing.

    Returns:
        One measurement a provider, by name.

    Raises:
        DeviceLostError: a provider left the GPU unusable.
    """
    meter: CudaMeter | CpuMeter = CudaMeter(device, case.hold) if device.type == "cuda" else CpuMeter()
    found = {
        p.name: Measurement(
            case.op, case.size, str(case.dtype).removeprefix("torch."), p.name, p.kind, facts=dict(case.facts)
        )
        for p in providers
    }
    expected: Sequence[Tensor] | None = None
    running: dict[str, Callable[[], Tensors]] = {}
    for provider in providers:
        measurement = found[provider.name]
        if provider.missing is not None:
            measurement.status, measurement.reason = "missing", provider.missing
            continue
        if truth is not None and provider.kind != "floor" and expected is None:
            expected = truth()
        try:
            running[provider.name] = _try(provider, measurement, expected, case, meter)
        except Exception as error:  # code of others may raise anything; it is reported, and the rest go on
            _fail(measurement, error)
        if measurement.status != "measured":
            running.pop(provider.name, None)
            _recover()
    del expected
    by_name = {p.name: p for p in providers}
    prepare = {name: p.prepare for name, p in by_name.items()}
    for name, times in _in_turns(running, prepare, meter, found, case.rounds).items():
        _fill(found[name], times, case, ceilings)
        found[name].facts |= by_name[name].facts()
    if device.type == "cuda":
        running.clear()
        torch.cuda.empty_cache()  # the next case starts from an unbroken memory
    return found


def _try(
    provider: Provider,
    measurement: Measurement,
    expected: Sequence[Tensor] | None,
    case: Case,
    meter: CudaMeter | CpuMeter,
) -> Callable[[], Tensors]:
    """The function to be timed, after its results were compared and its memory was measured."""
    function = provider.build()
    if case.rounds is None:  # the first run compiles, and asks for memory that later ones do not
        provider.prepare()
        function()
    provider.prepare()
    results, peak_bytes = meter.run_for_peak(function)
    measurement.peak_mib = peak_bytes / MIB
    if expected is not None and provider.kind != "floor":
        measurement.errors = relative_errors(provider.unpack(results), expected)
        measurement.error = max(measurement.errors, key=lambda e: math.inf if math.isnan(e) else e)
        if not measurement.error <= case.tolerance:
            measurement.status = "wrong"
            measurement.reason = f"error {measurement.error:.1e} is over {case.tolerance:.0e}"
    return function


def _recover() -> None:
    """Give back what a provider that is not timed has left in memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _in_turns(
    running: dict[str, Callable[[], Tensors]],
    prepare: Mapping[str, Prepare],
    meter: CudaMeter | CpuMeter,
    found: dict[str, Measurement],
    num_rounds: int | None,
) -> dict[str, list[float]]:
    """Milliseconds of each repetition of each provider."""
    times: dict[str, list[float]] = {}
    for name, function in running.items():
        if num_rounds is not None:  # a long step: its first run, to compare and for memory, warmed it up
            times[name] = []
            continue
        try:
            found[name].host_ms, first = meter.warm_up(function, prepare[name])
            times[name] = [first]
        except Exception as error:  # as in `compare`
            _fail(found[name], error)
    if num_rounds is None:
        num_rounds = rounds_for(sum(ms for (ms,) in times.values()), ROUNDS_SECONDS[meter.device_type])
    times = {name: [] for name in times}
    for _ in range(num_rounds):
        pending = {}
        for name in times:
            try:
                pending[name] = meter.repeat(running[name], found[name].host_ms or 0.0, prepare[name])
            except Exception as error:  # likewise
                _fail(found[name], error)
        for name, repetition in pending.items():
            try:
                times[name].append(meter.read(repetition))
            except Exception as error:  # likewise
                _fail(found[name], error)
        if any(found[name].status != "measured" for name in times):
            times = {name: values for name, values in times.items() if found[name].status == "measured"}
            _recover()
    return times


def rounds_for(round_ms: float, seconds: float) -> int:
    """As many rounds as fit the time, at least MIN_ROUNDS and at most MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds * 1e3 / max(round_ms, 1e-3))))


def relative_errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Norm of the difference over norm of the truth, for each result; NaN where a result is not finite."""
    errors = []
    for result, truth in zip(results, expected, strict=False):
        if result.shape != truth.shape:
            raise ValueError(f"a result is {list(result.shape)}, the truth {list(truth.shape)}")
        norm = torch.linalg.vector_norm(truth)
        errors.append((torch.linalg.vector_norm(result.double() - truth) / norm).item())
    return errors


def _fill(measurement: Measurement, times: list[float], case: Case, ceilings: Ceilings) -> None:
    measurement.ms_of_rounds = times
    measurement.ms = statistics.median(times)
    seconds = measurement.ms / 1e3
    if case.flops:
        measurement.tflops = case.flops / seconds / 1e12
        measurement.share = measurement.tflops / ceilings.matmul_tflops
    if case.bytes:
        measurement.gbps = case.bytes / seconds / 1e9
        if not case.flops:
            measurement.share = measurement.gbps / ceilings.copy_gbps


def _fail(measurement: Measurement, error: Exception) -> None:
    text = str(error).strip()
    measurement.status = "failed"
    measurement.reason = f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"
    if device_lost():
        raise DeviceLostError(measurement) from error
