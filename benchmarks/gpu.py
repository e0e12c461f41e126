"""Everything a machine with a GPU can tell, in ten minutes: `make gpu`, or `python3 -m benchmarks.gpu`.

Tests of the kernels, every benchmark, compute-sanitizer and a run of the trainer, each in processes of its
own, write one record `benchmarks/results/<device>-<commit>.json`, or into the folder that `--out` names. It
runs from the checkout, with nothing installed but torch, triton, pytest and pytest-benchmark; what needs more
is skipped by name. Where nvcc and pybind11 are, the CUDA kernels are first built into the checkout, for the
GPU at hand.

What the targets need comes first; peers that take long to get going come last, with the time that is left.
The record is written anew after each part, so it is there whatever happens to the next. A part that fails or
outlasts its time is recorded with the reason, and the exit code is then 1. A test that kills its process or
leaves the GPU unusable is recorded as failed, and another process goes on behind it. Without a GPU the exit
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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.lines import LOST, begun, read_lines
from benchmarks.parts import PARTS, Part

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRACE_SECONDS = 8.0  # between asking a part to stop and killing it; within its time
TAIL_LINES = 20  # of a failed part's output, kept in the record
CPU_PATIENCE = 4.0  # a rehearsal on a CPU, in Triton's interpreter, has that many times the time
NO_TESTS = 5  # pytest's exit code, also where those before it ran them all


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the record (%(default)s); made if not there"
    )
    parser.add_argument("--commit", help="name of the commit, where the checkout has no .git")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny sizes"
    )
    options = parser.parse_args(argv)
    if (problem := why_not_writable(options.out)) is not None:
        print(f"make gpu cannot write its record: {problem}; --out names another folder", file=sys.stderr)
        return 2
    patience = CPU_PATIENCE if options.device == "cpu" else 1.0
    commit, dirty = (options.commit, None) if options.commit else git_state()
    if commit == "unknown":
        print("no git here: the record's commit is unknown; --commit names it", flush=True)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": {},
        "ceilings": {},
        "parts": {part.name: {"status": "not run"} for part in parts},
        "measurements": [],
    }
    spare = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for index, part in enumerate(parts):
            begin, granted = time.monotonic(), patience * part.seconds
            result = run_part(part, options.device, Path(folder) / str(index), granted + spare, record)
            seconds = time.monotonic() - begin
            spare += granted - seconds
            if part.reads == "facts" and (result.get("exit_code") == 2 or result["status"] == "skipped"):
                reason = result.get("reason") if result["status"] == "skipped" else "torch sees none here"
                print(f"make gpu needs a GPU, torch and triton: {reason}", file=sys.stderr)
                return 2
            record["parts"][part.name] = {**result, "seconds": round(seconds, 1)}
            path = options.out / record_name(record)
            write_whole(path, json.dumps(record, indent=1) + "\n")
            print(f"{part.name}: {summary(result)}, {seconds:.0f} s", flush=True)
    print(
        *(f"{name}: {summary(part)}" for name, part in record["parts"].items()), f"record: {path}", sep="\n"
    )
    return int(any(part["status"] in ("failed", "out of time") for part in record["parts"].values()))


def run_part(part: Part, device: str, stem: Path, seconds: float, record: dict[str, Any]) -> dict[str, Any]:
    """Run one part and put what it found into the record; returns what the record says of the part itself."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    count = min(part.processes, os.cpu_count() or 1)
    files = [stem.with_suffix(f".{share}.jsonl") for share in range(count)]
    commands = []
    for share, file in enumerate(files):
        fields = {"{record}": str(file), "{device}": device, "{share}": f"{share}/{count}"}
        commands.append([sys.executable, *(fill(text, fields) for text in part.arguments)])
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
        # A test that its process died of is in the record as begun: another goes on behind it.
        died = [i for i in left if (code := codes[i]) is not None and (code < 0 or code == LOST)]
        left, done_before = died if part.reads == "tests" else [], done
    result: dict[str, Any] = {"status": "ok"}
    bad = [code for code in codes if code not in (0, None)]
    skipped = [line["skipped"] for file in files for line in read_lines(file) if "skipped" in line]
    if skipped and not bad:
        result = {"status": "skipped", "reason": skipped[0]}
    elif None in codes:
        result = {"status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    elif bad:
        result = {"status": "failed", "reason": f"exit code {bad[0]}", "exit_code": bad[0]}
    result |= READERS[part.reads](files, record)
    if result["status"] == "ok" and "failures" in result:  # of a process that died, another having ended well
        result |= {"status": "failed", "reason": "a process died"}
    outputs = [log.read_text(encoding="utf-8", errors="replace").splitlines() for log in logs]
    if result["status"] in ("failed", "out of time"):
        worst = next((i for i, code in enumerate(codes) if code != 0), 0)
        result["output"] = outputs[worst][-TAIL_LINES:]
    print(*(line for output in outputs for line in output), sep="\n", flush=True)
    return result


def fill(text: str, fields: dict[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(name, value)
    return text


def environment(device: str, processes: int) -> dict[str, str]:
    """A rehearsal on a CPU sees no GPU; processes that run side by side share the cores."""
    found = dict(os.environ)
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if processes > 1:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return found


def run_until(
    commands: Sequence[list[str]], logs: Sequence[Path], deadline: float, environment: dict[str, str]
) -> list[int | None]:
    """Exit codes of commands side by side that have to end by then, with all they started; None if not."""
    running = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append(process)
    begin = time.monotonic()
    try:
        wait_for(running, max(deadline - GRACE_SECONDS, begin + 1.0))
        codes = [process.poll() for process in running]
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


def wait_for(running: Sequence[subprocess.Popen], deadline: float) -> None:
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def read_facts(files: Sequence[Path], record: dict[str, Any]) -> dict[str, Any]:
    for line in read_lines(files[0]):
        record["ceilings"] = line.pop("ceilings")
        record["device"] = {name: value for name, value in line.items() if name != "seconds"}
    return {}


def read_extension(files: Sequence[Path], record: dict[str, Any]) -> dict[str, Any]:
    """What the CUDA kernels are built for, and by which nvcc."""
    for line in read_lines(files[0]):
        if "extension" in line:
            record["device"]["extension"] = line["extension"]
            record["device"].setdefault("versions", {})["nvcc"] = line["nvcc"]
    return {}


def read_tests(files: Sequence[Path], record: dict[str, Any]) -> dict[str, Any]:
    """Counts, what failed, and why what was skipped was; measurements go to the record's own list."""
    lines = [line for file in files for line in read_lines(file)]
    ended = [line for line in lines if "test" in line]
    for test in sorted(begun(lines) - {line["test"] for line in ended}):
        ended.append({"test": test, "outcome": "failed", "reason": "did not end"})
    record["measurements"] += [line["measurement"] for line in ended if "measurement" in line]
    counts = Counter(line["outcome"] for line in ended)
    skipped = Counter(line.get("reason", "") for line in ended if line["outcome"] == "skipped")
    failed = {line["test"]: line["reason"] for line in ended if line["outcome"] == "failed"}
    result: dict[str, Any] = {"tests": dict(counts), "skipped": dict(skipped), "failures": failed}
    return {name: value for name, value in result.items() if value}


def read_run(files: Sequence[Path], record: dict[str, Any]) -> dict[str, Any]:
    """The last metrics of each stage of a run of the trainer."""
    lines = read_lines(Path(f"{files[0]}.run") / "metrics.jsonl")
    return {"metrics": {line["stage"]: line for line in lines if "stage" in line}}


READERS = {"facts": read_facts, "extension": read_extension, "tests": read_tests, "run": read_run}


def git_state() -> tuple[str, bool | None]:
    """Short name of the commit, and whether the checkout differs from it; records themselves do not count."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:  # a copy within some other repository
            return "unknown", None
        commit = git("rev-parse", "--short", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def record_name(record: dict[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].get("name", "unknown").lower()).strip("-")
    return f"{device}-{record['commit']}{'-dirty' if record['dirty'] else ''}.json"


def why_not_writable(folder: Path) -> str | None:
    """None where files can be written into a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: what exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def summary(result: dict[str, Any]) -> str:
    counts = [f"{count} {outcome}" for outcome, count in result.get("tests", {}).items()]
    return ", ".join([result["status"], *([result["reason"]] if "reason" in result else []), *counts])


if __name__ == "__main__":
    sys.exit(main())
