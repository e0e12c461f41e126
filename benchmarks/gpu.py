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
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.lines import LOST, die_with_parent, read_lines, read_stage, settled, unfinished, write_line
from benchmarks.stages import SETS, STAGES, WHEELS, Stage
from geo_r1.errors import MISTAKE, UserError, say
from geo_r1.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEADLINE_SECONDS = 300.0
MARGIN_SECONDS = 1.5  # of a deadline, for the record
BETWEEN_SECONDS = 1.0  # left for what lies between a stage that took all its time and the next
GRACE_SECONDS = 8.0  # between asking a stage to stop and killing it; part of its time
TAIL_LINES = 20  # of a failed stage's output, kept in the record
CPU_PATIENCE = 4.0  # the full sizes of a CPU get this many times the time
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".toml")  # of sources
NO_TESTS = 5  # pytest's exit code, also if all tests are settled
FAILED, LEFT_OUT = 1, 3  # our exit codes
DONE = ("ok", "failed", "skipped")  # a stage that ended so is not missing
Record = dict[str, Any]


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


@dataclass(frozen=True)
class Run:
    """How a stage is to run: `stem` names its files of lines, `seconds` is its time."""

    stem: Path
    seconds: float
    device: str
    rehearsal: bool = False

    def file(self, process: int, suffix: str = "jsonl") -> Path:
        return self.stem.with_name(f"{self.stem.name}.{process}.{suffix}")


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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def stage_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was written when the stage last ended; empty if it never did."""
    return next((line["stage"] for line in reversed(lines) if "stage" in line), {})


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


def digest(stage: Stage, state: Sequence[object]) -> str:
    """Of a stage's arguments, of its sources and the files that the arguments name, and of a state."""
    total = hashlib.sha256(json.dumps([stage.arguments, *state]).encode())
    words = [word for word in stage.arguments if re.fullmatch(r"[\w./-]+", word)]
    for word in (*stage.sources, *words, *(f"{word.replace('.', '/')}.py" for word in words)):
        path = ROOT / word
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.suffix in SUFFIXES and file.is_file():
                total.update(os.path.relpath(file, ROOT).encode() + file.read_bytes())
    return total.hexdigest()[:8]


def run_stage(stage: Stage, run: Run) -> dict[str, Any]:
    """Run one stage; returns how it ended."""
    count = min(stage.processes, os.cpu_count() or 1)
    files = [run.file(share) for share in range(count)]
    logs = [run.file(share, "log") for share in range(count)]
    commands = []
    for share, file in enumerate(files):
        fields = {"record": file, "device": run.device, "share": f"{share}/{count}"}
        words = (*stage.arguments, *(stage.rehearsal if run.rehearsal else ()))
        commands.append([sys.executable, *(Template(x).safe_substitute(fields) for x in words)])
        logs[share].unlink(missing_ok=True)
    deadline = time.monotonic() + run.seconds
    codes: list[int | None] = [None] * count
    left, settled_before = list(range(count)), -1
    while left and (now_settled := len(settled(read_stage(files[0])))) > settled_before:
        settled_before = now_settled
        ended = run_until(
            [commands[i] for i in left], [logs[i] for i in left], deadline, environment(run.device, count)
        )
        for i, code in zip(left, ended, strict=True):
            codes[i] = code
            if code is not None and code < 0:
                own = read_lines(files[i])
                last = [line["begun"] for line in own if "begun" in line][-1:]
                for test in unfinished(own) & set(last):
                    reason = f"its process died of {signal.Signals(-code).name}"
                    write_line(files[i], test=test, outcome="failed", reason=reason)
        left = [i for i in left if (code := codes[i]) is not None and (code < 0 or code == LOST)]
    lines = read_stage(files[0])
    outputs = [log.read_text(encoding="utf-8", errors="replace").splitlines() for log in logs]
    print(*(line for output in outputs for line in output), sep="\n", flush=True)
    failures = [line for line in lines if line.get("outcome") == "failed"]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    ended_well = (0, NO_TESTS) if settled(lines) else (0,)
    bad = [code for code in codes if code is not None and code not in ended_well]
    result: dict[str, Any] = {"status": "ok"}
    if skipped and not bad:
        result = {"status": "skipped", "reason": skipped[-1]}
    elif None in codes:
        result = {"status": "out of time", "reason": f"stopped after {run.seconds:.0f} s"}
    elif bad or failures:
        reason = f"{len(failures)} failed" if failures else f"exit code {bad[0]}"
        result = {"status": "failed", "reason": reason, **({"exit_code": bad[0]} if bad else {})}
    if result["status"] in ("failed", "out of time"):
        worst = next((i for i, code in enumerate(codes) if code not in ended_well), 0)
        result["output"] = outputs[worst][-TAIL_LINES:]
    if metrics := read_lines(Path(f"{files[0]}.run") / "metrics.jsonl"):  # of a run of the trainer
        result["metrics"] = {line["stage"]: line for line in metrics if "stage" in line}
    return result


