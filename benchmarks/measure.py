"""Check and time one provider of a case; a provider is one way to do a piece of work.

    TFLOP/s = operations / seconds / 1e12;  GB/s = bytes / seconds / 1e9;  share = rate / ceiling of this run

Only the operations and bytes that the work needs are counted (each input read once), the same for every
provider, so a provider that recomputes is slower, not busier. A provider is first run once and compared with
a float64 truth: a wrong one is not timed. pytest-benchmark then repeats it, and the median counts. On a GPU
its timer is a pair of CUDA events: before each repetition the L2 cache is overwritten, and the stream is held
back for as long as the host needs to enqueue the work.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from geo_r1.kernels import available_impls

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of most cases
MIN_ROUNDS, MAX_ROUNDS = 5, 50
ROUNDS_SECONDS = {"cuda": 0.5, "cpu": 0.25}  # for all rounds of a provider
MAX_HOLD_MS = 20.0  # a step that enqueues for a second hides nothing
CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one holds the stream back for longer
MIB = 2**20
PHASES = ("vision", "text", "loss", "backward")  # of a training step; see `steps.PhaseClock`
STEP, SCALING = "training step", "training step, scaling"  # the ops that `results.py` treats separately

Tensors = tuple[Tensor, ...]
Row = dict[str, Any]  # a measurement, as a record holds it
Repeat = Callable[..., list[float]]  # repeat(function, setup, rounds): seconds of each round


def nothing() -> None:
    """The `prepare` of functions that leave their inputs unchanged."""


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        build: makes the measured function, with the imports it needs. The function returns its results.
        kind: "ours", "peer", or "floor": a part of the work that no provider can do without, whose results
            are not compared.
        missing: why it cannot run here, None if it can.
        unpack: brings results into the truth's form, untimed. There may be fewer than in the truth.
        prepare: called before each repetition, untimed, to restore overwritten inputs.
        facts: further figures, read once the provider has been timed.
    """

    build: Callable[[], Callable[[], Tensors]]
    kind: str = "peer"
    missing: str | None = None
    unpack: Callable[[Tensors], Sequence[Tensor]] = tuple
    prepare: Callable[[], object] = nothing
    facts: Callable[[], Mapping[str, float]] = dict


@dataclass
class Case:
    """One piece of work.

    Attributes:
        op: name of the op.
        size: the sizes in words; a case's name within its op.
        dtype: of the inputs.
        tolerance: the largest relative error, by norm, of any result.
        providers: by name.
        truth: makes the float64 results from the same input values; None compares nothing.
        flops: operations the work needs, 0 if it is bound by bytes.
        bytes: each input and result counted once.
        hold: hold the stream back while the host enqueues; False for a step, whose host time counts.
        rounds: repetitions of each provider; None: as many as fit ROUNDS_SECONDS.
        facts: further figures of the work, carried into every row.
    """

    op: str
    size: str
    dtype: torch.dtype
    tolerance: float
    providers: Mapping[str, Provider]
    truth: Callable[[], Sequence[Tensor]] | None
    flops: float = 0.0
    bytes: float = 0.0
    hold: bool = True
    rounds: int | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def expected(self) -> Sequence[Tensor] | None:
        return None if self.truth is None else self.truth()

    def row(self, name: str) -> Row:
        """A provider's row before it has run."""
        dtype = str(self.dtype).removeprefix("torch.")
        row = {"op": self.op, "size": self.size, "dtype": dtype, "provider": name}
        return {**row, "kind": self.providers[name].kind, "facts": dict(self.facts)}


class Moment:
    """A GPU's timer for pytest-benchmark: `end - start` waits for both and is the seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: Moment) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_lost() -> bool:
    """True if an error, such as an illegal address, has left the GPU unusable for this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure_provider(
    case: Case, name: str, row: Row, repeat: Repeat, device: torch.device, ceilings: Mapping[str, float]
) -> None:
    """Check a provider, time it unless it is wrong, and put its figures into its row.

    Args:
        ceilings: `matmul_tflops` and `copy_gbps` of this run.
    """
    function = check(case, name, row, device)
    if function is None:
        return
    times = [1e3 * seconds for seconds in time_provider(case, name, row, function, repeat, device)]
    row["facts"] |= case.providers[name].facts()
    if not times:  # pytest-benchmark was told not to measure
        return
    row |= {"ms": statistics.median(times), "rounds": len(times), "ms_range": [min(times), max(times)]}
    seconds = row["ms"] / 1e3
    if case.bytes:
        row["gbps"] = case.bytes / seconds / 1e9
        row["share"] = row["gbps"] / ceilings["copy_gbps"]
    if case.flops:
        row["tflops"] = case.flops / seconds / 1e12
        row["share"] = row["tflops"] / ceilings["matmul_tflops"]


