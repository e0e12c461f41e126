"""Write and reorder chat turns in other trainers' formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from geo_r1.data.messages import IMAGE_MARKER
from geo_r1.errors import UserError

Parts = list[dict[str, Any]]
IMAGE = {"type": "image"}


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