def environment(device: str, processes: int) -> dict[str, str]:
    """Hides the GPU from a stage on a CPU; processes that run side by side share the cores."""
    found = dict(os.environ)
    found.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark times nothing in such a worker
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
        found["TRITON_INTERPRET"] = str(int(interpreter_runs()))
    if processes > 1:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return found


def interpreter_runs() -> bool:
    """Triton 3.6's interpreter fails with NumPy 2.4, on a range with a bound known only at run time."""
    triton, numpy = ([int(x) for x in version(name).split(".")[:2]] for name in ("triton", "numpy"))
    return triton >= [3, 7] or numpy < [2, 4]


def run_until(
    commands: Sequence[list[str]], logs: Sequence[Path], deadline: float, environment: dict[str, str]
) -> list[int | None]:
    """Exit codes of commands that run side by side; None if one had to be stopped at the deadline."""
    running, begin = [], time.monotonic()
    for command, log in zip(commands, logs, strict=True):
        with log.open("ab") as out:
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": subprocess.STDOUT,
            }
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
                **streams,
            )
        running.append(process)
    try:
        grace = min(GRACE_SECONDS, (deadline - begin) / 5)
        codes = wait_for(running, deadline - grace)
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # pytest then still writes what it has
        wait_for(running, deadline)
        return codes
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(running: Sequence[subprocess.Popen], deadline: float) -> list[int | None]:
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    return [process.poll() for process in running]


def read_results(lines: Sequence[dict[str, Any]], record: Record) -> dict[str, Any]:
    """Counts of tests, failures, reasons for skips; device, ceilings and measurements go to the record."""
    ended: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "device" in line:
            versions = record["device"].get("versions", {}) | line["device"]["versions"]
            record["device"] |= line["device"] | {"versions": versions}
            record["ceilings"] |= line.get("ceilings", {})
        if "test" in line:
            ended[line["test"]] = ended.get(line["test"], {}) | line
    for test in sorted(settled(lines) - ended.keys()):
        ended[test] = {"outcome": "failed", "reason": "did not end"}
    rows = [line["measurement"] for line in ended.values() if "measurement" in line]
    again = [case_of(row) for row in rows]
    record["measurements"] = [row for row in record["measurements"] if case_of(row) not in again] + rows
    record["launches"] += best_launches([line["trial"] for line in ended.values() if "trial" in line])
    counts = Counter(line["outcome"] for line in ended.values())
    skipped = Counter(line.get("reason", "") for line in ended.values() if line["outcome"] == "skipped")
    result: dict[str, Any] = {
        "tests": dict(counts),
        "skipped": dict(skipped),
        "failures": {test: line["reason"] for test, line in ended.items() if line["outcome"] == "failed"},
        "found": {test: line["found"] for test, line in ended.items() if "found" in line},
    }
    return {name: value for name, value in result.items() if value}


def best_launches(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each launch row that was tried: its time, and the options that were fastest with right results."""
    found = []
    for row in dict.fromkeys(trial["row"] for trial in trials):
        timed = [trial for trial in trials if trial["row"] == row and "ms" in trial]
        own = [trial["ms"] for trial in timed if trial["own"]]
        if own:
            best = min(timed, key=lambda trial: trial["ms"])
            tried = {
                trial["launch"]: trial.get("ms", trial.get("reason"))
                for trial in trials
                if trial["row"] == row
            }
            found.append(
                {"row": row, "ms": own[0], "best": best["launch"], "best_ms": best["ms"], "tried": tried}
            )
    return found


def case_of(row: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("op", "size", "provider"))


def git_state() -> tuple[str, bool | None]:
    """Short name of the commit, and whether the checkout differs from it; records themselves do not count."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:  # a copy inside another repository
            return "unknown", None
        commit = git("rev-parse", "--short", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def device_slug(device: Mapping[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.get("name", "unknown").lower()).strip("-")


def record_name(record: Record) -> str:
    kind = "-rehearsal" * record["rehearsal"]
    return f"{device_slug(record['device'])}{kind}-{record['commit']}{'-dirty' * bool(record['dirty'])}.json"


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


def summary(result: dict[str, Any]) -> str:
    counts = [f"{count} {outcome}" for outcome, count in result.get("tests", {}).items()]
    return ", ".join([result["status"], *([result["reason"]] if "reason" in result else []), *counts])


if __name__ == "__main__":
    sys.exit(main())
