"""Pieces of the report's page: images as data URIs, completions cut into thought and answer."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from geo_r1.data import load_image
from geo_r1.files import data_uri

TINY_PIXELS = 256  # images up to this side are embedded untouched and scaled without blur
LARGE_PIXELS = 1024  # images beyond this side are shrunk to it: the page must stay mailable
LARGE_BYTES = 2**19  # and larger files are encoded anew
LEADS = 1.5  # a panorama's aspect ratio, as a multiple of the other images'
SHOWN_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")  # every browser shows them

# A completion that opens inside its think block (the prompt ended with the tag) has only the closing tag.
PARTS = re.compile(
    r"(?P<think>\A(?:(?!<answer>|<think>).)*?</think>|<think>.*?(?:</think>|\Z))|(?P<answer><answer>.*?(?:</answer>|\Z))",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class ShownImage:
    label: str
    uri: str | None  # None: the file is missing or unreadable
    tiny: bool
    aspect: float = 1.0  # width / height


def embedded(source: Path | bytes, label: str, *, largest: int = LARGE_PIXELS) -> ShownImage:
    """An image as it is on disk, or a JPEG of it if it is too large for a page.

    Args:
        source: a file, or its bytes.
        largest: pixels of the longer side.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        with Image.open(io.BytesIO(data)) as image:
            side, aspect = max(image.size), image.width / max(1, image.height)
            if side <= largest and len(data) <= LARGE_BYTES and image.format in SHOWN_FORMATS:
                uri = data_uri(Image.MIME[image.format], data)
            else:
                small, jpeg = load_image(data, label), io.BytesIO()
                small.thumbnail((largest, largest))
                small.save(jpeg, "JPEG", quality=85)
                uri = data_uri("image/jpeg", jpeg.getvalue())
    except (OSError, ValueError, Image.DecompressionBombError):  # missing or no image: the page says so
        return ShownImage(label, None, tiny=False)
    return ShownImage(label, uri, tiny=side <= TINY_PIXELS, aspect=aspect)


def views(images: Sequence[ShownImage]) -> dict[str, Any]:
    """A sample's images for the page: one that leads, alone or much wider than all others, and tiles."""
    others = images[1:]
    leads = bool(images) and all(images[0].aspect > LEADS * image.aspect for image in others)
    return {"lead": images[0] if leads else None, "tiles": others if leads else images}


def split_completion(text: str) -> list[tuple[str, str]]:
    """Cut a completion into ("think" | "answer" | "text", piece); tags stay, the pieces join to `text`."""
    parts, end = [], 0
    for match in PARTS.finditer(text):
        parts.append(("text", text[end : match.start()]))
        parts.append((match.lastgroup or "text", match.group()))
        end = match.end()
    parts.append(("text", text[end:]))
    return [(kind, piece) for kind, piece in parts if piece]
