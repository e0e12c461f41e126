"""A pytest plugin, `-p benchmarks.recorder --record FILE`: one JSON line a test, written as soon as it ends.

So what a run found out is there even if the run is killed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="append a JSON line a test to this file")


def pytest_configure(config):
    if config.getoption("record") is not None:
        config.pluginmanager.register(Recorder(config.getoption("record")))


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def write(self, **line: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl
    def pytest_collectreport(self, report):
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", reason=last_line(report.longreprtext))

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return  # setting up and tearing down are reported where they fail or skip
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.skipped and isinstance(report.longrepr, tuple):
            line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            line["reason"] = last_line(report.longreprtext)
        line |= {name: value for name, value in report.user_properties if name == "measurement"}
        self.write(**line)


def last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in text.strip().splitlines()]
    raised = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (raised or lines or ["no message"])[0 if raised else -1][:300]
