"""Cross-view questions from raw imagery: `python -m geo_r1.data pairs`.

A question shows a place from the ground and k satellite tiles, one of them of the same place. The command
writes train.jsonl and test.jsonl, which share no city, and card.json, which counts the questions and the rows
that were left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from geo_r1.cores import usable_cores
from geo_r1.data.pairing.confusers import KINDS, Places
from geo_r1.data.pairing.images import Check, Images
from geo_r1.data.pairing.manifests import SOURCES, VIGOR_SPLIT, Sites, folded, read_sites
from geo_r1.data.pairing.questions import Questions, generator
from geo_r1.data.pairing.tables import Drops
from geo_r1.data.paths import naming
from geo_r1.data.processes import in_processes
from geo_r1.errors import UserError, one_line
from geo_r1.files import written_beside

SPLITS = ("train", "test")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="layout of the data")
    add("--root", type=Path, help="folder of the data set, or of a manifest's paths (default: its own)")
    add("--manifest", type=Path, help="CSV or parquet: id, lat, lon, city, ground, satellite, semi_positives")
    add("--vigor-split", default=VIGOR_SPLIT, help="VIGOR's list of pairs (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder to write to")
    add("-k", type=int, default=5, help="tiles to choose from, 3 to 10 (default: %(default)s)")
    add("--k-range", type=int, nargs=2, metavar=("LEAST", "MOST"), help="draw k for each question instead")
    add("--confusers", choices=KINDS, default=KINDS[0], help="wrong tiles (default: %(default)s)")
    add("--min-distance", type=float, default=50.0, help="to wrong tiles, in metres (default: %(default)s)")
    add("--max-distance", type=float, help="to wrong tiles, in metres (default: no bound)")
    add("--test-cities", nargs="+", metavar="CITY", help="cities of test.jsonl")
    add("--test-share", type=float, default=0.2, help="or this share of all cities (default: %(default)s)")
    add("--limit", type=int, help="at most this many questions per split, drawn from all")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--check-images", action="store_true", help="decode every image; drop sites if that fails")
    add("--max-pixels", type=int, help="shrink larger images, or stitched ones, to this; checks them all")
    add("--stitch", action="store_true", help="one image per question, tiles labelled; checks them all")
    add(
        "--num-workers",
        type=int,
        default=usable_cores(),
        help="processes for images (default: %(default)s)",
    )


def command(options: argparse.Namespace) -> None:
    """Write the questions.

    Raises:
        UserError: an argument is out of range, a file is missing or malformed, or no question can be made.
    """
    _check_options(options)
    console = Console(stderr=True)
    out = Path(os.path.abspath(options.out))
    with _progress(console) as step:
        step("reading", None)
        sites, drops = read_sites(options.source, options.root, options.manifest, options.vigor_split)
        images = Images(Path(os.path.abspath(sites.root)))
        if options.check_images or options.max_pixels or options.stitch:
            sites = _checked(sites, drops, images, options, out, step)
        sites = _at_home(sites, drops)
        split_of = _split_cities(sites.city, options)
        counts: dict[str, Any] = {}
        with naming(out), ExitStack() as whole:
            out.mkdir(parents=True, exist_ok=True)
            # the files are renamed together, so that no city is in two of them
            for split in SPLITS:
                rows = np.flatnonzero([split_of[city] == split for city in sites.city])
                if len(rows):
                    questions = Questions(sites.take(rows), split, options, drops, images, step)
                    lines = whole.enter_context(written_beside(out / f"{split}.jsonl"))
                    counts[split] = questions.write(lines, out, step)
            card = whole.enter_context(written_beside(out / "card.json"))
            card.write_text(json.dumps(_card(options, counts, drops), indent=1, ensure_ascii=False), "utf-8")
        for split in SPLITS:
            if split not in counts:  # from an earlier run
                (out / f"{split}.jsonl").unlink(missing_ok=True)
    Console().print(_table(counts, drops, out))


def _check_options(options: argparse.Namespace) -> None:
    least, most = options.k_range or (options.k, options.k)
    if not 3 <= least <= most <= 10:
        given = f"--k-range {least} {most}" if options.k_range else f"-k {options.k}"
        raise UserError(f"{given}: a question has 3 to 10 tiles to choose from")
    bound = np.inf if options.max_distance is None else options.max_distance
    if not 0 <= options.min_distance <= bound or options.min_distance == np.inf:
        raise UserError(
            f"--min-distance {options.min_distance} must be 0 or more and at most --max-distance {bound}"
        )
    if not 0 <= options.test_share <= 1:
        raise UserError(f"--test-share must be 0 to 1, got {options.test_share}")
    for name, lowest in (("limit", 1), ("max_pixels", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int | None], Callable[[int], None]]]:
    """Yields a function that starts a progress bar and returns a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def step(name: str, total: int | None) -> Callable[[int], None]:
            task = bars.add_task(name, total=total)
            return lambda done: bars.advance(task, done)

        yield step


