"""Kinds of rows: our own, a chat, a question with its answer. Each converts from and to our columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geo_r1.data.columns import bare, own_columns, present
from geo_r1.data.formats.turns import IMAGE, images_first, marked, merged, system_first
from geo_r1.data.messages import IMAGE_MARKER, Turn, placed, read_turns, shown, text_of
from geo_r1.data.sample import Sample, sample_of
from geo_r1.errors import UserError

Row = Mapping[str, Any]
Columns = dict[str, Any]
WITHOUT_TOOLS = {"system": "system", "user": "user", "assistant": "assistant"}
ROLES = WITHOUT_TOOLS | {"tool": "tool"}


@dataclass(frozen=True)
class Format(ABC):
    """Rows of one kind.

    Attributes:
        name: its name on the command line.
        reserved: columns with a meaning in the format; metadata must not have these names.
    """

    name: str
    reserved: frozenset[str] = frozenset()

    def read(self, row: Any, where: str) -> Columns:
        """Return a row in our own columns; `sample_of` checks them further.

        Args:
            where: names the row in errors.

        Raises:
            UserError: the row is not in this format or does not fit our columns; begins with `where`.
        """
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: a row must be a mapping of columns, got {shown(row)}")
        columns = present(row)
        try:
            for other in self.reserved & {"videos", "audios"}:
                if columns.pop(other, None):
                    raise UserError(f"it has {other}; only images are read")
            own = {key: value for key, value in self._own(columns).items() if value is not None}
            if clash := own.keys() & columns.keys():
                raise UserError(f"its column {min(clash)!r} is none of {self.name}; rename it")
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        return own | {
            key: value for key, value in columns.items() if key not in ("videos", "audios") or value
        }

    def write(self, columns: Row, *, flatten: bool = False) -> Columns:
        """Return a row of this format.

        Args:
            columns: our own, as `read` returns them.
            flatten: if the format has no images within the text, put them first and say "image 2" in
                their places; if it has no system turn, begin the prompt with its text.

        Raises:
            UserError: the columns are malformed or do not fit the format; names the sample.
        """
        named = columns.get("id") not in (None, "")
        where = f"sample {columns['id']!s:.80}" if named else "a sample without id"
        sample = sample_of(columns, where, Path())
        turns = [{"role": turn["role"], "content": merged(turn["content"])} for turn in sample.messages]
        try:
            if clash := self.reserved & sample.metadata.keys():
                raise UserError(f"its column {min(clash)!r} has a meaning in {self.name}; rename it")
            row = self._row(turns, columns.get("images") or [], sample, flatten)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        row = {key: value for key, value in row.items() if value is not None}
        return ({"id": sample.id} if named else {}) | row | dict(sample.metadata)

    @abstractmethod
    def _own(self, columns: Columns) -> Columns:
        """Remove the format's columns from `columns` and return ours; nulls count as absent."""

    @abstractmethod
    def _row(self, turns: list[Turn], images: list[Any], sample: Sample, flatten: bool) -> Columns:
        """The row without id and metadata; the caller drops nulls."""


@dataclass(frozen=True)
class Own(Format):
    """Our rows; every prompt becomes messages of parts, so all rows of a table have one type."""

    def _own(self, columns: Columns) -> Columns:
        own = own_columns(columns)
        columns.clear()
        return own

    def _row(self, turns: list[Turn], images: list[Any], sample: Sample, flatten: bool) -> Columns:
        return {"prompt": turns, "images": images, "response": sample.response, "answer": sample.answer}


