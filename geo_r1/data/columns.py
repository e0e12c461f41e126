"""Columns of a row by the names that the field uses, read as our own; nothing that says something is dropped.

Sources: the data formats of TRL, LLaMA-Factory, ms-swift, verl, open-r1 and EasyR1, as their documentation
has them. `formats` reads whole rows of one of them; here are the names that mean the same everywhere.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geo_r1.answers import extract_answer
from geo_r1.data.decoding import ImageSource
from geo_r1.data.messages import is_absent, placed, read_turns, shown, text_of
from geo_r1.errors import UserError

Columns = dict[str, Any]
OWN = ("prompt", "images", "response", "answer", "id")
SYSTEM = ("system", "system_prompt")
CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "problem", "query", "instruction")
CHOICES = ("options", "choices")
ANSWERS = ("solution", "ground_truth")
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}

_ONLY = "only text and images are read"
_PAIRS = "preferences are not learned; name the text to learn 'response'"
UNREAD = {  # columns that change what a model is shown or taught, and what to do about them
    **dict.fromkeys(("video", "videos", "audio", "audios"), _ONLY),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_images", "rejected_messages"), _PAIRS
    ),
    **dict.fromkeys(("tools", "functions", "tool_calls"), "prompts have no tools"),
    "history": "write earlier turns into 'prompt', as messages",
    "multi_modal_data": "name its images 'images'",
    "chat_template_kwargs": "the chat template gets no options",
}
# Names of columns with images; "image" is read, "images" is ours.
_IMAGE_NAMES = re.compile(
    r"file_name|(?:image|img)s?(?:_?(?:paths?|files?|names?|urls?|uris?|bytes|data|base64|b64))?"
)
_NUMBERED = re.compile(r"(?:image|img)_?\d{1,2}")
_KNOWN = {*OWN, *SYSTEM, *CHATS, *QUESTIONS, *UNREAD, "image", "input", "output", "completion"}

_EXACT = 2**53  # floats hold every integer up to here
_SIGNATURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|GIF8|II\*\0|MM\0\*|....ftyp", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST = 64  # characters of base64 without a dot or a space: no image file is called that


def present(row: Mapping[str, Any]) -> Columns:
    """The columns that hold something, whole numbers as integers: tables store nullable ones as floats."""
    return {key: whole(value) for key, value in row.items() if not is_absent(value)}


def whole(value: Any) -> Any:
    """A float without a fraction as an integer; anything else unchanged."""
    exact = isinstance(value, float) and abs(value) < _EXACT and value.is_integer()
    return int(value) if exact else value


def own_columns(row: Mapping[str, Any]) -> Columns:
    """A row with our columns, read from the field's where it has none of ours; the others are unchanged.

    `image` is read as images; `messages` and their like, `question` and its like as the prompt; `system` as
    its first message; `completion` and the last assistant's message as the response; `solution` and its like
    as the answer, and stay for reward functions.

    Returns:
        The columns that hold something. A prompt of messages has plain parts, and `images` those of its
        image parts in order.

    Raises:
        UserError: a column would be lost, or could be read in several ways; names it, and what would work.
    """
    columns = present(row)
    _check_names(columns)
    _set_images(columns)
    _set_prompt(columns)
    _set_response(columns)
    _set_answer(columns)
    return columns


def bare(answer: Any) -> Any:
    """An answer without the tags that some data sets put around it."""
    inner = extract_answer(answer) if isinstance(answer, str) else None
    return answer if inner is None else inner


def image_source(image: Any, root: Path) -> ImageSource:
    """An image of a row: a path, bytes, base64, a data URI, or a mapping with one of them.

    Args:
        root: the folder that relative paths start from.

    Raises:
        UserError: it is none of these, or an address that would have to be downloaded.
    """
    found = image
    if isinstance(image, Mapping):
        keys = [key for key in ("bytes", "path", "url", "base64") if not is_absent(image.get(key))]
        found = image[keys[0]] if keys else None
        if isinstance(found, str) and keys[0] in ("bytes", "base64"):
            found = found if found.startswith("data:") else f"data:;base64,{found}"
    if isinstance(found, bytes):
        return found
    if not isinstance(found, str):
        raise UserError(f"an image must be a path or {{'path', 'bytes'}}, got {shown(image)}")
    if found.startswith("data:"):
        return _decoded(found)
    if (scheme := found[:32].partition("://"))[1] and scheme[0].isalnum():
        if scheme[0] != "file":
            raise UserError(f"an image must be a file, got the address {found!r:.80}; download it first")
        found = found.removeprefix("file://")
    return _bare_base64(found) or root / found


def _decoded(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise binascii.Error("it is no ;base64,")
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise UserError(f"an image's base64 cannot be decoded: {error}; got {uri!r:.40}") from None


def _bare_base64(text: str) -> bytes | None:
    """The bytes of an image in base64; None for whatever may be a path."""
    if len(text) < _SHORTEST or not _BASE64.fullmatch(text):
        return None
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
    return data if _SIGNATURE.match(data) else None


def _check_names(columns: Columns) -> None:
    for name in [*columns]:
        if not isinstance(name, str):
            raise UserError(f"a column must have a name, got {shown(name)}")
        plain = name.strip().casefold()
        if plain != name and plain in _KNOWN:
            raise UserError(f"its column {name!r:.80} is read only by the name {plain!r}; rename it")
        if name in UNREAD:
            if columns[name] not in ("", [], {}):
                raise UserError(f"it has {name!r}, which is not read: {UNREAD[name]}")
            del columns[name]
        elif _NUMBERED.fullmatch(plain):
            raise UserError(f"it has {name!r}, which is not read: put its images into a list in 'images'")


def _set_images(columns: Columns) -> None:
    images = columns.get("images", [])
    if not isinstance(images, list):
        raise UserError(f"'images' must be a list, got {shown(images)}")
    single = columns.pop("image", None)
    if single is not None and single not in ("", [], {}):
        if images:
            raise UserError("it has both 'image' and 'images'; keep one of them")
        columns["images"] = single if isinstance(single, list) else [single]
    columns.setdefault("images", [])


def _set_prompt(columns: Columns) -> None:
    chat = _only(columns, CHATS)
    if "prompt" in columns and chat:
        raise UserError(f"it has both 'prompt' and {chat!r}; keep one of them")
    asked = None if chat or "prompt" in columns else _only(columns, QUESTIONS)
    if chat:
        turns = _turns(columns.pop(chat), chat)
        if turns and turns[-1]["role"] == "assistant":
            if "response" in columns or "completion" in columns:
                raise UserError(f"it has a response, and {chat!r} ends with another; keep one of them")
            columns["response"] = text_of(turns.pop()["content"])
    elif asked:
        turns = _turns(_question(columns, asked), "prompt")
    elif "prompt" in columns:
        turns = _turns(columns.pop("prompt"), "prompt")
    else:
        names = ", ".join(sorted(columns.keys() - {"images"} if not columns["images"] else columns))
        raise UserError(f"no column 'prompt'; it has {names[:200] or 'none'}")
    _set_system(columns, turns)
    columns["prompt"], columns["images"] = placed(turns, columns["images"])
    _check_shown(columns, CHOICES if asked else ())


def _turns(prompt: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UserError(f"{name!r} must be text or a list of messages, got {shown(prompt)}")
    if name != "prompt" and prompt and isinstance(prompt[0], Mapping) and "from" in prompt[0]:
        return read_turns(prompt, "from", "value", SHAREGPT)
    return read_turns(prompt)


def _question(columns: Columns, name: str) -> str:
    text = columns.pop(name)
    if not isinstance(text, str):
        raise UserError(f"{name!r} must be text, got {shown(text)}")
    if name == "instruction":  # of Alpaca's rows
        more = columns.pop("input", "")
        if not isinstance(more, str):
            raise UserError(f"'input' must be text, got {shown(more)}")
        text = f"{text}\n{more}" if more else text
        if "output" in columns and "response" not in columns:
            columns["response"] = columns.pop("output")
    return text


def _set_system(columns: Columns, turns: list[dict[str, Any]]) -> None:
    name = _only(columns, SYSTEM)
    if name is None:
        return
    text = columns.pop(name)
    if not isinstance(text, str):
        raise UserError(f"{name!r} must be text, got {shown(text)}")
    if turns and turns[0]["role"] == "system":
        raise UserError(f"it has {name!r}, and its prompt begins with a system message; keep one of them")
    turns.insert(0, {"role": "system", "content": text})


def _check_shown(columns: Columns, more: tuple[str, ...]) -> None:
    """Refuse questions, choices and images that stand beside a prompt that does not have them."""
    text = "\n".join(part.get("text", "") for turn in columns["prompt"] for part in turn["content"])
    for name in (*QUESTIONS, *more):
        said = columns.get(name)
        for piece in said if isinstance(said, list) else [said]:
            if isinstance(piece, str) and piece.replace("<image>", "").strip() not in text:
                raise UserError(f"it has {name!r}, which its prompt does not show; write it into 'prompt'")
    lost = [] if columns["images"] else [name for name in columns if _IMAGE_NAMES.fullmatch(name)]
    if lost := [name for name in lost if name != "images"]:
        raise UserError(f"it has {lost[0]!r} but no images; if it holds them, name it 'images'")


def _set_response(columns: Columns) -> None:
    if "completion" not in columns:
        return
    if "response" in columns:
        raise UserError("it has both 'response' and 'completion'; keep one of them")
    said = columns.pop("completion")
    if isinstance(said, list):
        turns = read_turns(said)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise UserError(f"'completion' must be text or one assistant's message, got {shown(said)}")
        said = text_of(turns[0]["content"])
    columns["response"] = said


def _set_answer(columns: Columns) -> None:
    if "answer" in columns:
        return
    rule = columns.get("reward_model")  # of verl's rows
    found = [columns.get(name) for name in ANSWERS]
    found.append(rule.get("ground_truth") if isinstance(rule, Mapping) else None)
    said = [value for value in found if isinstance(value, str | int | float) and value != ""]
    texts = {str(bare(whole(value))) for value in said if not is_absent(value)}
    if len(texts) == 1:
        columns["answer"] = texts.pop()


def _only(columns: Columns, names: tuple[str, ...]) -> str | None:
    """The one of these columns that the row has; an empty one counts as absent."""
    for name in names:
        if columns.get(name) in ("", []):
            del columns[name]
    has = [name for name in names if name in columns]
    if len(has) > 1:
        raise UserError(f"it has both {has[0]!r} and {has[1]!r}; keep one of them")
    return has[0] if has else None
