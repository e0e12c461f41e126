"""Measures everything on a machine with a GPU, in calls of five minutes: `make gpu`.

A call runs stages one after another, each in its own processes, until `--deadline` seconds are over, its own
start included. The next call goes on with what is missing, so no result is measured twice. `--stages` names
stages, or one of the sets: `one` (ceilings, build, every op compared with float64, suspects, every kernel
timed, launch rows tried), `two` (the training step, all tests, compute-sanitizer, peers) and `three` (the
rest). The default is all. `python3 -m benchmarks.gpu --stages one` is the same without make.

It runs from a checkout, with nothing installed but torch, triton, pytest and pytest-benchmark; a stage that
needs more is skipped, and the record names what is missing. Without nvcc or pybind11 nothing is built, and an
extension that is there already is used.

What the stages find goes at once into `lines/` under `--out`, so a kill loses at most the test that it
interrupts. A stage's lines are kept under a digest of its sources: once these change, it is missing again.
After each stage all lines are merged into one record, `<device>-<commit>.json`. A stage whose estimate is
more than the time left is not begun, and one that outlasts its time is stopped; the record says so. A test
that kills its process or leaves the GPU unusable is recorded as failed, and another process goes on.

Exit code 0: all that was asked for is done. 1: something failed. 3: something was left out; call again.
2: no GPU, or a mistake. `--device cpu` rehearses on a CPU, at small sizes, and its record says that.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import read_stage, write_line
from benchmarks.processes import Run, run_stage
from benchmarks.records import (
    RESULTS,
    Record,
    device_slug,
    digest,
    git_state,
    now,
    read_results,
    record_name,
    stage_line,
    summary,
)
from benchmarks.stages import SETS, STAGES, WHEELS, Stage
from geo_r1.errors import MISTAKE, UserError, say
from geo_r1.files import write_text

DEADLINE_SECONDS = 300.0
MARGIN_SECONDS = 1.5  # of a deadline, for the record
BETWEEN_SECONDS = 1.0  # left for what lies between a stage that took all its time and the next
CPU_PATIENCE = 4.0  # the full sizes of a CPU get this many times the time
FAILED, LEFT_OUT = 1, 3  # our exit codes
DONE = ("ok", "failed", "skipped")  # a stage that ended so is not missing


def main(
    argv: Sequence[str] | None = None,
    stages: Mapping[str, Stage] = STAGES,
    sets: Mapping[str, Sequence[str]] = SETS,
) -> int:
    """Run the stages and write the record; returns the exit code."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the record (%(default)s); created if missing"
    )
    parser.add_argument("--commit", help="name of the commit, for a checkout without .git")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--full", action="store_true", help="with --device cpu: no rehearsal, a CPU's sizes")
    parser.add_argument("--stages", help=f"only these, of {','.join((*sets, *stages))}; default: all")
    parser.add_argument("--again", action="store_true", help="run stages that are done, too")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_SECONDS, help="seconds for this call (%(default).0f)"
    )
    options = parser.parse_args(argv)
    try:
        names = choose(options.stages, stages, sets)
        check_writable(options.out / "lines")
        with only_call(options.out / "lines"):
            return Call(options, stages, begin + options.deadline - MARGIN_SECONDS).run(names)
    except UserError as error:
        say(error)
        return MISTAKE


