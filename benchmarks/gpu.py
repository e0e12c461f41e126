"""Measures everything on a machine with a GPU, in ten minutes: `make gpu`, or `python3 -m benchmarks.gpu`.

Tests of the kernels, every benchmark, compute-sanitizer and a run of the trainer, each in its own processes,
write one record, `benchmarks/results/<device>-<commit>.json`; `--out` names another folder. It runs from the
checkout, with nothing installed but torch, triton, pytest and pytest-benchmark; a stage that needs more is
skipped, and the record names the missing packages. With nvcc and pybind11, the CUDA kernels are first built
into the checkout, for this machine's GPU.

The targets' stages come first; peers that take long to start come last, in the remaining time. The record is
rewritten after each stage, so nothing is lost if a later one fails or is killed. `--stages` runs only some
stages, within `--limit` seconds, and adds to the record of this commit if there is one. A stage that fails or
outlasts its time is recorded with the reason, and the exit code is then 1. A test that kills its process or
leaves the GPU unusable is recorded as failed, and another process continues after it. Without a GPU the exit
code is 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.lines import LOST, begun, read_lines
from benchmarks.stages import STAGES, Stage
from geo_r1.errors import MISTAKE, UserError, say
from geo_r1.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRACE_SECONDS = 8.0  # between asking a stage to stop and killing it; part of its time
TAIL_LINES = 20  # of a failed stage's output, kept in the record
CPU_PATIENCE = 4.0  # a rehearsal on a CPU, in Triton's interpreter, gets this many times the time
NO_TESTS = 5  # pytest's exit code, also if earlier processes ran all tests
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None, stages: Mapping[str, Stage] = STAGES) -> int:
    """Run the stages and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the record (%(default)s); created if missing"
    )
    parser.add_argument("--commit", help="name of the commit, for a checkout without .git")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny sizes"
    )
    parser.add_argument("--stages", help=f"run only these, of {','.join(stages)}; default: all")
    parser.add_argument("--limit", type=float, help="seconds, shared among all stages that run")
    options = parser.parse_args(argv)
    try:
        return run_stages(options, stages)
    except UserError as error:
        say(error)
        return MISTAKE


def run_stages(options: argparse.Namespace, stages: Mapping[str, Stage]) -> int:
    check_writable(options.out)
    names = list(stages) if options.stages is None else options.stages.split(",")
    if unknown := [name for name in names if name not in stages]:
        raise UserError(f"--stages: there is no {unknown[0]}; the stages are {', '.join(stages)}")
    commit, dirty = (options.commit, None) if options.commit else git_state()
    if commit == "unknown":
        print("no git here: the record's commit is unknown; --commit names it", flush=True)
    record: Record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": {},
        "ceilings": {},
        "parts": {stage.name: {"status": "not run"} for stage in stages.values()},
        "measurements": [],
    }
    names = list(dict.fromkeys(["device", *names]))  # it names the record
    chosen = [stages[name] for name in names]
    patience = CPU_PATIENCE if options.device == "cpu" else 1.0
    if options.limit:
        patience = options.limit / sum(stage.seconds for stage in chosen)
    spare = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in zip(names, chosen, strict=True):
            begin, granted = time.monotonic(), patience * stage.seconds
            result = run_stage(stage, options.device, Path(folder) / name, granted + spare, record)
            seconds = time.monotonic() - begin
            spare += granted - seconds
            if name == "device" and (result.get("exit_code") == 2 or result["status"] == "skipped"):
                reason = result["reason"] if result["status"] == "skipped" else "torch sees none here"
                raise UserError(f"make gpu needs a GPU, torch and triton: {reason}")
            path = options.out / record_name(record)
            if name == "device" and options.stages and path.exists():
                record = go_on(json.loads(path.read_text(encoding="utf-8")), record)
            record["parts"][stage.name] = {**result, "seconds": round(seconds, 1)}
            write_text(path, json.dumps(record, indent=1) + "\n")
            print(f"{name}: {summary(result)}, {seconds:.0f} s", flush=True)
    print(
        *(f"{name}: {summary(part)}" for name, part in record["parts"].items()), f"record: {path}", sep="\n"
    )
    return int(any(record["parts"][stage.name]["status"] in ("failed", "out of time") for stage in chosen))


def go_on(earlier: Record, record: Record) -> Record:
    """The record that earlier stages left, with the device and the ceilings of this run."""
    versions = earlier["device"].get("versions", {}) | record["device"].get("versions", {})
    device = record["device"] | {"versions": versions}
    return {**earlier, "device": device, "ceilings": record["ceilings"]}