@dataclass(frozen=True)
class Chat(Format):
    """Rows of chat messages.

    Attributes:
        key: the column of messages.
        role, content: names of these keys in a message.
        names: our role name -> the format's; other roles are errors.
        markers: images are `<image>` in the text, not parts of the content.
        answer: the column of the true answer.
        response: where it is: in a column, the last turn, or turns in a column `completion`.
        alternates: user and assistant turns alternate, as in LLaMA-Factory; a response is required.
    """

    key: str = "messages"
    role: str = "role"
    content: str = "content"
    names: Mapping[str, str] = field(default_factory=lambda: ROLES)
    markers: bool = False
    answer: str = "answer"
    response: Literal["column", "turn", "completion"] = "turn"
    alternates: bool = False

    def _own(self, columns: Columns) -> Columns:
        answer, images = columns.pop(self.answer, None), _images(columns, single=not self.alternates)
        own: Columns = {"answer": bare(answer) if self.answer == "solution" else answer, "images": images}
        completed = self.response == "completion" and "messages" not in columns
        key = "messages" if self.response == "completion" and not completed else self.key
        turns = self._turns(_taken(columns, key), "user")
        if self.alternates and "system" in columns:
            turns.insert(0, {"role": "system", "content": columns.pop("system")})
        reply: list[Turn] = []
        if completed:
            reply = self._turns(columns.pop("completion", []), "assistant")
        elif self.response != "column" and turns and turns[-1]["role"] == "assistant":
            reply = [turns.pop()]
        if [turn["role"] for turn in reply] not in ([], ["assistant"]):
            raise UserError(f"a response must be one assistant's turn, got {shown(reply)}")
        if reply:
            own["response"] = text_of(reply[0]["content"])
        if self.markers and IMAGE_MARKER in own.get("response", ""):
            raise UserError("its response has an image")
        if self.alternates and images and IMAGE_MARKER not in repr(turns):
            raise UserError(f"its text has no {IMAGE_MARKER}, but the row has images")
        if not isinstance(images, list | None):
            raise UserError(f"'images' must be a list, got {shown(images)}")
        turns, images = placed(turns, images or [])
        return own | {"prompt": turns, "images": images}

    def _turns(self, value: Any, speaker: str) -> list[Turn]:
        if isinstance(value, str) and not self.markers:
            value = [{self.role: speaker, self.content: value}]
        return read_turns(value, self.role, self.content, self.names)

    def _row(self, turns: list[Turn], images: list[Any], sample: Sample, flatten: bool) -> Columns:
        roles = [turn["role"] for turn in turns]
        if unknown := [role for role in roles if role not in self.names]:
            raise UserError(f"{self.name} has no role {unknown[0]!r:.80}; it has {', '.join(self.names)}")
        if roles[-1] == "assistant":
            raise UserError(
                f"its prompt ends with an assistant's turn, {self.name} would take it for a response"
            )
        spoken = roles[roles[0] == "system" :]
        by_turns = [("user", "assistant")[i % 2] for i in range(len(spoken))]
        if self.alternates and not (spoken and spoken == by_turns):
            raise UserError(f"{self.name} has a system turn, then user and assistant by turns; got {roles}")
        if sample.response is None and (self.alternates or self.response == "completion"):
            raise UserError(f"it has no response, which a row of {self.name} needs")
        row: Columns = {self.key: [self._turn(**turn) for turn in turns], "images": images}
        row[self.answer] = sample.answer
        if self.response == "column" or sample.response is None:
            return row | {"response": sample.response}
        reply = self._turn("assistant", [{"type": "text", "text": sample.response}])
        return row | (
            {"completion": [reply]} if self.response == "completion" else {self.key: [*row[self.key], reply]}
        )

    def _turn(self, role: str, content: list[dict[str, Any]]) -> Turn:
        return {self.role: self.names[role], self.content: marked(content) if self.markers else content}


@dataclass(frozen=True)
class Problem(Format):
    """Rows with a question and its true answer: EasyR1's, and VLM-R1's with two turns."""

    two_turns: bool = False

    def _own(self, columns: Columns) -> Columns:
        images = _images(columns, single=self.two_turns)
        if self.two_turns:
            turns = _taken(columns, "conversations")
            if not (
                isinstance(turns, list) and len(turns) == 2 and all(isinstance(t, Mapping) for t in turns)
            ):
                raise UserError(f"'conversations' must be a question and its answer, got {shown(turns)}")
            text, answer = turns[0].get("value"), bare(turns[1].get("value"))
        else:
            text, answer = _taken(columns, "problem"), columns.pop("answer", None)
        if not isinstance(text, str):
            raise UserError(f"the question must be text, got {shown(text)}")
        if self.two_turns:  # VLM-R1's loader deletes the markers and puts the images first
            num_images = len(images) if isinstance(images, list) else 0
            text = IMAGE_MARKER * num_images + text.replace(IMAGE_MARKER, "")
        elif images and IMAGE_MARKER not in text:
            raise UserError(f"its text has no {IMAGE_MARKER}, but the row has images")
        return {"prompt": text, "images": images, "answer": answer}

    def _row(self, turns: list[Turn], images: list[Any], sample: Sample, flatten: bool) -> Columns:
        roles = [turn["role"] for turn in turns]
        if sample.answer is None:
            raise UserError(f"it has no answer, which a row of {self.name} needs")
        if roles == ["system", "user"] and flatten:
            turns = [{"role": "user", "content": system_first(turns[0]["content"], turns[1]["content"])}]
        elif roles != ["user"]:
            hint = "; --flatten lets the system turn begin the text" if roles == ["system", "user"] else ""
            raise UserError(f"{self.name} holds one user turn, got {roles}{hint}")
        parts = turns[0]["content"]
        if self.two_turns and IMAGE in parts[len(images) :]:
            if not flatten:
                raise UserError(
                    f"images stand within its text, and {self.name} shows them first; "
                    "--flatten puts them there and says image 1, image 2, ... in the text"
                )
            parts = images_first(parts)
        if not self.two_turns:
            row: Columns = {"problem": marked(parts), "images": images, "answer": sample.answer}
            return row | {"response": sample.response}
        if not all(isinstance(image, str) for image in images):
            raise UserError(f"its images are in the file, and {self.name} reads them by path")
        pair = [{"from": "human", "value": marked(parts)}, {"from": "gpt", "value": sample.answer}]
        image = images[0] if len(images) == 1 else images or None
        return {"image": image, "conversations": pair, "response": sample.response}


def _taken(columns: Columns, name: str) -> Any:
    if name not in columns:
        raise UserError(f"no column {name!r}; it has {', '.join(sorted(map(str, columns))) or 'none'}")
    return columns.pop(name)


def _images(columns: Columns, single: bool) -> Any:
    """Remove and return the images; one need not be in a list, and with `single` may be in `image`."""
    images = columns.pop("images", None)
    if single and "image" in columns:
        if images is not None:
            raise UserError("it has both 'image' and 'images'")
        images = columns.pop("image")
    return [images] if isinstance(images, str | bytes | Mapping) else images