def choose(asked: str | None, stages: Mapping[str, Stage], sets: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of stages, each once, sets replaced by theirs."""
    names = list(stages) if asked is None else asked.split(",")
    if unknown := [name for name in names if name not in stages and name not in sets]:
        known = ", ".join((*sets, *stages))
        raise UserError(f"--stages: there is no {unknown[0]}; sets and stages are {known}")
    return list(dict.fromkeys(stage for name in names for stage in sets.get(name, [name])))


class Call:
    """One call: what it knows of the machine and what it left out."""

    def __init__(self, options: argparse.Namespace, stages: Mapping[str, Stage], deadline: float) -> None:
        self.options, self.stages, self.deadline = options, stages, deadline
        self.lines = options.out / "lines"
        self.rehearsal = options.device == "cpu" and not options.full
        self.patience = CPU_PATIENCE if options.full else 1.0
        self.commit, self.dirty = (options.commit, None) if options.commit else git_state()
        if self.commit == "unknown":
            print("no git here: the record's commit is unknown; --commit names it", flush=True)
        self.left_out: dict[str, dict[str, Any]] = {}  # stages that this call did not begin, with the reason
        self.device: list[dict[str, Any]] = []  # lines
        self.digests: dict[tuple[str, tuple], str] = {}

    def run(self, names: Sequence[str]) -> int:
        """Run stages and merge after each; returns the exit code."""
        names = list(dict.fromkeys(["device", *names]))  # it names the record
        if self.rehearsal:
            print("A rehearsal on a CPU: none of its figures is a GPU's.", flush=True)
        for index, name in enumerate(names):
            before = time.monotonic()
            if not self.begin(name, sum(self.seconds(later) for later in names[index + 1 :])):
                print(f"{name}: done before", flush=True)
                continue
            record = self.record()
            if name == "device":
                check_device(record)
            path = self.options.out / record_name(record)
            write_text(path, json.dumps(record, indent=1) + "\n")
            part = record["parts"][self.stages[name].name]
            print(f"{name}: {summary(part)}, {time.monotonic() - before:.0f} s", flush=True)
        record = self.record()
        write_text(path, json.dumps(record, indent=1) + "\n")
        parts = {name: record["parts"][self.stages[name].name] for name in names}
        print(*(f"{name}: {summary(part)}" for name, part in parts.items()), sep="\n")
        for row in record["launches"]:
            other = (
                f"; {row['best']}: {row['best_ms']:.4g} ms" if row["best_ms"] < row["ms"] else ", the fastest"
            )
            print(f"launch row {row['row']}: {row['ms']:.4g} ms{other}")
        if record["wheels not found"]:
            print(f"Wheels that stages would use, not found: {', '.join(record['wheels not found'])}")
        print(f"record: {path}{', of a rehearsal' * self.rehearsal}", flush=True)
        if any(part["status"] == "failed" or "failures" in part for part in parts.values()):
            return FAILED
        return 0 if all(part["status"] in DONE for part in parts.values()) else LEFT_OUT

    def begin(self, name: str, later_seconds: float) -> bool:
        """Run a stage if it is missing, or note why it is left out; False if it was done before.

        Args:
            later_seconds: what the stages after it are estimated to need.
        """
        stage, stem = self.stages[name], self.stem(name)
        left, need = self.deadline - time.monotonic(), self.seconds(name)
        if stage.always or self.options.again:
            for file in self.lines.glob(f"{stem.relative_to(self.lines)}.*"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        lines = read_stage(stem.with_name(f"{stem.name}.0.jsonl"))
        if stage_line(lines).get("status") in DONE:
            return False
        if missing := [package for package in stage.needs if importlib.util.find_spec(package) is None]:
            reason = f"not installed: {', '.join(missing)}"
            self.left_out[name] = {"status": "skipped", "reason": reason}
        elif left < (need / 2 if lines else need):
            reason = f"needs about {need:.0f} s, and {max(0.0, left):.0f} s were left"
            self.left_out[name] = {"status": "not run", "reason": reason}
        else:
            granted = min(left, max(need, left - later_seconds - BETWEEN_SECONDS))
            run = Run(stem, granted, self.options.device, self.rehearsal)
            run.stem.parent.mkdir(exist_ok=True)
            begin = time.monotonic()
            part = run_stage(stage, run)
            part["seconds"] = round(time.monotonic() - begin + stage_line(lines).get("seconds", 0.0), 1)
            write_line(run.file(0), stage={**part, "commit": self.commit, "date": now()})
            if stage.always:
                self.device += read_stage(run.file(0))
        return True

    def seconds(self, name: str) -> float:
        return self.patience * self.stages[name].seconds

    def stem(self, name: str) -> Path:
        """Where a stage's lines are: by device, and by all that decides its results."""
        if self.stages[name].always:
            return self.lines / name
        facts = self.facts()["device"]
        state = (facts.get("extension"), *(facts["versions"].get(x) for x in ("torch", "triton")))
        if (name, state) not in self.digests:  # read once, even if a source changes during the call
            self.digests[name, state] = digest(self.stages[name], state)
        folder = device_slug(facts) + "-rehearsal" * self.rehearsal
        return self.lines / folder / f"{name}-{self.digests[name, state]}"

    def facts(self) -> Record:
        """A record that holds only what its device says."""
        record: Record = {"device": {}, "ceilings": {}, "measurements": [], "launches": []}
        read_results(self.device, record)
        return record

    def record(self) -> Record:
        """All lines of the stages' present sources, merged."""
        record = {
            "date": now(),
            "commit": self.commit,
            "dirty": self.dirty,
            "rehearsal": self.rehearsal,
            "parts": {stage.name: {"status": "not run"} for stage in self.stages.values()},
            "wheels not found": [
                f"{wheel} ({size})"
                for module, (wheel, size) in WHEELS.items()
                if importlib.util.find_spec(module) is None
            ],
            **self.facts(),
        }
        if not record["device"]:
            return record | {"parts": {"device": stage_line(self.device)}}
        for name, stage in self.stages.items():
            lines = read_stage(self.stem(name).with_name(f"{self.stem(name).name}.0.jsonl"))
            if lines:
                stopped = {"status": "stopped", "reason": "its call was ended; the next one goes on"}
                record["parts"][stage.name] = (stage_line(lines) or stopped) | read_results(lines, record)
            if name in self.left_out:
                record["parts"][stage.name] |= self.left_out[name]
        return record


def check_device(record: Record) -> None:
    """Raises UserError: there is no GPU."""
    part = record["parts"]["device"]
    if part.get("exit_code") == 2 or part["status"] == "skipped" or not record["device"]:
        reason = part.get("reason") if part["status"] == "skipped" else "torch sees none here"
        raise UserError(f"make gpu needs a GPU, torch and triton: {reason}")


@contextlib.contextmanager
def only_call(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. It ends with the process, however that ends.

    Raises:
        UserError: another call holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another make gpu is at work; --out names another folder") from error
        yield


def check_writable(folder: Path) -> None:
    """Create a folder if it is missing.

    Raises:
        UserError: no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"make gpu cannot write its record: {folder}: {error.strerror}; --out names another folder"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
