"""A file or a folder that appears whole or not at all: written beside, then given its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields where to write a file, and replaces the one of that name when the block ends without an error.

    For what a run can do without: a machine that goes down may take it along. See `publish`.
    """
    partial = beside(path)
    yield partial
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish(partial: Path, path: Path) -> None:
    """Give what was written its name; it is there from now on, even if the machine goes down."""
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
