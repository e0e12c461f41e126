"""`--help`: in short, of one section with its keys, or of all."""

from __future__ import annotations

import importlib.resources
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from geo_r1.errors import UserError
from geo_r1.train.recipe.keys import Group, Key, groups
from geo_r1.train.recipe.names import hint

WIDEST, NARROWEST = 100, 40  # columns of text
ALL = "all"
MOST_USED = (
    "run.dir",
    "run.stages",
    "model.path",
    "sft.data",
    "sft.epochs",
    "grpo.data",
    "grpo.steps",
    "grpo.prompts_per_step",
    "grpo.num_completions",
    "grpo.optim.lr",
    "rollout.max_new_tokens",
    "rewards.functions",
)


def recipe_folder() -> Path:
    """The package's own recipes."""
    return Path(str(importlib.resources.files("geo_r1"))) / "recipes"


def help_text(topic: str, program: str, description: str) -> str:
    """Help on a section, a key or `all`; without a topic, the short help.

    Args:
        description: the first text of the short help.

    Raises:
        UserError: there is no such section or key.
    """
    known = [*groups()]
    if not topic:
        return "\n".join(_short(known, program, description))
    inside = [g for g in known if topic == ALL or g.path == topic or g.path.startswith(f"{topic}.")]
    if inside:
        return "\n\n".join("\n".join(_section(group)) for group in inside)
    for group in known:
        for key in group.keys:
            if f"{group.path}.{key.name}" == topic.removeprefix("--"):
                return "\n".join(_key(group, key))
    names = [*(g.path for g in known), *(f"{g.path}.{key.name}" for g in known for key in g.keys)]
    sections = ", ".join(group.path for group in known if "." not in group.path)
    raise UserError(f"--help knows no {topic}{hint(topic, names) or f'; there are {sections} and {ALL}'}")


def _short(known: list[Group], program: str, description: str) -> Iterator[str]:
    yield f"usage: {program} [RECIPE] [--section.key VALUE ...] [--dry-run[=RANKS]]"
    yield f"{' ' * len('usage: ' + program)} [--serve[=[HOST:]PORT]] [--help [SECTION]]"
    yield from ("", description.strip(), "")
    recipes = ", ".join(sorted(file.stem for file in recipe_folder().glob("*.toml")))
    yield from _wrapped(f"Recipes of the package: {recipes}.")
    yield from ("", "Keys that are used most, with their defaults:")
    keys = {f"{group.path}.{key.name}": key for group in known for key in group.keys}
    for name in MOST_USED:
        default = f" = {keys[name].default}" if keys[name].default else ""
        first = keys[name].meaning.split(". ")[0].rstrip(".") + "."
        yield from _wrapped(f"--{name}{default}", 2)
        yield from _wrapped(first.replace("`", ""), 6)
    yield from ("", "Sections:")
    width = max(len(group.path) for group in known if "." not in group.path)
    for group in known:
        if "." not in group.path:
            yield from _wrapped(f"{group.path:{width}}  {group.meaning}", 2, 4 + width)
    yield from ("", "--help grpo lists the keys of a section, --help all every key.")


def _section(group: Group) -> Iterator[str]:
    yield from _wrapped(f"[{group.path}] {group.meaning}")
    for key in group.keys:
        yield from _key(group, key)


def _key(group: Group, key: Key) -> Iterator[str]:
    default = f", default {key.default}" if key.default else ""
    kind = key.kind.replace("` `", " | ").replace("`", "")
    yield from _wrapped(f"--{group.path}.{key.name}  {kind}{default}", 2, 6)
    yield from _wrapped(key.meaning.replace("`", ""), 6)


def _wrapped(text: str, indent: int = 0, further: int | None = None) -> list[str]:
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))
    rest = " " * (indent if further is None else further)
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