def run_stage(stage: Stage, device: str, stem: Path, seconds: float, record: Record) -> dict[str, Any]:
    """Run one stage and put its results into the record; returns the stage's own entry in the record."""
    missing = [package for package in stage.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    count = min(stage.processes, os.cpu_count() or 1)
    files = [stem.with_suffix(f".{share}.jsonl") for share in range(count)]
    commands = []
    for share, file in enumerate(files):
        fields = {"record": file, "device": device, "share": f"{share}/{count}"}
        commands.append([sys.executable, *(Template(x).safe_substitute(fields) for x in stage.arguments)])
    deadline = time.monotonic() + seconds
    codes: list[int | None] = [None] * count
    logs = [file.with_suffix(".log") for file in files]
    left, done_before = list(range(count)), -1
    while left and (done := sum(len(begun(read_lines(file))) for file in files)) > done_before:
        ended = run_until(
            [commands[i] for i in left], [logs[i] for i in left], deadline, environment(device, count)
        )
        for i, code in zip(left, ended, strict=True):
            codes[i] = 0 if code == NO_TESTS and done_before >= 0 else code
        # The lines show a test that killed its process as begun, so another process continues after it.
        left = [i for i in left if (code := codes[i]) is not None and (code < 0 or code == LOST)]
        done_before = done
    result: dict[str, Any] = {"status": "ok"}
    lines = [line for file in files for line in read_lines(file)]
    bad = [code for code in codes if code not in (0, None)]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    if skipped and not bad:
        result = {"status": "skipped", "reason": skipped[0]}
    elif None in codes:
        result = {"status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    elif bad:
        result = {"status": "failed", "reason": f"exit code {bad[0]}", "exit_code": bad[0]}
    result |= read_results(lines, record)
    if metrics := read_lines(Path(f"{files[0]}.run") / "metrics.jsonl"):  # of a run of the trainer
        result["metrics"] = {line["stage"]: line for line in metrics if "stage" in line}
    if result["status"] == "ok" and "failures" in result:  # one process died, and another continued
        result |= {"status": "failed", "reason": "a process died"}
    outputs = [log.read_text(encoding="utf-8", errors="replace").splitlines() for log in logs]
    if result["status"] in ("failed", "out of time"):
        worst = next((i for i, code in enumerate(codes) if code != 0), 0)
        result["output"] = outputs[worst][-TAIL_LINES:]
    print(*(line for output in outputs for line in output), sep="\n", flush=True)
    return result


def environment(device: str, processes: int) -> dict[str, str]:
    """Hides the GPU from a rehearsal on a CPU; processes that run side by side share the cores."""
    found = dict(os.environ)
    found.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark times nothing in such a worker
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if processes > 1:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return found


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
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        running.append(process)
    try:
        codes = wait_for(running, max(deadline - GRACE_SECONDS, begin + 1.0))
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # pytest then still writes what it has
        wait_for(running, max(deadline, begin + 1.0))
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
    for line in lines:
        if "device" in line:
            versions = record["device"].get("versions", {}) | line["device"]["versions"]
            record["device"] |= line["device"] | {"versions": versions}
            record["ceilings"] |= line.get("ceilings", {})
    ended = [line for line in lines if "test" in line]
    for test in sorted(begun(lines) - {line["test"] for line in ended}):
        ended.append({"test": test, "outcome": "failed", "reason": "did not end"})
    rows = [line["measurement"] for line in ended if "measurement" in line]
    again = [case_of(row) for row in rows]
    record["measurements"] = [row for row in record["measurements"] if case_of(row) not in again] + rows
    counts = Counter(line["outcome"] for line in ended)
    skipped = Counter(line.get("reason", "") for line in ended if line["outcome"] == "skipped")
    failed = {line["test"]: line["reason"] for line in ended if line["outcome"] == "failed"}
    result: dict[str, Any] = {"tests": dict(counts), "skipped": dict(skipped), "failures": failed}
    return {name: value for name, value in result.items() if value}


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


def device_slug(record: Record) -> str:
    return re.sub(r"[^a-z0-9]+", "-", record["device"].get("name", "unknown").lower()).strip("-")


def record_name(record: Record) -> str:
    return f"{device_slug(record)}-{record['commit']}{'-dirty' if record['dirty'] else ''}.json"


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
