"""Write a sample as messages for a chat endpoint, and read the reply in a response."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from geo_r1.data.decoding import ImageSource, load_image, read_image, shrink
from geo_r1.data.sample import Sample
from geo_r1.files import data_uri

MAX_REPLY = 2**20  # bytes of a response: a chain of thought takes some kilobytes
SMALL_IMAGE = 2**20  # bytes; a smaller image file may be sent unchanged
LOSSLESS_PIXELS = 2**16  # images encoded here are PNG up to this size, then JPEG
HARMLESS = frozenset(  # a file with only this metadata may be sent unchanged
    {"adobe", "adobe_transform", "background", "dpi", "duration", "gamma", "interlace", "jfif"}
    | {"jfif_density", "jfif_unit", "jfif_version", "loop", "progression", "progressive", "srgb", "timestamp"}
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """A model's reply; token counts are 0 if the endpoint does not report them."""

    text: str
    input_tokens: int
    output_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Failure:
    """Why a request got no reply; `again` if another try may succeed."""

    reason: str
    again: bool = False


def chat_messages(
    sample: Sample, system: str | None = None, text: str | None = None, *, max_pixels: int | None = None
) -> Messages:
    """A sample's prompt as OpenAI chat messages, its images attached as data URIs.

    Args:
        system: a system message to begin with.
        text: added after the sample's prompt, in its last message if that is the user's.
        max_pixels: larger images are shrunk to this.

    Raises:
        UserError: an image is missing or broken; names the sample and the file.
    """
    images = iter(sample.images)
    messages: Messages = [{"role": "system", "content": [_text(system)]}] if system is not None else []
    for message in sample.messages:
        parts = [
            _text(part["text"])
            if part["type"] == "text"
            else {"type": "image_url", "image_url": {"url": _data_uri(next(images), sample, max_pixels)}}
            for part in message["content"]
        ]
        messages.append({"role": message["role"], "content": parts})
    if text is not None:
        if messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": []})
        messages[-1]["content"].append(_text(text))
    for message in messages:  # some servers refuse lists of parts in text-only messages
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "\n\n".join(part["text"] for part in message["content"])
    return messages


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _data_uri(source: ImageSource, sample: Sample, max_pixels: int | None) -> str:
    encoded = source if isinstance(source, bytes) else None
    if (
        not isinstance(source, Image.Image | bytes)
        and source.is_file()
        and source.stat().st_size <= SMALL_IMAGE
    ):
        encoded = read_image(source, sample.id, sample.image_root)
    image = load_image(source, sample.id, encoded, sample.image_root)
    fits = max_pixels is None or image.width * image.height <= max_pixels
    if encoded is None or not fits or (kind := _as_it_is(encoded)) is None:
        kind, encoded = _encode(image if fits else shrink(image, max_pixels or 1))
    return data_uri(f"image/{kind}", encoded)


def _as_it_is(encoded: bytes) -> str | None:
    """The image type if the file can be sent unchanged, else None.

    Other metadata is never sent: it may give away the coordinates, or hold a rotation that servers ignore.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        plain = image.mode in ("RGB", "L") and image.info.keys() <= HARMLESS and not image.getexif()
        plain = plain and getattr(image, "n_frames", 1) == 1
        kinds = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
        return kinds.get(image.format or "") if plain and len(encoded) <= SMALL_IMAGE else None


def _encode(image: Image.Image) -> tuple[str, bytes]:
    buffer, lossless = io.BytesIO(), image.width * image.height <= LOSSLESS_PIXELS
    image.save(buffer, **({"format": "PNG"} if lossless else {"format": "JPEG", "quality": 92}))
    return "png" if lossless else "jpeg", buffer.getvalue()


def reply_of(body: bytes) -> Reply | Failure:
    """Read a response of status 200."""
    if len(body) > MAX_REPLY:
        return Failure(f"the response is longer than {MAX_REPLY >> 20} MiB")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return Failure("the response is not JSON", again=True)
    match value:
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            pass
        case _:
            return Failure("the response has no choices", again=True)
    finish, text = str(choice.get("finish_reason") or "unknown"), message.get("content")
    if finish == "content_filter" or message.get("refusal"):
        return Failure(f"the model refuses: {message.get('refusal') or finish}")
    if not isinstance(text, str) or not text.strip():
        return Failure(f"the reply is empty (finish reason {finish})", again=finish != "length")
    usage = value.get("usage")
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written as UTF-8
    return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), finish)


def _count(usage: Any, key: str) -> int:
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0
