"""Fixtures and hooks of the benchmarks: a test measures one provider of a case, with pytest-benchmark."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable
from functools import partial

import pytest
import torch

from benchmarks.device import default_device, measure_ceilings
from benchmarks.measure import Case, Moment, Row, device_lost, for_json, measure_provider
from benchmarks.tables import rate_table

ROW = pytest.StashKey[Row]()
TIMED = pytest.StashKey[list[Row]]()


def pytest_configure(config):
    config.stash[TIMED] = []


def pytest_collection_modifyitems(items):
    timer = Moment if torch.cuda.is_available() else time.perf_counter
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=timer))
            item.add_marker(pytest.mark.filterwarnings("default"))  # a peer's warning is not our failure


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="session")
def ceilings(device) -> dict[str, float]:
    return measure_ceilings(device)


@pytest.fixture(scope="session")
def cases() -> dict[tuple[Hashable, ...], Case]:
    """The last test's case; the next provider's test reuses its inputs and truth."""
    return {}


@pytest.fixture
def measure(request, device, ceilings, cases, record_property):
    """measure(make_case, *args): measure the provider that the test's parameter `provider` names.

    The case is made by `make_case(*args, device)`, once for tests that follow one another.
    """

    def repeat(row, function, setup, rounds):
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group, benchmark.extra_info = f"{row['op']} {row['size']}", row
        benchmark.pedantic(function, setup=setup, rounds=rounds)
        return [] if benchmark.disabled else benchmark.stats.stats.data

    def measure_one(make_case: Callable[..., Case], *args: Hashable) -> None:
        if (make_case, *args) not in cases:
            cases.clear()
        gc.collect()  # frees memory that a failed provider's traceback holds
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a provider starts from unbroken memory
        if not cases:
            cases[make_case, *args] = make_case(*args, device)
        case, name = cases[make_case, *args], request.node.callspec.params["provider"]
        row = request.node.stash[ROW] = case.row(name)
        record_property("measurement", row)
        if (reason := case.providers[name].missing) is not None:
            row |= {"status": "missing", "reason": reason}
        else:
            measure_provider(case, name, row, partial(repeat, row), device, ceilings)
        row |= for_json(row)
        if "ms" in row:
            request.config.stash[TIMED].append(row)
        if row["status"] == "wrong" and row["kind"] == "ours":
            pytest.fail(f"{name} wrong: {row['reason']}", pytrace=False)
        if row["status"] != "measured":
            pytest.skip(f"{name} {row['status']}: {row['reason']}")

    return measure_one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Put a provider's error, out of memory or other, into its row; a failed peer is a skipped test."""
    report = yield
    row = item.stash.get(ROW, None)
    if call.when != "call" or row is None or not report.failed or row.get("status") == "wrong":
        return report
    text = str(call.excinfo.value).strip() or "no message"
    row |= {"status": "failed", "reason": f"{call.excinfo.typename}: {text.splitlines()[0][:300]}"}
    row |= for_json(row)
    if device_lost():
        report.longrepr = f"{row['provider']} left the GPU unusable: {row['reason']}"
    elif row["kind"] != "ours":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {row['provider']} failed: {row['reason']}")
    return report


def pytest_terminal_summary(terminalreporter, config):
    """Figures for which pytest-benchmark's own table has no column."""
    rows = config.stash[TIMED]
    if not rows:
        return
    terminalreporter.section("share of the ceiling, peak of memory, error against float64", sep="-")
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else ""
        error = f"{row['error']:.0e}" if "error" in row else ""
        figures = f"{share:>5}{row['peak_mib']:>12,.1f} MiB{error:>8}"
        terminalreporter.line(f"{figures}  {row['op']}, {row['size']}: {row['provider']}")
    for line in rate_table(rows):
        terminalreporter.line(line)
