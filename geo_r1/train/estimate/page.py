"""Makes docs/training.md, with `make docs`: words from a file, keys and their meanings from the classes."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from transformers import Qwen2_5_VLConfig

from geo_r1.train.estimate.dry_run import memory_table
from geo_r1.train.estimate.memory import Load, estimate
from geo_r1.train.recipe.sections import Recipe

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "training.md"
WORDS = PAGE.with_name("training.md.in")  # with a line for each table
KEYS, MEMORY, PARTS = "<!-- keys -->\n", "<!-- memory -->\n", "<!-- parts -->\n"

FITS = 80 * 10**9  # bytes of the GPU that the table has in mind
GPUS = (1, 8, 16)
# Source: each model's public config.json; what is not named is as in 7B. Tables are tied in 3B alone.
NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
MODELS = {
    "3B": (2048, 36, 16, 2, 11008, 151936),
    "7B": (3584, 28, 28, 4, 18944, 152064),
    "32B": (5120, 64, 40, 8, 27648, 152064),
    "72B": (8192, 80, 64, 8, 29568, 152064),
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
VISION_INTERMEDIATE = {"3B": 3420, "7B": 3420, "32B": 3456, "72B": 3456}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": {"strategy": "ddp"}},
    "fsdp2": {"parallel": {"strategy": "fsdp2"}},
    "ZeRO 2": {"parallel": {"strategy": "deepspeed", "zero_stage": 2}},
    "ZeRO 3": {"parallel": {"strategy": "deepspeed"}},
    "fsdp2, `cpu_offload`": {"parallel": {"strategy": "fsdp2", "cpu_offload": True}},
    "fsdp2, LoRA of rank 32": {"parallel": {"strategy": "fsdp2"}, "lora": {"rank": 32}},
}
SETTINGS: dict[str, Any] = {
    "model": {"dtype": "bfloat16", "checkpointing": "full"},
    "grpo": {"steps": 1, "prompts_per_step": 64, "num_completions": 8},
    "rollout": {"max_new_tokens": 512},
}
LOAD = Load(prompt_tokens=2048, picture_tokens=1536, response_tokens=8 * 512)


def training_page() -> str:
    """The whole page."""
    page = WORDS.read_text(encoding="utf-8")
    tables = {KEYS: _keys(), MEMORY: _memory(), PARTS: _parts()}
    for mark, lines in tables.items():
        assert page.count(mark) == 1, mark
        page = page.replace(mark, "\n".join(lines) + "\n")
    return page


def model_config(name: str) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL by its size, as far as weights and memory depend on it."""
    text = dict(zip(NAMES, MODELS[name], strict=True))
    vision = VISION | {
        "intermediate_size": VISION_INTERMEDIATE[name],
        "out_hidden_size": text["hidden_size"],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=name == "3B")


def _memory() -> Iterator[str]:
    yield f"| model | spread by | {' | '.join('1 GPU' if n == 1 else f'{n} GPUs' for n in GPUS)} |"
    yield f"| --- | --- | {' | '.join('---:' for _ in GPUS)} |"
    for name in MODELS:
        config = model_config(name)
        for way, options in WAYS.items():
            cells = []
            for num_ranks in GPUS:
                found = estimate(Recipe(**SETTINGS, **options), config, num_ranks, "grpo", LOAD)
                phase = max(found.totals, key=found.totals.__getitem__)
                size = f"{found.peak / 2**30:,.0f} {phase}"
                cells.append(f"**{size}**" if found.peak <= FITS else size)
            yield f"| {name} | {way} | {' | '.join(cells)} |"


def _parts() -> Iterator[str]:
    yield "```"
    yield from memory_table(estimate(Recipe(**SETTINGS), model_config("7B"), 8, "grpo", LOAD))
    yield "```"


def _keys() -> Iterator[str]:
    sections: dict[str, tuple[list[str], BaseModel]] = {}
    for path, section in _sections(Recipe(), ""):  # pretrain and sft are the same
        same = f"{type(section).__name__} {section.model_dump_json()}"
        sections.setdefault(same, ([], section))[0].append(f"`[{path}]`")
    for paths, section in sections.values():
        yield from ("", f"### {', '.join(paths)}", "", _one_line(type(section).__doc__), "")
        yield from ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
        values = section.model_dump(mode="json")
        for key, info in type(section).model_fields.items():
            if isinstance(getattr(section, key), BaseModel):
                continue  # a section of its own
            kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            cells = (f"`{key}`", _kind(kind), _default(values[key]), _one_line(info.description))
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _sections(section: BaseModel, path: str) -> Iterator[tuple[str, BaseModel]]:
    if path:
        yield path, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _sections(value, f"{path}.{name}".lstrip("."))


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = ""
        for limit in (part for info in arguments[1:] for part in getattr(info, "metadata", [info])):
            for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
                if hasattr(limit, name):
                    limits += f" {sign} {getattr(limit, name)}"
            if hasattr(limit, "min_length"):
                limits += f", at least {limit.min_length}"
        return _kind(arguments[0]) + limits
    if origin is Literal:
        return " ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        own = _kind(arguments[0])
        return f"list of {own}" if arguments[-1] is Ellipsis else f"{len(arguments)} of {own}"
    if origin is dict:
        return "table"
    return {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}[annotation]


def _default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(training_page(), encoding="utf-8")
