"""One sample: a prompt with its images in order, and what is known of the answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_MARKER = "<image>"
ImageSource = Image.Image | Path | bytes


@dataclass(frozen=True)
class Sample:
    """A prompt that a model answers.

    Attributes:
        id: names the sample in errors, reports and random streams; unique in its data set.
        messages: chat messages, each {"role", "content"}; content is a list of parts, {"type": "text", "text"}
            or {"type": "image"}; the n-th image part stands for the n-th of `images`.
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
            raise ValueError(f"sample {self.id}: the prompt marks {markers} images but the sample has {len(self.images)}")


def load_image(source: ImageSource, owner: str) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        ValueError: the file is missing or is not a whole picture; names `owner` and the file.
    """
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else source.convert("RGB")
    name = str(source) if isinstance(source, Path) else f"{len(source)} bytes of picture data"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"sample {owner}: image {name} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"sample {owner}: image {name} cannot be read: {error}") from error


def read_samples(path: Path | str, image_root: Path | str | None = None) -> list[Sample]:
    """Read a JSONL or parquet file of samples.

    Columns: `prompt` (text with `<image>` markers, or chat messages), `images` (paths, relative to `image_root`
    or else to the file; or {"path", "bytes"} as Hugging Face datasets store them), `response`, `answer`, `id`.
    All others become metadata. A prompt that marks no image gets all of them before its first user text.

    Raises:
        ValueError: the file is missing, empty, of another type, or a row is malformed; names file and row.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    samples = [_from_row(row, f"{path}, row {number}", root) for number, row in enumerate(_rows(path), 1)]
    if not samples:
        raise ValueError(f"{path} holds no samples")
    seen: dict[str, int] = {}
    for number, sample in enumerate(samples, 1):
        if sample.id in seen:
            raise ValueError(f"{path}: rows {seen[sample.id]} and {number} share the id {sample.id!r}")
        seen[sample.id] = number
    return samples


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist")
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None:
        raise ValueError(f"data file {path}: expected .jsonl or .parquet")
    if path.stat().st_size == 0:
        return
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"data file {path} cannot be read: {reason}") from error
    yield from table


def _from_row(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    columns = {key: value for key, value in row.items() if value is not None}
    if "prompt" not in columns:
        raise ValueError(f"{where}: no column 'prompt'; it has {', '.join(sorted(columns)) or 'none'}")
    images = tuple(_image_source(image, where, root) for image in columns.pop("images", ()))
    answer = columns.pop("answer", None)
    response = columns.pop("response", None)
    try:
        return Sample(
            id=str(columns.pop("id", where)),
            messages=_messages(columns.pop("prompt"), where, len(images)),
            images=images,
            response=None if response is None else str(response),
            answer=None if answer is None else str(answer),
            metadata=columns,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _image_source(image: Any, where: str, root: Path) -> ImageSource:
    if isinstance(image, str):
        return root / image
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, Mapping) and isinstance(image.get("path"), str):
        return root / image["path"]
    raise ValueError(f"{where}: an image must be a path or {{'path', 'bytes'}}, got {type(image).__name__}")


def _messages(prompt: Any, where: str, num_images: int) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt):
        raise ValueError(f"{where}: 'prompt' must be text or messages with role and content, got {json.dumps(prompt, default=str)[:80]}")
    messages = [{"role": m["role"], "content": _parts(m["content"], where)} for m in prompt]
    if num_images and not any(part["type"] == "image" for m in messages for part in m["content"]):
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    return tuple(messages)


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        parts: list[dict[str, str]] = []
        for index, text in enumerate(content.split(IMAGE_MARKER)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
        return parts
    parts = []
    for part in content:
        if part.get("type") == "image":
            parts.append({"type": "image"})
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"{where}: a content part must be text or image, got {json.dumps(part, default=str)[:80]}")
    return parts
