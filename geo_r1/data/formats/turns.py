"""Read, write and reorder chat turns in other trainers' formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from geo_r1.data.sample import IMAGE_MARKER, shown
from geo_r1.errors import UserError

Turn = dict[str, Any]  # role, content
Parts = list[dict[str, Any]]
IMAGE = {"type": "image"}


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
        if lost := [key for key, item in turn.items() if key not in (role, content) and item is not None]:
            raise UserError(f"a message has {lost[0]!r:.80}, which is not read")
        if names and turn[role] not in own_names:
            raise UserError(f"{role} must be one of {', '.join(own_names)}; got {shown(turn[role])}")
        said = turn.get(content)
        for part in said if isinstance(said, list) else []:
            if isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is not None:
                raise UserError("an image part holds its image; they are read from the column 'images'")
        turns.append({"role": own_names.get(turn[role], turn[role]), "content": said})
    return turns


def unmarked(turns: list[Turn]) -> list[Turn]:
    """Keep `<image>` as an ordinary word, for formats without markers."""
    for turn in turns:
        if isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
    return turns


def text_of(content: Any) -> str:
    """The text of a response; raises UserError if it holds anything else."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"a response must be text, got {shown(content)}")
    return "".join(map(str, texts))


def merged(parts: Iterable[Mapping[str, Any]]) -> Parts:
    """Parts, with neighbouring texts joined and empty ones left out."""
    out: Parts = []
    for part in parts:
        if part["type"] == "text" and out and out[-1]["type"] == "text":
            out[-1] = {"type": "text", "text": out[-1]["text"] + part["text"]}
        elif part["type"] == "image" or part["text"]:
            out.append(dict(part))
    return out


def marked(parts: Parts) -> str:
    """Text with a marker for each image; raises UserError if the text itself says `<image>`."""
    if any(IMAGE_MARKER in part.get("text", "") for part in parts):
        raise UserError(f"its text says {IMAGE_MARKER}, which would be taken for an image")
    return "".join(IMAGE_MARKER if part["type"] == "image" else part["text"] for part in parts)


def system_first(system: Parts, user: Parts) -> Parts:
    """Merge two turns: the system's text comes first, but after any images at the beginning."""
    lead = 0
    while IMAGE not in system and lead < len(user) and user[lead] == IMAGE:
        lead += 1
    return merged([*user[:lead], *system, {"type": "text", "text": "\n\n"}, *user[lead:]])


def images_first(parts: Parts) -> Parts:
    """Move images before all text; text names each image that stood in it by its number."""
    text, number = "", 0
    for part in parts:
        if part["type"] == "image":
            number += 1
            gap = " " if text and not text[-1].isspace() and text[-1] not in "([\"'" else ""
            text += f"{gap}image {number}" if text else ""
        else:
            text += " " + part["text"] if text and part["text"][0].isalnum() else part["text"]
    return [*[IMAGE] * number, {"type": "text", "text": text}]
