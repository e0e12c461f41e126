"""Reading a recipe: a TOML file, and `--section.key value` on top of it.

Imports no torch, so that a typing mistake is reported at once.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from geo_r1.errors import UserError
from geo_r1.train.recipe.sections import Recipe

PROGRAM = "python -m geo_r1.train"
DRY_RUN = "--dry-run"
SERVE = "--serve"
USAGE = f"""{PROGRAM} [RECIPE.toml] [{DRY_RUN}[=RANKS]] [{SERVE}[=[HOST:]PORT]]
                              [--section.key VALUE ...]"""


def load_recipe(argv: Sequence[str], description: str | None = None) -> Recipe:
    """Read `[recipe] [--section.key value ...]`; `--help` among them prints help and exits.

    Args:
        description: text that help prints before the keys.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value has the wrong type. The
            message names the key, says what was found, and suggests the nearest known key.
    """
    arguments = list(argv)
    source: CliSettingsSource = CliSettingsSource(Recipe, cli_prog_name=PROGRAM, cli_exit_on_error=False)
    source.root_parser.usage, source.root_parser.description = USAGE, description
    if {"-h", "--help"} & {*arguments}:  # also where there is no recipe to read
        source.root_parser.print_help()
        raise SystemExit(0)
    named = arguments and not arguments[0].startswith("-")
    path = find_recipe(arguments.pop(0) if named else "world")
    values = read_toml(path, "recipe ")
    known = _keys(Recipe)
    for option in arguments:
        key = option.removeprefix("--").split("=")[0]
        if option.startswith("--") and key not in known:
            flags = [flag.removeprefix("--") for flag in (DRY_RUN, SERVE)]
            raise UserError(f"unknown option --{key}{_nearest(key, [*known, *flags])}")
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
    recipes = Path(str(importlib.resources.files("geo_r1"))) / "recipes"
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


def _nearest(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, 1, 0.5)
    if not found:  # a right key in the wrong section
        found = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"; did you mean {found[0]}?" if found else ""


def _explain(error: ValidationError, path: Path, known: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe {path}: unknown key {key}{_nearest(key, known)}"
    reason = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"recipe {path}: {key + ': ' if key else ''}{reason}{found}"
