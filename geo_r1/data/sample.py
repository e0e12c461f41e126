"""Samples (prompts with images and answers), and reading them from files."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from geo_r1.data.journal import read_lines
from geo_r1.errors import UserError, one_line

IMAGE_MARKER = "<image>"
MAX_JSON = 2 * 2**30  # bytes of a .json file, which is parsed in one piece
ImageSource = Image.Image | Path | bytes


@dataclass(frozen=True)
class Sample:
    """A prompt that a model answers.

    Attributes:
        id: unique in the data set; names the sample in errors, reports and random streams.
        messages: chat messages, each {"role", "content"}; content is a list of parts, {"type": "text",
            "text"} or {"type": "image"}; the n-th image part stands for the n-th of `images`.
        images: images, paths, or encoded bytes, in order.
        response: the text that supervised fine-tuning learns, if any.
        answer: the truth that rewards compare with, if any.
        metadata: the other columns; reward functions get them by name.

    Raises:
        UserError: the numbers of image parts and images differ, or there is no message.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    response: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise UserError(f"sample {self.id}: the prompt is empty")
        markers = sum(part["type"] == "image" for message in self.messages for part in message["content"])
        if markers != len(self.images):
            raise UserError(
                f"sample {self.id}: the prompt marks {markers} images but the sample has {len(self.images)}"
            )


def load_image(source: ImageSource, owner: str, encoded: bytes | None = None) -> Image.Image:
    """Decode an image to RGB, rotated upright by its EXIF orientation, transparent pixels over white.

    Args:
        owner: the sample's id, for errors.
        encoded: the bytes of this source, if `read_image` has already read them.

    Raises:
        UserError: the file is missing, is not a complete image, or has more than 8 bits per channel; names
            `owner` and the file.
    """
    with _naming(source, owner):
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        if encoded is None and isinstance(source, bytes):
            encoded = source
        with Image.open(source if encoded is None else io.BytesIO(encoded)) as image:
            return _upright_rgb(image)


def read_image(source: Path | bytes, owner: str) -> bytes:
    """The encoded bytes of an image; raises a UserError that names `owner` and the file if it cannot."""
    with _naming(source, owner):
        return source.read_bytes() if isinstance(source, Path) else source


