"""Look for bad samples in a file: `python -m geo_r1.data check`.

The command reads every row and decodes every image, as a run with this file would, and prints a table of what
is wrong. The exit code is 0 if nothing is, and 2 otherwise.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from geo_r1.cores import usable_cores
from geo_r1.data.decoding import ImageError, ImageSource, check_image
from geo_r1.data.processes import in_processes
from geo_r1.data.rows import read_samples
from geo_r1.errors import UserError

ROWS = 3  # rows shown of each kind
CHUNK = 64  # images sent to a process at a time: most are small


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("data", type=Path, metavar="FILE", help="JSONL, JSON or parquet of samples")
    parser.add_argument("--image-root", type=Path, metavar="DIR",
                        help="folder of the images, as data.image_root: none may lead out of it")  # fmt: skip
    parser.add_argument("--workers", "--num-workers", type=int, default=usable_cores(), metavar="N",
                        help="processes that decode images; 0 needs none (default: %(default)s)")  # fmt: skip


def command(options: argparse.Namespace) -> None:
    """Print what is wrong with a file.

    Raises:
        UserError: the file cannot be read, or something is wrong with it.
    """
    if options.workers < 0:
        raise UserError(f"--workers must be at least 0, got {options.workers}")
    num_rows, faults = faults_of(options.data, options.image_root, options.workers)
    if not faults:
        print(f"{options.data}: {num_rows:,} samples, nothing is wrong")
        return
    Console().print(_table(options.data, faults))
    num_bad = len({fault.where for fault in faults})
    raise UserError(f"{options.data}: {num_bad:,} of {num_rows:,} samples are bad")


@dataclass(frozen=True)
class Fault:
    """Something wrong with a row.

    Attributes:
        where: file and row.
        kind: the same words for the same fault.
        reason: the whole line.
    """

    where: str
    kind: str
    reason: str


def faults_of(path: Path, image_root: Path | None, num_workers: int) -> tuple[int, list[Fault]]:
    """The number of a file's rows, and what is wrong with them; every image is decoded.

    Raises:
        UserError: the file cannot be read at all.
    """
    bad: dict[str, str] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("reading rows", total=None)
        samples = read_samples(path, image_root, check=lambda _: bars.advance(task), bad=bad)
        faults = [Fault(where, _kind(reason), reason) for where, reason in bad.items()]
        owners: dict[ImageSource, list[int]] = {}  # questions share tiles
        for number, sample in enumerate(samples):
            for image in sample.images:
                owners.setdefault(image, []).append(number)
        bars.reset(task, description="decoding images", total=len(owners))
        work = ((image, samples[numbers[0]].image_root) for image, numbers in owners.items())
        results = in_processes(_look, work, num_workers, lambda done: bars.advance(task, done), CHUNK)
        for numbers, found in zip(owners.values(), results, strict=True):
            if found is not None:
                faults += [Fault(samples[number].where, *found) for number in dict.fromkeys(numbers)]
    return len(samples) + len(bad), faults


def _look(work: tuple[ImageSource, Path | None]) -> tuple[str, str] | None:
    """The kind of an image's fault, and the whole line; None for a good image."""
    image, root = work
    try:
        check_image(image, "", root, whole=True)
    except ImageError as error:
        return f"an image {error.kind}", error.reason
    return None


def _kind(reason: str) -> str:
    """A row's fault without what was found in this row."""
    words = re.split(r", got |[:;] | the id '", reason)[0]
    return re.sub(r"\d[\d,]*", "N", words)


def _table(path: Path, faults: Sequence[Fault]) -> Table:
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    table = Table("what is wrong", "samples", "first rows", "the first", title=Text(str(path)))
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        rows = dict.fromkeys(fault.where.rpartition(" row ")[2] for fault in found)
        shown = ", ".join([*rows][:ROWS]) + (", ..." if len(rows) > ROWS else "")
        table.add_row(Text(kind), f"{len(rows):,}", shown, Text(found[0].reason))
    return table
