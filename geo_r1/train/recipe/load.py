"""Reading a recipe: a TOML file, and `--section.key value` on top of it.

Imports no torch, so that a typing mistake is reported at once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from geo_r1.errors import UserError
from geo_r1.train.recipe.help import help_text, recipe_folder
from geo_r1.train.recipe.names import hint
from geo_r1.train.recipe.sections import Recipe

PROGRAM = "python -m geo_r1.train"
DRY_RUN = "--dry-run"
SERVE = "--serve"


def load_recipe(argv: Sequence[str], description: str | None = None) -> Recipe:
    """Read `[recipe] [--section.key value ...]`; `--help [topic]` among them prints help and exits.

    Args:
        description: text that help prints first.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value has the wrong type. The
            message names the key, says what was found, and suggests the nearest known key.
    """
    arguments = list(argv)
    source: CliSettingsSource = CliSettingsSource(Recipe, cli_prog_name=PROGRAM, cli_exit_on_error=False)
    if (topic := _help_topic(arguments)) is not None:  # also where there is no recipe to read
        print(help_text(topic, PROGRAM, description or ""))
        raise SystemExit(0)
    named = arguments and not arguments[0].startswith("-")
    path = find_recipe(arguments.pop(0) if named else "world")
    values = read_toml(path, "recipe ")
    known = _keys(Recipe)
    for option in arguments:
        key = option.lstrip("-").split("=")[0]
        if re.match("-{1,2}[a-z]", option) and (key not in known or not option.startswith("--")):
            flags = [flag.removeprefix("--") for flag in (DRY_RUN, SERVE)]
            raise UserError(f"unknown option {option.split('=')[0]}{hint(key, [*known, *flags])}")
    try:
        overrides = source(args=arguments)()
    except SettingsError as error:
        raise UserError(str(error).removeprefix("error parsing CLI: ").splitlines()[0]) from error
    try:
        return Recipe(**_merge(values, overrides))
    except ValidationError as error:
        raise UserError(_explain(error, path, known)) from error


def read_toml(path: Path, kind: str = "") -> dict[str, Any]:
    """The tables of a TOML file; a UserError names the file, after its kind, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{kind}{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{kind}{path} is not valid TOML: {error}") from error


def find_recipe(name: str) -> Path:
    """The path of a recipe: a bare name such as `world` is one of the package's, anything else is a path.

    Raises:
        UserError: the package has no recipe of this name, and neither has the folder.
    """
    path = Path(name)
    if path.name != name or path.suffix or path.exists():
        return path
    recipes = recipe_folder()
    inside = recipes / f"{name}.toml"
    if not inside.exists():
        known = ", ".join(sorted(file.stem for file in recipes.glob("*.toml")))
        raise UserError(f"no recipe {name}: geo_r1 has {known}; a file's name ends in .toml")
    return inside


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its defaults, as TOML that `load_recipe` reads back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def decisive(section: BaseModel) -> dict[str, Any]:
    """The values that decide a run's result, up to rounding: those of all keys that are not `Free`."""
    values = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        part, extra = getattr(section, name), info.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            del values[name]
        elif isinstance(part, BaseModel):
            values[name] = decisive(part)
    return values


def first_difference(before: Any, after: Any, key: str, when: str = "now") -> str | None:
    """The first key in which two tables differ, with both values; None if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            below = f"{key}.{name}".lstrip(".")
            if found := first_difference(before.get(name), after.get(name), below, when):
                return found
        return None
    return None if before == after else f"{key} = {before}, {when} {after}"


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = (
            _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in top and other not in top:  # the command line replaces the recipe's duration
            merged.pop(other, None)
    return merged


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _keys(info.annotation, f"{prefix}{name}.")
    return keys


def _help_topic(arguments: Sequence[str]) -> str | None:
    """What follows `--help`: a section, `all`, or nothing; None if help was not asked for."""
    for argument, after in zip(arguments, [*arguments[1:], "-"], strict=True):
        flag, _, topic = argument.partition("=")
        if flag in ("-h", "--help"):
            return topic or ("" if after.startswith("-") else after)
    return None


def _explain(error: ValidationError, path: Path, known: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe {path}: unknown key {key}{hint(key, known)}"
    reason = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"recipe {path}: {key + ': ' if key else ''}{reason}{found}"
