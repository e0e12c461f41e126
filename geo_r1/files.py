"""Write a file or folder so that it appears complete or not at all: under another name, then renamed."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def beside(path: Path) -> Path:
    """The temporary path of a file or folder that is being written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and moves it to `path` when the block ends without an error.

    Only for files that a run can do without: a machine that goes down may lose them. See `publish`.
    """
    partial = beside(path)
    try:
        with naming_file(path):
            yield partial
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # it takes room on a disk that may be full
        raise


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Give an OSError the file's name, if it has none: a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish(partial: Path, path: Path) -> None:
    """Move a finished file or folder to its name, so that it survives even if the machine goes down."""
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    with naming_file(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def data_uri(mime: str, data: bytes) -> str:
    """A file's content as an address, for HTML or a chat request."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
