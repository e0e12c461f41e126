"""Runs a stage of `make gpu` in processes of its own, within its time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.lines import LOST, die_with_parent, read_lines, read_stage, settled, unfinished, write_line
from benchmarks.records import ROOT
from benchmarks.stages import Stage

GRACE_SECONDS = 8.0  # between asking a stage to stop and killing it; part of its time
TAIL_LINES = 20  # of a failed stage's output, kept in the record
NO_TESTS = 5  # pytest's exit code, also if all tests are settled


@dataclass(frozen=True)
class Run:
    """How a stage is to run: `stem` names its files of lines, `seconds` is its time."""

    stem: Path
    seconds: float
    device: str
    rehearsal: bool = False

    def file(self, process: int, suffix: str = "jsonl") -> Path:
        return self.stem.with_name(f"{self.stem.name}.{process}.{suffix}")


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