@contextmanager
def _naming(source: ImageSource, owner: str) -> Iterator[None]:
    """Turn an error about an image into one line that names its sample."""
    if isinstance(source, Image.Image):
        name = "in memory"
    else:
        name = str(source) if isinstance(source, Path) else f"of {len(source)} bytes"
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"sample {owner}: image {name} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"sample {owner}: image {name} is in no known image format") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"sample {owner}: image {name} cannot be read: {one_line(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # Pillow would clip these to 0..255: a 16-bit satellite tile would turn white
        raise UserError(f"it has more than 8 bits a channel (mode {image.mode}); convert it to 8")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:  # transparent pixels have arbitrary colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """A smaller copy of an image, of about the same shape, with at most `max_pixels` pixels."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    height = min(max(1, int(image.height * scale)), max_pixels)
    width = min(max(1, int(image.width * scale)), max_pixels // height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def read_samples(path: Path | str, image_root: Path | str | None = None) -> list[Sample]:
    """Read the samples in a JSONL or parquet file, or in a .json file with one list of them.

    Columns: `prompt` (text with `<image>` markers, or chat messages), `images` (a list of paths, relative to
    `image_root` or else to the file; or of {"path", "bytes"} as Hugging Face datasets store them),
    `response`, `answer`, `id`. Other columns become metadata; null counts as absent. If a prompt marks no
    image, all images go before its first user text.

    Raises:
        UserError: the file is missing, empty or of another type, or a row is malformed; names file and row
            (the line in JSONL).
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    samples: dict[str, tuple[int, Sample]] = {}
    for number, row in read_rows(path):
        sample = sample_of(row, f"{path}, row {number}", root)
        if sample.id in samples:
            raise UserError(f"{path}: rows {samples[sample.id][0]} and {number} share the id {sample.id!r}")
        samples[sample.id] = number, sample
    if not samples:
        raise UserError(f"{path} holds no samples")
    return [sample for _, sample in samples.values()]


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a JSONL, JSON or parquet file, numbered from 1; in JSONL, row numbers are lines.

    The `datasets` package is not used: it writes a cache and wants one type per column.

    Raises:
        UserError: the file is missing, of another type, or cannot be read; names it.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise UserError(f"data file {path}: expected .jsonl, .json or .parquet")
    size = path.stat().st_size
    if size == 0:
        return
    if path.suffix == ".jsonl":
        yield from read_lines(path)
    elif path.suffix == ".parquet":
        yield from enumerate(read_parquet(path), 1)
    else:
        try:
            if size > MAX_JSON:
                raise UserError(f"it takes more than {MAX_JSON >> 30} GiB; .jsonl has no limit")
            rows = json.loads(path.read_text("utf-8-sig"))
            if not isinstance(rows, list):
                raise UserError(f"it is a {type(rows).__name__}, not a list of samples")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"data file {path} cannot be read: {one_line(error)}") from error
        yield from enumerate(rows, 1)


def read_parquet(path: Path, columns: Callable[[list[str]], list[str]] = list) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, with few in memory at a time, since they may hold images.

    Args:
        columns: given all column names, returns the ones to read.

    Raises:
        UserError: the file cannot be read; names it.
    """
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64, columns=columns(table.schema_arrow.names)):
                yield from batch.to_pylist()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
        raise UserError(f"data file {path} cannot be read: {one_line(error)}") from error


def sample_of(row: Any, where: str, root: Path) -> Sample:
    """Make a sample from a row, as `read_samples` does.

    Args:
        where: names the row in errors; also the sample's id if the row has none.
        root: the folder that relative paths start from.

    Raises:
        UserError: the row is malformed; the message begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a sample must be a mapping of columns, got {shown(row)}")
    columns = {key: value for key, value in row.items() if value is not None}
    if "prompt" not in columns:
        raise UserError(f"{where}: no column 'prompt'; it has {', '.join(sorted(columns)) or 'none'}")
    images = columns.pop("images", [])
    if not isinstance(images, list):
        raise UserError(f"{where}: 'images' must be a list, got {shown(images)}")
    name = _text_of(columns, "id", where) or where
    try:
        return Sample(
            id=name,
            messages=_messages(columns.pop("prompt"), where, len(images)),
            images=tuple(_image_source(image, where, root) for image in images),
            response=_text_of(columns, "response", where),
            answer=_text_of(columns, "answer", where),
            metadata=columns,
        )
    except ValueError as error:
        reason = str(error).removeprefix(f"sample {name}: ").removeprefix(f"{where}: ")
        raise UserError(f"{where}: {reason}") from error


def _text_of(columns: dict[str, Any], name: str, where: str) -> str | None:
    """Remove and return a column of text; numbers become text."""
    value = columns.pop(name, None)
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name!r} must be text or a number, got {shown(value)}")
    return None if value is None else str(value)


def _image_source(image: Any, where: str, root: Path) -> ImageSource:
    if isinstance(image, str):
        return root / image
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, Mapping) and isinstance(image.get("path"), str):
        return root / image["path"]
    raise UserError(f"{where}: an image must be a path or {{'path', 'bytes'}}, got {shown(image)}")


def _messages(prompt: Any, where: str, num_images: int) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UserError(f"{where}: 'prompt' must be text or a list of messages, got {shown(prompt)}")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: a message must have role and content, got {shown(message)}")
        messages.append({"role": message["role"], "content": _parts(message.get("content"), where)})
    if num_images and messages and not any(p["type"] == "image" for m in messages for p in m["content"]):
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    return tuple(messages)


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    if isinstance(content, str):
        for index, text in enumerate(content.split(IMAGE_MARKER)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
        return parts
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be text or a list of parts, got {shown(content)}")
    for part in content:  # parts may have more keys: tables fill keys that only other parts use with null
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise UserError(f"{where}: a content part must be text or image, got {shown(part)}")
    return parts


def shown(value: Any) -> str:
    """A value's type and its first characters, for an error."""
    return f"{type(value).__name__} {value!r:.80}"
