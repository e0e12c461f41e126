"""One sample: a prompt with its images in order, and what is known of the answer."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from geo_r1.data.journal import read_lines

IMAGE_MARKER = "<image>"
MAX_JSON = 2 * 2**30  # bytes of a .json file, which is parsed whole
ImageSource = Image.Image | Path | bytes


@dataclass(frozen=True)
class Sample:
    """A prompt that a model answers.

    Attributes:
        id: names the sample in errors, reports and random streams; unique in its data set.
        messages: chat messages, each {"role", "content"}; content is a list of parts, {"type": "text",
            "text"} or {"type": "image"}; the n-th image part stands for the n-th of `images`.
        images: pictures, paths, or encoded bytes, in order.
        response: what supervised fine-tuning learns to say; None where there is none.
        answer: the truth that rewards compare with; None where there is none.
        metadata: further columns; they reach reward functions by name.

    Raises:
        ValueError: the number of image parts is not the number of images, or there is no message.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    response: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"sample {self.id}: the prompt is empty")
        markers = sum(part["type"] == "image" for message in self.messages for part in message["content"])
        if markers != len(self.images):
            raise ValueError(
                f"sample {self.id}: the prompt marks {markers} images but the sample has {len(self.images)}"
            )


def load_image(source: ImageSource, owner: str, encoded: bytes | None = None) -> Image.Image:
    """Decode a picture to RGB, upright as its EXIF orientation says, on white where it is transparent.

    Args:
        owner: the sample's name, for errors.
        encoded: what `read_image` has read of this source, if it was read before.

    Raises:
        ValueError: the file is missing, is not a whole picture, or has more than 8 bits a channel; names
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
    """The encoded bytes of a picture; raises ValueError, with `owner` and the file, if it cannot be read."""
    with _naming(source, owner):
        return source.read_bytes() if isinstance(source, Path) else source


@contextmanager
def _naming(source: ImageSource, owner: str) -> Iterator[None]:
    """Turn what goes wrong with a picture into one line that says whose it is."""
    if isinstance(source, Image.Image):
        name = "in memory"
    else:
        name = str(source) if isinstance(source, Path) else f"of {len(source)} bytes"
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"sample {owner}: image {name} does not exist") from None
    except UnidentifiedImageError:
        raise ValueError(f"sample {owner}: image {name} is not a picture") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"sample {owner}: image {name} cannot be read: {_one_line(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # Pillow would clip these to 0..255: a 16-bit satellite tile would turn white
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); convert it to 8")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:  # the pixels below are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_samples(path: Path | str, image_root: Path | str | None = None) -> list[Sample]:
    """Read a JSONL or parquet file of samples; a .json file holds one list of them.

    Columns: `prompt` (text with `<image>` markers, or chat messages), `images` (a list of paths, relative to
    `image_root` or else to the file; or of {"path", "bytes"} as Hugging Face datasets store them),
    `response`, `answer`, `id`. All others become metadata; null counts as absent. A prompt that marks no
    image gets all of them before its first user text.

    Raises:
        ValueError: the file is missing, empty, of another type, or a row is malformed; names file and row,
            which in JSONL is the line.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    samples: dict[str, tuple[int, Sample]] = {}
    for number, row in read_rows(path):
        sample = sample_of(row, f"{path}, row {number}", root)
        if sample.id in samples:
            raise ValueError(f"{path}: rows {samples[sample.id][0]} and {number} share the id {sample.id!r}")
        samples[sample.id] = number, sample
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return [sample for _, sample in samples.values()]


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a JSONL, JSON or parquet file, numbered from 1; JSONL by the line, as it is read.

    Not read by `datasets`, which writes a cache and wants one type a column.

    Raises:
        ValueError: the file is missing, of another type, or cannot be read; names it.
    """
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"data file {path}: expected .jsonl, .json or .parquet")
    size = path.stat().st_size
    if size == 0:
        return
    if path.suffix == ".jsonl":
        yield from read_lines(path)
        return
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as table:
                batches = table.iter_batches(batch_size=64)  # rows may hold pictures
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        if size > MAX_JSON:
            raise ValueError(f"it takes more than {MAX_JSON >> 30} GiB; .jsonl has no limit")
        rows = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError(f"it is a {type(rows).__name__}, not a list of samples")
        yield from enumerate(rows, 1)
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's are among them
        raise ValueError(f"data file {path} cannot be read: {_one_line(error)}") from error


def sample_of(row: Any, where: str, root: Path) -> Sample:
    """Make a sample of a row as `read_samples` does.

    Args:
        where: names the row in errors, and the sample if it has no id.
        root: what relative paths start from.

    Raises:
        ValueError: the row is malformed; begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a sample must be a mapping of columns, got {_shown(row)}")
    columns = {key: value for key, value in row.items() if value is not None}
    if "prompt" not in columns:
        raise ValueError(f"{where}: no column 'prompt'; it has {', '.join(sorted(columns)) or 'none'}")
    images = columns.pop("images", [])
    if not isinstance(images, list):
        raise ValueError(f"{where}: 'images' must be a list, got {_shown(images)}")
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
        raise ValueError(f"{where}: {reason}") from error


def _text_of(columns: dict[str, Any], name: str, where: str) -> str | None:
    """Take a column of text, or of numbers that stand for their text."""
    value = columns.pop(name, None)
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {name!r} must be text or a number, got {_shown(value)}")
    return None if value is None else str(value)


def _image_source(image: Any, where: str, root: Path) -> ImageSource:
    if isinstance(image, str):
        return root / image
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, Mapping) and isinstance(image.get("path"), str):
        return root / image["path"]
    raise ValueError(f"{where}: an image must be a path or {{'path', 'bytes'}}, got {_shown(image)}")


def _messages(prompt: Any, where: str, num_images: int) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError(f"{where}: 'prompt' must be text or a list of messages, got {_shown(prompt)}")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: a message must have role and content, got {_shown(message)}")
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
        raise ValueError(f"{where}: content must be text or a list of parts, got {_shown(content)}")
    for part in content:  # a part may have further keys: tables fill the ones that other parts use with null
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"{where}: a content part must be text or image, got {_shown(part)}")
    return parts


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
