"""Everything a machine with a GPU can tell, in eight minutes: `make gpu`, or `python3 -m benchmarks.gpu`.

Tests of the kernels, every benchmark and a run of the trainer, each in a process of its own, write one record
`benchmarks/results/<device>-<commit>.json`. It runs from the checkout, with nothing installed but torch,
triton, pytest and pytest-benchmark; what needs more is skipped by name. The record is written anew after
each part, so it is there whatever happens to the next. A part that fails or outlasts its time is recorded
with the reason, and the exit code is then 1. Without a GPU the exit code is 2.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRACE_SECONDS = 8.0  # between asking a part to stop and killing it; within its time
TAIL_LINES = 20  # of a failed part's output, kept in the record


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: in the record.
        arguments: after the interpreter; {record} is the file it writes, {device} cuda or cpu.
        seconds: its time. What earlier parts left over is added.
        needs: packages without which it is skipped.
        reads: what it writes: "facts" (device.py), "tests" (recorder.py), or "run" (the trainer's metrics).
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    reads: str = "tests"


def pytest_part(name: str, seconds: float, *paths: str, needs: tuple[str, ...] = ()) -> Part:
    # Warnings are errors on the versions that are pinned; here it is the machine's that run.
    plugin = ("-m", "pytest", "-p", "benchmarks.recorder", "--record", "{record}", "-p", "no:cacheprovider")
    return Part(name, (*plugin, "-W", "default", *paths), seconds, ("pytest", *needs))


BENCHMARK = ("pytest_benchmark",)
MODEL = ("transformers", "tokenizers", "PIL")
TRAINER = (*MODEL, "pydantic_settings", "pyarrow", "rich", "jinja2", "matplotlib", "tensorboard")
SMALL_RUN = {
    "run.dir": "{record}.run",
    "pretrain.steps": 10,
    "sft.steps": 10,
    "grpo.steps": 5,
    "rollout.max_new_tokens": 64,
    "eval.num_samples": 20,
    "eval.max_new_tokens": 64,
}
PARTS = (
    Part(
        "device",
        ("-m", "benchmarks.device", "{record}", "--device", "{device}"),
        20,
        ("torch", "triton"),
        reads="facts",
    ),
    pytest_part("tests of the kernels", 120, "tests/kernels"),
    pytest_part("bench_linear", 70, "benchmarks/bench_linear.py", needs=BENCHMARK),
    pytest_part("bench_attention", 75, "benchmarks/bench_attention.py", needs=BENCHMARK),
    pytest_part("bench_step", 115, "benchmarks/bench_step.py", needs=(*BENCHMARK, *MODEL)),
    pytest_part("bench_grpo_loss", 25, "benchmarks/bench_grpo_loss.py", needs=BENCHMARK),
    pytest_part("bench_group_advantage", 15, "benchmarks/bench_group_advantage.py", needs=BENCHMARK),
    Part(
        "world run",
        (
            *("-m", "geo_r1.train", "recipes/world.toml"),
            *(text for name, value in SMALL_RUN.items() for text in (f"--{name}", str(value))),
        ),
        25,
        TRAINER,
        reads="run",
    ),
    pytest_part("tests of the models", 15, "tests/models", needs=(*MODEL, "pyarrow", "jinja2")),
)


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no .git")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny sizes"
    )
    options = parser.parse_args(argv)
    commit, dirty = (options.commit, None) if options.commit else git_state()
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
            begin = time.monotonic()
            result = run_part(
                part, options.device, Path(folder) / f"{index}.jsonl", part.seconds + spare, record
            )
            seconds = time.monotonic() - begin
            spare += part.seconds - seconds
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


def run_part(part: Part, device: str, file: Path, seconds: float, record: dict[str, Any]) -> dict[str, Any]:
    """Run one part and put what it found into the record; returns what the record says of the part itself."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    filled = (text.replace("{record}", str(file)).replace("{device}", device) for text in part.arguments)
    command = [sys.executable, *filled]
    log = file.with_suffix(".log")
    exit_code = run_for(command, log, seconds)
    result: dict[str, Any] = {"status": "ok", "exit_code": exit_code}
    if exit_code is None:
        result = {"status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    elif exit_code != 0:
        result |= {"status": "failed", "reason": f"exit code {exit_code}"}
    result |= {"facts": read_facts, "tests": read_tests, "run": read_run}[part.reads](file, record)
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if result["status"] != "ok":
        result["output"] = output[-TAIL_LINES:]
    print(*output, sep="\n", flush=True)
    return result


def run_for(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit code of a command that has `seconds` to end, with all that it started; None if it did not."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds - GRACE_SECONDS, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then still writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read_facts(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    for line in read_lines(file):
        record["ceilings"] = line.pop("ceilings")
        record["device"] = {name: value for name, value in line.items() if name != "seconds"}
    return {}


def read_tests(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Counts, what failed, and why what was skipped was; measurements go to the record's own list."""
    lines = read_lines(file)
    record["measurements"] += [line["measurement"] for line in lines if "measurement" in line]
    counts = Counter(line["outcome"] for line in lines)
    skipped = Counter(line.get("reason", "") for line in lines if line["outcome"] == "skipped")
    failed = {line["test"]: line["reason"] for line in lines if line["outcome"] == "failed"}
    result: dict[str, Any] = {"tests": dict(counts), "skipped": dict(skipped), "failures": failed}
    return {name: value for name, value in result.items() if value}


def read_run(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The last metrics of each stage of a run of the trainer."""
    last = {
        line["stage"]: line for line in read_lines(Path(f"{file}.run") / "metrics.jsonl") if "stage" in line
    }
    return {"metrics": last}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; the last one may have been cut off, and the file may not be there."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def git_state() -> tuple[str, bool | None]:
    """Short name of the commit, and whether the checkout differs from it; records themselves do not count."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def record_name(record: dict[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].get("name", "unknown").lower()).strip("-")
    return f"{device}-{record['commit']}{'-dirty' if record['dirty'] else ''}.json"


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
