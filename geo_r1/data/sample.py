"""Samples: prompts with images and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geo_r1.data.columns import image_source, own_columns
from geo_r1.data.decoding import ImageSource
from geo_r1.data.messages import shown
from geo_r1.errors import UserError

LONGEST_ID = 500  # characters; errors, reports and file names say it


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
        where: file and row, if it was read from one.
        image_root: the folder that image files must be in; None allows any.

    Raises:
        UserError: the numbers of image parts and images differ, or there is no message.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    response: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    image_root: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise UserError(f"sample {self.id}: the prompt is empty")
        markers = sum(part["type"] == "image" for message in self.messages for part in message["content"])
        if markers != len(self.images):
            raise UserError(
                f"sample {self.id}: the prompt marks {markers} images but the sample has {len(self.images)}"
            )


def sample_of(row: Any, where: str, root: Path, *, fenced: bool = False) -> Sample:
    """Make a sample from a row, as `read_samples` does.

    Args:
        where: names the row in errors; also the sample's id if the row has none.
        root: the folder that relative paths start from.
        fenced: image files must be in `root`.

    Raises:
        UserError: the row is malformed; the message begins with `where`.
    """
    try:
        if not isinstance(row, Mapping):
            raise UserError(f"a sample must be a mapping of columns, got {shown(row)}")
        columns = own_columns(row)
        messages = columns.pop("prompt")
        if not messages:
            raise UserError("the prompt is empty")
        name, response, answer = (_text_of(columns, key) for key in ("id", "response", "answer"))
        if name and len(name) > LONGEST_ID:
            raise UserError(f"its id has {len(name):,} characters, more than {LONGEST_ID}")
        _check_unicode([name, response, answer, *(p.get("text") for m in messages for p in m["content"])])
        images = tuple(image_source(image, root) for image in columns.pop("images"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fence = root if fenced else None
    return Sample(name or where, tuple(messages), images, response, answer, columns, where, fence)


def _text_of(columns: dict[str, Any], name: str) -> str | None:
    """Remove and return a column of text; numbers become text."""
    value = columns.pop(name, None)
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{name!r} must be text or a number, got {shown(value)}")
    return None if value is None else str(value)


def _check_unicode(texts: Sequence[str | None]) -> None:
    """Refuse halves of surrogate pairs, which JSON can hold and tokenizers cannot read."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"its text is not Unicode: {error.reason} at character {error.start}") from error
