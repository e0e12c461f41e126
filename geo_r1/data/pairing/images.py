"""Check, shrink and stitch a data set's images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from string import ascii_uppercase
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from geo_r1.data.decoding import ImageError, load_image, shrink
from geo_r1.data.paths import naming
from geo_r1.errors import UserError
from geo_r1.files import written_beside

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
        max_pixels: None allows every size up to `MAX_PIXELS`.
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
            image = load_image(full, where, root=self.root)
        except ImageError as error:
            return where, f"an image {error.kind}"
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
            stitched(*(load_image(Path(path), path) for path in images), max_pixels=self.max_pixels),
            target,
            "JPEG",
        )
        return str(target)


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
