"""How many cores this process may use: machines lend fewer to a process than they have."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its control groups' quotas; at least 1.

    A quota of one and a half cores counts as two. The quota may be a container's, a batch system's or a
    service's: those of all groups around this process hold.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores by each quota that holds for this process."""
    # Version 2 keeps both numbers in one file, version 1 in two. Where the process's own path is that of
    # the host, and the files are the container's, only the root is there.
    for folder in _groups():
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):
                words = " ".join((folder / name).read_text() for name in files).split()
                allowed, period = int(words[0]), int(words[1])  # "max" is no number: no limit
                if allowed > 0:
                    yield allowed / period


def _groups() -> Iterator[Path]:
    """Folders of the control groups around this process that can have a quota."""
    paths = {"": "/", "cpu": "/"}  # by controller; version 2 has no name for its own
    with suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update((controller, path) for controller in controllers.split(",") if controller in paths)
    for mount, path in (("", paths[""]), ("unified", paths[""]), ("cpu", paths["cpu"])):
        group = Path(path)
        for one in (group, *group.parents):
            yield GROUPS / mount / one.relative_to("/")