def check(case: Case, name: str, row: Row, device: torch.device) -> Callable[[], Tensors] | None:
    """Run a provider to find its errors and its peak memory, above inputs and results.

    Returns:
        The function to time; None if its results are wrong.
    """
    provider = case.providers[name]
    expected = None if provider.kind == "floor" else case.expected
    function = provider.build()
    if case.rounds is None:  # the first run compiles, and takes memory that later ones do not
        provider.prepare()
        function()
    provider.prepare()
    results, peak_bytes = run_for_peak(function, device)
    row |= {"status": "measured", "peak_mib": peak_bytes / MIB}
    if expected is None:
        return function
    row["errors"] = errors = relative_errors(provider.unpack(results), expected)
    row["error"] = math.nan if any(map(math.isnan, errors)) else max(errors)
    if row["error"] <= case.tolerance:
        return function
    row |= {"status": "wrong", "reason": f"error {row['error']:.1e} is over {case.tolerance:.0e}"}
    return None


def time_provider(
    case: Case, name: str, row: Row, function: Callable[[], Tensors], repeat: Repeat, device: torch.device
) -> list[float]:
    """Seconds of each round."""
    provider, rounds, host_ms, on_gpu = case.providers[name], case.rounds, 0.0, device.type == "cuda"
    if rounds is None:
        provider.prepare()
        synchronize(device)
        begin = time.perf_counter()
        function()
        row["host_ms"] = host_ms = (time.perf_counter() - begin) * 1e3
        synchronize(device)
        rounds = rounds_for((time.perf_counter() - begin) * 1e3, ROUNDS_SECONDS[device.type])
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def setup() -> None:
        provider.prepare()
        if on_gpu:
            flush.zero_()
            if case.hold:
                torch.cuda._sleep(int(min(1.5 * host_ms, MAX_HOLD_MS) * CYCLES_PER_MS))

    return repeat(function, setup, rounds)


def for_json(value: Any) -> Any:
    """Floats with six digits; NaN, which JSON lacks, as text; no empty entries."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [for_json(entry) for entry in value]
    if isinstance(value, dict):
        return {name: for_json(entry) for name, entry in value.items() if entry not in (None, [], {})}
    return value


def rounds_for(round_ms: float, seconds: float) -> int:
    """As many rounds as fit the time, at least MIN_ROUNDS and at most MAX_ROUNDS."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds * 1e3 / max(round_ms, 1e-3))))


def relative_errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Norm of the difference over norm of the truth, for each result; NaN if a result is not finite."""
    errors = []
    for result, truth in zip(results, expected, strict=False):
        if result.shape != truth.shape:
            raise ValueError(f"a result is {list(result.shape)}, the truth {list(truth.shape)}")
        norm = torch.linalg.vector_norm(truth)
        errors.append((torch.linalg.vector_norm(result.double() - truth) / norm).item())
    return errors


def run_for_peak(function: Callable[[], Tensors], device: torch.device) -> tuple[Tensors, int]:
    """Results, and peak bytes allocated, less the bytes from before and those of the results."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = function()
        torch.cuda.synchronize(device)
        return results, torch.cuda.max_memory_allocated(device) - before - bytes_of(results)
    # acc_events: torch 2.11 warns if it is not set
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        results = function()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return results, peak - bytes_of(results)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def why_missing(package: str) -> str | None:
    """None if a peer's package can be imported and run here, else the reason."""
    with suppress(ModuleNotFoundError):  # of the package around it
        if importlib.util.find_spec(package) is not None:
            return None if ON_GPU else f"{package} needs a GPU"
    return f"{package} is not installed"


def why_not_compiled() -> str | None:
    """None if torch.compile is timed here; on a CPU compiling takes too long for such small sizes."""
    return None if ON_GPU else "torch.compile is timed on a GPU only"


def floor(run: Callable[[], Tensors]) -> Provider:
    return Provider(lambda: run, kind="floor")


def torch_ways(
    function: Callable[..., Any], args: Tensors, finish: Callable[[Any], Tensors]
) -> dict[str, Provider]:
    """Plain torch, eager and compiled: `finish(function(*args))` gives the results."""

    def build(function: Callable[..., Any]) -> Callable[[], Tensors]:
        return lambda: finish(function(*args))

    return {
        "eager torch": Provider(lambda: build(function)),
        "compiled torch": Provider(
            lambda: build(torch.compile(function, dynamic=False)), missing=why_not_compiled()
        ),
    }


def ours(op: str, build: Callable[[str], Callable[[], Tensors]], **options: Any) -> dict[str, Provider]:
    """A provider for each of our implementations of an op; `build` makes its function from its name."""
    return {
        name: Provider(partial(build, impl), kind="ours", **options) for name, impl in our_names(op).items()
    }


def our_names(op: str) -> dict[str, str]:
    """Our implementations by provider's name; on a CPU only the reference, since the others are emulated."""
    impls = available_impls()[op]
    return {f"geo_r1 {i}": i for i in impls if ON_GPU or i == "reference"}
