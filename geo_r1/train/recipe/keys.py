"""Every key of a recipe with its type, default and meaning: for help and for the docs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from geo_r1.train.recipe.sections import Recipe


@dataclass(frozen=True)
class Key:
    """A key; `default` is JSON, empty without one, and `free` is True if it may change when a run goes on."""

    name: str
    kind: str
    default: str
    meaning: str
    free: bool


@dataclass(frozen=True)
class Group:
    """A section by its path, such as `grpo.loss`, with its own keys; `model` has its values."""

    path: str
    meaning: str
    keys: tuple[Key, ...]
    model: BaseModel


def groups() -> Iterator[Group]:
    """The sections of a recipe, each before those inside it."""
    schema = Recipe.model_json_schema()
    for path, section in _sections(Recipe(), ""):
        own, defaults = schema["$defs"][type(section).__name__], section.model_dump(mode="json")
        all_free = schema["properties"].get(path, {}).get("free", False)
        keys = tuple(
            Key(
                name,
                _kind(values),
                "" if defaults[name] is None else json.dumps(defaults[name]),
                _one_line(values["description"]),
                values.get("free", all_free),
            )
            for name, values in own["properties"].items()
            if "$ref" not in values  # a section of its own
        )
        yield Group(path, _one_line(own["description"]), keys, section)


def _sections(section: BaseModel, path: str) -> Iterator[tuple[str, BaseModel]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            inner = f"{path}.{name}".lstrip(".")
            yield inner, value
            yield from _sections(value, inner)


def _kind(schema: dict[str, Any]) -> str:
    """A type in words; the values of a choice are in backticks."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} of {_kind(schema['prefixItems'][0])}"
    words = {"boolean": "true or false", "string": schema.get("format", "text"), "object": "table"}
    kind = (
        f"list of {_kind(schema['items'])}"
        if "items" in schema
        else words.get(schema["type"], schema["type"])
    )
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    kind += "".join(f" {sign} {schema[name]}" for name, sign in signs.items() if name in schema)
    return kind + (f", at least {schema['minItems']}" if "minItems" in schema else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
