"""Check, shrink and stitch a data set's images in worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from threading import Thread
from typing import Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

from geo_r1.data.paths import naming
from geo_r1.data.sample import load_image, shrink
from geo_r1.errors import UserError
from geo_r1.files import written_beside

CHUNK = 16  # images or questions sent to a process at a time
AHEAD = 8  # chunks queued for each process
STITCHED_PIXELS = 1 << 20  # default size of one image with all candidates
NARROWEST, WIDEST = 448, 2048  # width of a stitched image in pixels

Item = TypeVar("Item")
Result = TypeVar("Result")


class Images:
    """Maps a data set's paths to files.

    Args:
        root: absolute path of the folder that the paths start from.
    """

    def __init__(self, root: Path) -> None:
        self._start = f"{root}/".replace("//", "/")
        self._moved: dict[str, str] = {}

    def move(self, path: str, where: str) -> None:
        """Map a path to another file."""
        if where != self[path]:
            self._moved[path] = where

    def __getitem__(self, path: str) -> str:
        return self._moved.get(path) or self._start + path


@dataclass(frozen=True)
class Check:
    """Checks a data set's images and shrinks large ones.

    Attributes:
        root: absolute path of the folder that holds them; a link must not lead out of it.
        shrunk: folder for the shrunk copies of images over `max_pixels`.
        max_pixels: None allows every size below Pillow's own limit.
    """

    root: Path
    shrunk: Path
    max_pixels: int | None = None

    def __call__(self, path: str) -> tuple[str, str | None]:
        """Decode an image.

        Args:
            path: below `root`.

        Returns:
            The path of the usable image and None; or the path that was tried and what is wrong.

        Raises:
            UserError: a shrunk image cannot be written.
        """
        full = self.root / path
        where = str(full)
        try:
            real = os.path.realpath(full)
            if os.path.commonpath([real, os.path.realpath(self.root)]) != os.path.realpath(self.root):
                return where, "an image leads outside the root"
            if not os.path.isfile(real):
                return where, "an image does not exist"
            image = open_image(full)
        except UserError as error:
            return where, _fault(str(error), f"sample {full}: image {full} ")
        if self.max_pixels is None or image.width * image.height <= self.max_pixels:
            return where, None
        kind = "JPEG" if full.suffix.lower() in (".jpg", ".jpeg") else "PNG"
        target = self.shrunk / path
        if kind == "PNG" and target.suffix.lower() != ".png":  # so that it cannot replace x.png
            target = target.with_name(f"{target.name}.png")
        _save(shrink(image, self.max_pixels), target, kind)
        return str(target), None


@dataclass(frozen=True)
class Stitch:
    """Makes one image of a question: the view from the ground, with the labelled tiles in a grid below.

    Attributes:
        folder: where the image is written; its name is a hash of its sources.
        max_pixels: limit on the whole image.
    """

    folder: Path
    max_pixels: int = STITCHED_PIXELS

    def __call__(self, images: Sequence[str]) -> str:
        """Stitch a ground image and the candidates in order; return the path of the result.

        Raises:
            UserError: an image cannot be read, or the result cannot be written; names it.
        """
        name = blake2b("\0".join([*images, str(self.max_pixels)]).encode(), digest_size=16).hexdigest()
        target = self.folder / f"{name}.jpg"
        _save(
            stitched(*(open_image(Path(path)) for path in images), max_pixels=self.max_pixels),
            target,
            "JPEG",
        )
        return str(target)


def in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Call `work` on each item in worker processes; yields the results in order.

    Args:
        num_workers: number of processes; with 0, this process does the work.
        progress: called with the number of items just finished.

    Raises:
        UserError: a process ended unexpectedly. Errors of `work` are passed on.
    """
    stream = iter(items)
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    for results in _results(partial(_each, work), chunks, num_workers):
        if progress:
            progress(len(results))
        yield from results


def _results(work: Callable[[Any], Any], chunks: Iterator[Any], num_workers: int) -> Iterator[Any]:
    if num_workers == 0:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(num_workers, context, _follow_parent)
    try:
        waiting = deque(executor.submit(work, chunk) for chunk in islice(chunks, AHEAD * num_workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(executor.submit(work, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that works on images ended unexpectedly (mostly a lack of memory): lower "
            "--num-workers (0 needs no such processes)"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _each(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]


def open_image(path: Path) -> Image.Image:
    """Decode an image as `load_image` does; Pillow's warning of a decompression bomb becomes an error.

    Raises:
        UserError: the image is missing, broken, too large, or has more than 8 bits per channel; names it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return load_image(path, str(path))
        except Image.DecompressionBombWarning as error:
            raise UserError(f"sample {path}: image {path} cannot be read: {error}") from error


def _fault(message: str, prefix: str) -> str:
    """An image's fault without its name, so that equal faults can be counted."""
    message = message.removeprefix(prefix)
    if "decompression bomb" in message:
        return "an image has more pixels than Pillow's limit"
    if "8 bits" in message:
        return "an image has more than 8 bits a channel"
    return f"an image {message.partition(':')[0]}"


def stitched(ground: Image.Image, *tiles: Image.Image, max_pixels: int) -> Image.Image:
    """The ground image above the tiles, which are labelled A, B, ... row by row, on white."""
    columns = len(tiles) if len(tiles) <= 3 else math.ceil(len(tiles) / 2)
    rows = math.ceil(len(tiles) / columns)
    tall = min(1.0, ground.height / ground.width)  # height / width; a taller image is fitted into a square
    label = 0.15 / columns
    own = max(ground.width, columns * max(tile.width for tile in tiles))
    most = math.sqrt(max_pixels / (tall + rows * (1 / columns + label)))
    width = int(min(WIDEST, max(NARROWEST, own), most))
    side, band, top = width // columns, int(width * label), int(width * tall)
    gap = side // 50
    if band < 8:
        raise UserError(f"an image of {len(tiles)} labelled tiles needs more than {max_pixels} pixels")
    page = Image.new("RGB", (width, top + rows * (side + band)), "white")
    _place(page, ground, (0, 0, width, top))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=band * 0.9)
    for i, tile in enumerate(tiles):
        left, upper = i % columns * side, top + i // columns * (side + band)
        draw.text((left + side / 2, upper + band / 2), ascii_uppercase[i], "black", font, anchor="mm")
        _place(page, tile, (left + gap, upper + band, side - 2 * gap, side))
    return page


def _place(page: Image.Image, image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Paste an image into the middle of a box (left, top, width, height), as large as possible."""
    left, top, width, height = box
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    page.paste(resized, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))


def _save(image: Image.Image, path: Path, kind: str) -> None:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            image.save(beside, kind, quality=92)