def _checked(
    sites: Sites, drops: Drops, images: Images, options: argparse.Namespace, out: Path, step: Any
) -> Sites:
    """The sites with usable images."""
    paths = list(dict.fromkeys([*sites.ground, *sites.satellite]))
    shrunk = out / "images"
    shrinks = options.max_pixels is not None and not options.stitch
    inside = next((path for path in paths if images[path].startswith(f"{shrunk}/")), None)
    if shrinks and inside is not None:
        raise UserError(f"--max-pixels would write to {shrunk}, which holds {inside}; choose another --out")
    check = Check(Path(os.path.abspath(sites.root)), shrunk, options.max_pixels if shrinks else None)
    faults: dict[str, str] = {}
    results = in_processes(check, paths, options.num_workers, step("checking images", len(paths)))
    for path, (where, fault) in zip(paths, results, strict=True):
        if fault is None:
            images.move(path, where)
        else:
            faults[path] = fault
    good = []
    for i, pair in enumerate(zip(sites.ground, sites.satellite, strict=True)):
        broken = next((path for path in pair if path in faults), None)
        if broken is None:
            good.append(i)
        else:
            drops.add(faults[broken], f"{sites.id[i]!r:.80}: {images[broken]}")
    if not good:
        raise UserError(f"no site has two good images: {drops}")
    return sites.take(np.array(good))


def _at_home(sites: Sites, drops: Drops) -> Sites:
    """Drop sites whose tile belongs to another city, so that splits by city share no tile."""
    places = Places(sites)
    homes = [sites.city[row] for row in places.row[places.of_site].tolist()]
    good = np.array([home == city for home, city in zip(homes, sites.city, strict=True)])
    for i in np.flatnonzero(~good).tolist():
        drops.add("the satellite tile is another city's, too", f"{sites.id[i]!r:.80}, tile of {homes[i]}")
    return sites if good.all() else sites.take(np.flatnonzero(good))


def _split_cities(cities: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """The split of each city."""
    names = sorted(set(cities))
    if options.test_cities:
        spelt = {folded(name): name for name in names}
        unknown = sorted(name for name in options.test_cities if folded(name) not in spelt)
        if unknown:
            raise UserError(f"--test-cities: no sites in {unknown[0]!r}; there are {_few(names)}")
        test = {spelt[folded(name)] for name in options.test_cities}
        if len(test) == len(names):
            raise UserError("--test-cities names every city; leave one for training, or use --test-share 1")
    elif options.test_share in (0, 1):
        test = set(names) if options.test_share else set()
    elif len(names) == 1:
        raise UserError(
            f"all sites are in one city, {names[0]!r}, and the splits share no city: "
            "give two or more cities, or put all into one split with --test-share 0 (train) or 1 (test)"
        )
    else:
        count = min(max(1, round(options.test_share * len(names))), len(names) - 1)
        test = {names[i] for i in generator(options.seed, "cities").permutation(len(names))[:count].tolist()}
    return {name: SPLITS[name in test] for name in names}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _card(options: argparse.Namespace, counts: dict[str, Any], drops: Drops) -> dict[str, Any]:
    try:
        own = version("geo_r1")
    except PackageNotFoundError:  # run from a checkout
        own = None
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(options).items())
        if value is None or isinstance(value, str | int | float | list | Path)
    }
    return {"version": own, "arguments": arguments, "splits": counts, "dropped": drops.report()}


def _table(counts: dict[str, Any], drops: Drops, out: Path) -> Table:
    table = Table("", "questions", "cities", "median distance", title=Text(one_line(out)))
    for split, count in counts.items():
        median = f"{count['confuser_distance_m']['50%']:,.0f} m"
        table.add_row(split, f"{count['questions']:,}", f"{len(count['cities']):,}", median)
    for reason, count in drops.counts.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", "", "")
    return table
