"""Chat messages in rows: read so that nothing is lost, with images where the text has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from geo_r1.errors import UserError

IMAGE_MARKER = "<image>"
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")  # of an image part, in the styles of the field
Turn = dict[str, Any]  # role, content
Part = dict[str, Any]  # {"type": "text", "text"} or {"type": "image"}; the latter may hold its "image"


def shown(value: Any) -> str:
    """A value's type and its first characters, for an error."""
    return f"{type(value).__name__} {value!r:.80}"


def is_absent(value: Any) -> bool:
    """True for null and NaN: tables fill cells of a row with these if only other rows have the column."""
    return value is None or (isinstance(value, float) and value != value)


def read_turns(
    value: Any, role: str = "role", content: str = "content", names: Mapping[str, str] | None = None
) -> list[Turn]:
    """Rename a message's keys and roles to ours; anything that would be lost is an error.

    Args:
        value: a list of messages.
        role, content: names of these keys in a message.
        names: our role name -> the format's; None if they are the same.

    Raises:
        UserError: `value` is malformed, or a message does not fit our prompts.
    """
    if not isinstance(value, list):
        raise UserError(f"its messages must be a list, got {shown(value)}")
    own_names = {theirs: own for own, theirs in (names or {}).items()}
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
            raise UserError(f"a message must have {role} and {content}, got {shown(turn)}")
        if lost := [key for key, item in turn.items() if key not in (role, content) and not is_absent(item)]:
            raise UserError(f"a message has {lost[0]!r:.80}, which is not read")
        if names and turn[role] not in own_names:
            raise UserError(f"{role} must be one of {', '.join(own_names)}; got {shown(turn[role])}")
        turns.append({"role": own_names.get(turn[role], turn[role]), "content": turn.get(content)})
    return turns


def placed(turns: Sequence[Turn], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Give each image its place.

    Args:
        turns: messages; contents are texts with `<image>` markers or lists of parts, whose texts may have
            markers too and whose image parts may hold their images.
        images: of the markers and of the image parts that hold none, in order. If there are none of either,
            all images go before the first text of the user.

    Returns:
        The messages with contents of plain parts, and the images of all image parts in order.

    Raises:
        UserError: a content is malformed, or the numbers differ.
    """
    messages: list[Turn] = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in turns]
    marks = [part for turn in messages for part in turn["content"] if part["type"] == "image"]
    if images and messages and not marks:
        first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        marks = [{"type": "image"} for _ in images]
        first["content"] = [*marks, *first["content"]]
    inline = [part for part in marks if "image" in part]
    if messages and len(marks) - len(inline) != len(images):
        raise UserError(
            f"the prompt marks {len(marks)} images but the sample has {len(images) + len(inline)}"
        )
    column = iter(images)
    found = [part.pop("image") if "image" in part else next(column) for part in marks]
    return messages, found if messages else images


def text_of(content: Any) -> str:
    """The text of a response; raises UserError if it holds anything else."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"a response must be text, got {shown(content)}")
    return "".join(map(str, texts))


def _parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return _marked(content)
    if not isinstance(content, list):
        raise UserError(f"content must be text or a list of parts, got {shown(content)}")
    return [own for part in content for own in _part(part)]


def _marked(text: str) -> list[Part]:
    parts: list[Part] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _part(part: Any) -> list[Part]:
    """A part in our form; tables fill keys that only other parts use with null, or with empty text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    own = {key: value for key, value in part.items() if not is_absent(value)} if kind else {}
    known: tuple[str, ...] = ("type", "text")
    if kind == "text" and isinstance(own.get("text"), str):
        parts = _marked(own["text"])
    elif kind in ("image", "image_url"):
        held = [own[key] for key in IMAGE_KEYS if own.get(key)]
        if len(held) > 1 or (kind == "image_url" and not held):
            raise UserError(f"an image part must hold one image, got {shown(part)}")
        parts, known = [{"type": "image"} | ({"image": held[0]} if held else {})], ("type", *IMAGE_KEYS)
    else:
        raise UserError(f"a content part must be text or image, got {shown(part)}")
    if lost := [key for key, value in own.items() if key not in known and value != ""]:
        raise UserError(f"a content part has {lost[0]!r:.80}, which is not read")
    return parts
