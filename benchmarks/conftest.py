"""How benchmarks meet pytest and pytest-benchmark.

A case is measured once, all chosen providers in turns (see `measure.py`); each provider's test then reports
its part. pytest-benchmark replays the repetitions from a clock of ours, so that its table, JSON, history
(`--benchmark-autosave`) and comparison (`--benchmark-compare`) show what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.device import default_device, measure_ceilings
from benchmarks.measure import Case, Ceilings, DeviceLostError, Measurement, Provider, compare
from benchmarks.rates import HEADER, rate_rows

REPORTED = pytest.StashKey[list[Measurement]]()


class Replay:
    """A clock that stands still, and is moved by the repetitions it plays."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, milliseconds: Sequence[float]) -> Callable[[], None]:
        left = iter(milliseconds)

        def repetition() -> None:
            self.now += next(left, 0.0) / 1e3

        return repetition


REPLAY = Replay()


def pytest_configure(config):
    config.stash[REPORTED] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))
            item.add_marker(pytest.mark.filterwarnings("default"))  # what peers warn of is not our failure


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="session")
def ceilings(device) -> Ceilings:
    return measure_ceilings(device)


@pytest.fixture(scope="session")
def measured() -> dict[tuple[str, str], dict[str, Measurement] | str]:
    """Every case so far, by test and size: what was measured, or why nothing could be."""
    return {}


@pytest.fixture
def report(request, device, ceilings, measured, record_property):
    """report(make_case): measure the test's case unless that is done, and report the test's provider.

    The test has parameters `size` and `provider` (a name). `make_case` returns (case, providers, truth), as
    `compare` takes them; it is called for the first provider of a case only.
    """

    def report_one(make_case: Callable[[], tuple[Case, Sequence[Provider], Callable[[], Sequence[Tensor]]]]):
        test, params = request.node.originalname, request.node.callspec.params
        key = (test, str(params["size"]))
        if isinstance(measured.get(key), str):
            pytest.fail(measured[key], pytrace=False)
        if key not in measured:
            measured[key] = f"{test}, {key[1]}: inputs or truth failed, see the first provider's test"
            chosen = {
                item.callspec.params["provider"]: item.nodeid
                for item in request.session.items
                if getattr(item, "originalname", None) == test
                and item.callspec.params["size"] == params["size"]
            }
            case, providers, truth = make_case()
            providers = [p for p in providers if p.name in chosen]
            try:
                measured[key] = compare(case, providers, truth, device, ceilings)
            except DeviceLostError as error:  # the recorder ends this process, another goes on without it
                record_property("measurement", error.measurement.as_dict())
                record_property("culprit", chosen[error.measurement.provider])
                pytest.fail(str(error), pytrace=False)
        measurement = measured[key][params["provider"]]
        record_property("measurement", measurement.as_dict())
        request.config.stash[REPORTED].append(measurement)
        if measurement.status in ("wrong", "failed") and measurement.kind == "ours":
            pytest.fail(f"{measurement.provider} {measurement.status}: {measurement.reason}", pytrace=False)
        if measurement.status != "measured":
            pytest.skip(f"{measurement.provider} {measurement.status}: {measurement.reason}")
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{measurement.op} {measurement.size}"
        benchmark.extra_info |= measurement.as_dict()
        times = measurement.ms_of_rounds
        benchmark.pedantic(REPLAY.play(times), rounds=len(times))

    return report_one


def pytest_terminal_summary(terminalreporter, config):
    """A table a case: time, distance from the fastest of ours, rates, memory, error."""
    cases: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in config.stash[REPORTED]:
        cases.setdefault((measurement.op, measurement.size), []).append(measurement)
    for (op, size), measurements in cases.items():
        terminalreporter.section(f"{op}, {size}", sep="-")
        for line in table(measurements):
            terminalreporter.line(line)
    if rates := rate_rows([m.as_dict() for m in config.stash[REPORTED]]):
        terminalreporter.section("rates of the training step, and shares of its time", sep="-")
        for line in aligned([list(HEADER), *rates]):
            terminalreporter.line(line)


def table(measurements: Sequence[Measurement]) -> list[str]:
    """Aligned columns; "x ours" is the time over that of the fastest of ours."""
    ours = min((m.ms for m in measurements if m.kind == "ours" and m.ms is not None), default=None)
    rows = [["provider", "ms", "x ours", "TFLOP/s", "GB/s", "of ceiling", "peak MiB", "error"]]
    for m in measurements:
        if m.ms is None:
            rows.append([m.provider, f"{m.status}: {m.reason}"])
            continue
        cells = (
            (m.ms, "{:.3f}"),
            (m.ms / ours if ours else None, "{:.2f}"),
            (m.tflops, "{:.4g}"),
            (m.gbps, "{:.4g}"),
            (m.share, "{:.0%}"),
            (m.peak_mib, "{:.1f}"),
            (m.error, "{:.1e}"),
        )
        rows.append([m.provider, *("" if value is None else form.format(value) for value, form in cells)])
    return aligned(rows)


def aligned(rows: Sequence[list[str]]) -> list[str]:
    """Columns to the right, the first to the left; a row of two cells is a name and what there is to say."""
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        rest = (
            [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            if len(row) > 2
            else row[1:]
        )
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return lines
