"""What is said to a chat endpoint, and what comes back: a sample as messages, a response as a reply."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from geo_r1.data.sample import ImageSource, Sample, load_image, read_image

MAX_RETRY_AFTER = 300.0  # seconds that a server can ask for
SMALL_PICTURE = 2**20  # bytes up to which a picture is sent as the file that it is
LOSSLESS_PIXELS = 2**16  # pictures made here are sent as PNG up to this size, as JPEG beyond
HARMLESS = frozenset(  # what a file may say beside its pixels when it is sent as it is
    {"adobe", "adobe_transform", "background", "dpi", "duration", "gamma", "interlace", "jfif"}
    | {"jfif_density", "jfif_unit", "jfif_version", "loop", "progression", "progressive", "srgb", "timestamp"}
)
AGAIN = frozenset({408, 409, 425, 429})  # and all from 500
HOPELESS = frozenset({401, 402, 403, 404, 405})  # for every sample, as are redirections
HOPELESS_CODES = frozenset({"model_not_found", "insufficient_quota", "unsupported_parameter"})

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What a model said; tokens are 0 where the endpoint does not count them."""

    text: str
    input_tokens: int
    output_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Failure:
    """Why there is no reply to a request."""

    reason: str


class Trouble(Exception):  # noqa: N818 - no error of the program's
    """What went wrong with a try of a request.

    Attributes:
        again: the next try may go better.
        hopeless: no request will go better.
        unreached: there was no connection.
        wait: seconds that the server asks for.
    """

    def __init__(
        self,
        reason: str,
        *,
        again: bool = False,
        hopeless: bool = False,
        unreached: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.again, self.hopeless, self.unreached, self.wait = again, hopeless, unreached, wait


def chat_messages(
    sample: Sample, system: str | None = None, text: str | None = None, *, max_pixels: int | None = None
) -> Messages:
    """A sample's prompt as OpenAI chat messages, its pictures attached as data URIs.

    Args:
        system: a system message to begin with.
        text: said after the sample's own prompt, in the same message where that is the user's.
        max_pixels: larger pictures are shrunk to it.

    Raises:
        ValueError: a picture is missing or broken; names the sample and the file.
    """
    images = iter(sample.images)
    messages: Messages = [{"role": "system", "content": [_text(system)]}] if system is not None else []
    for message in sample.messages:
        parts = [
            _text(part["text"])
            if part["type"] == "text"
            else {"type": "image_url", "image_url": {"url": _data_uri(next(images), sample.id, max_pixels)}}
            for part in message["content"]
        ]
        messages.append({"role": message["role"], "content": parts})
    if text is not None:
        if messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": []})
        messages[-1]["content"].append(_text(text))
    for message in messages:  # not every server takes parts of each role where text is all there is
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "\n\n".join(part["text"] for part in message["content"])
    return messages


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _data_uri(source: ImageSource, owner: str, max_pixels: int | None) -> str:
    encoded = source if isinstance(source, bytes) else None
    if not isinstance(source, Image.Image | bytes) and source.is_file():
        encoded = read_image(source, owner) if source.stat().st_size <= SMALL_PICTURE else None
    image = load_image(source, owner, encoded)
    fits = max_pixels is None or image.width * image.height <= max_pixels
    if encoded is None or not fits or (kind := _as_it_is(encoded)) is None:
        kind, encoded = _encode(image if fits else _shrink(image, max_pixels or 1))
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _as_it_is(encoded: bytes) -> str | None:
    """The kind of a picture that can be sent as the file it is; None if not.

    Metadata stays here: it may hold the very coordinates that are asked for, or a turn that servers overlook.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        plain = image.mode in ("RGB", "L") and image.info.keys() <= HARMLESS and not image.getexif()
        plain = plain and getattr(image, "n_frames", 1) == 1
        kinds = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
        return kinds.get(image.format or "") if plain and len(encoded) <= SMALL_PICTURE else None


def _encode(image: Image.Image) -> tuple[str, bytes]:
    buffer, lossless = io.BytesIO(), image.width * image.height <= LOSSLESS_PIXELS
    image.save(buffer, **({"format": "PNG"} if lossless else {"format": "JPEG", "quality": 92}))
    return "png" if lossless else "jpeg", buffer.getvalue()


def _shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    scale = math.sqrt(max_pixels / (image.width * image.height))
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def trouble_of(status: int, retry_after: str, body: bytes) -> Trouble:
    """Judge a response that is not a success."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, Mapping) else value
    if isinstance(error, Mapping):
        said = str(error.get("message") or error.get("detail") or error)
        code, param = error.get("code"), error.get("param")
    else:
        said, code, param = error if isinstance(error, str) else body.decode("utf-8", "replace"), None, None
    hopeless = status < 400 or status in HOPELESS or param == "model"
    hopeless = hopeless or (isinstance(code, str) and code in HOPELESS_CODES)
    return Trouble(
        f"status {status}: {said}",
        again=not hopeless and (status in AGAIN or status >= 500),
        hopeless=hopeless,
        wait=_seconds(retry_after),
    )


def _seconds(retry_after: str) -> float:
    try:
        seconds = float(retry_after)
    except ValueError:  # a date, or nothing
        return 0.0
    return min(seconds, MAX_RETRY_AFTER) if seconds > 0 else 0.0


def reply_of(body: bytes) -> Reply:
    """Read a response.

    Raises:
        Trouble: it is rubbish, empty, or a refusal.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Trouble("the response is not JSON", again=True) from None
    match value:
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            pass
        case _:
            raise Trouble("the response has no choices", again=True)
    finish, text = str(choice.get("finish_reason") or "unknown"), message.get("content")
    if finish == "content_filter" or message.get("refusal"):
        raise Trouble(f"the model refuses: {message.get('refusal') or finish}")
    if not isinstance(text, str) or not text.strip():
        raise Trouble(f"the reply is empty (finish reason {finish})", again=finish != "length")
    usage = value.get("usage")
    tokens = [
        count if isinstance(usage, dict) and isinstance(count := usage.get(key), int) and count > 0 else 0
        for key in ("prompt_tokens", "completion_tokens")
    ]
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written as UTF-8
    return Reply(text, tokens[0], tokens[1], finish)
