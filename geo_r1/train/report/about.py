"""run.json: when and where a run ran, with which versions, and how long, over all its sessions."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import geo_r1
from geo_r1.eval.benchmark import is_finite
from geo_r1.files import write_text

NUMBERS, TEXTS = ("seconds", "sessions", "ranks", "threads"), ("started", "code", "hardware", "versions")
PACKAGES = ("torch", "triton", "transformers")


class About:
    """The file of a run that starts now, or goes on.

    Args:
        facts: of this session, as `facts_of` returns them.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        before = read_about(path)
        self.path, self.start = path, time.monotonic()
        self.before = before.get("seconds", 0.0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        sessions = before.get("sessions", 0) + 1
        self.facts = {"started": before.get("started", now), "sessions": sessions, **facts}

    def save(self) -> None:
        """Write the file, with the seconds so far."""
        seconds = round(self.before + time.monotonic() - self.start, 1)
        write_text(self.path, json.dumps({**self.facts, "seconds": seconds}, indent=2))


def read_about(path: Path) -> dict[str, Any]:
    """The file's values as far as they have their types; of a missing or damaged file, nothing."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            numbers = all(is_finite(found.get(key, 0)) for key in NUMBERS)
            return found if numbers and all(isinstance(found.get(key, ""), str) for key in TEXTS) else {}
    return {}


def facts_of(ranks: int, device: torch.device) -> dict[str, Any]:
    """Code, hardware and versions of this process, as texts; ranks and threads as numbers."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return {
        "code": _code(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "versions": ", ".join(versions),
    }


def _code() -> str:
    """The version, and the commit if the package lies in a git checkout."""
    folder = Path(str(files("geo_r1"))).parent
    said = f"geo_r1 {geo_r1.__version__}"
    if (folder / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):  # no git here, or not our repository
            git = ["git", "-C", str(folder)]
            commit = _output([*git, "rev-parse", "--short", "HEAD"])
            changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
            return f"{said}, commit {commit}{' with uncommitted changes' if changed else ''}"
    return said


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
