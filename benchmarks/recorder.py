"""A pytest plugin, `-p benchmarks.recorder --record FILE`: one JSON line per test, written when it ends.

So a run that is killed loses only its last test. A run leaves out the tests that the stage's lines, those of
all its processes, show as settled. A run whose GPU has become unusable ends at once, with exit code LOST.
`--share 2/8` takes every eighth test, from the third on; `--every 40` every fortieth, before they are shared.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lines import LOST, read_stage, settled, write_line


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, required=True, help="append a JSON line per test to this file")
    parser.addoption("--share", default="0/1", help="i/n: n processes share the tests, and this is the i-th")
    parser.addoption("--every", type=int, default=1, help="take only every n-th test")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config.getoption("record")), "recorder")


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = settled(read_stage(path))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        index, count = map(int, config.getoption("share").split("/"))
        mine = items[:: config.getoption("every")][index::count]
        chosen = [item for item in mine if item.nodeid not in self.before]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collectreport(self, report):
        if report.failed:
            reason = last_line(report.longreprtext)
            write_line(self.path, test=report.nodeid, outcome="failed", reason=reason)

    def pytest_runtest_logstart(self, nodeid):
        write_line(self.path, begun=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return  # set-up and tear-down count only if they fail or skip
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.skipped and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            line["reason"] = last_line(report.longreprtext)
        line |= dict(report.user_properties)  # a measurement, or what a check found
        write_line(self.path, **line)
        if not report.passed and lost():
            pytest.exit("the GPU is unusable for this process", LOST)


def lost() -> bool:
    from benchmarks import measure  # imported late, since it imports torch

    return measure.device_lost()


def last_line(text: str) -> str:
    """The line of a traceback that holds the error."""
    lines = [line.strip() for line in text.strip().splitlines()]
    raised = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (raised or lines or ["no message"])[0 if raised else -1][:300]
