"""Makes docs/training.md, with `make docs`: text from a file, keys and their meanings from the classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig

from geo_r1.train.estimate.dry_run import memory_table
from geo_r1.train.estimate.memory import ASSUMED, Load, estimate
from geo_r1.train.recipe.keys import Group, groups
from geo_r1.train.recipe.sections import Recipe

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.with_name("training.md.in")  # with a line for each table
GPUS = (1, 8, 16)
# Source: each model's public config.json; other values are 7B's, transformers' defaults.
NAMES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
MODELS = {
    "3B": (2048, 36, 16, 2, 11008, 151936),
    "7B": (3584, 28, 28, 4, 18944, 152064),
    "32B": (5120, 64, 40, 8, 27648, 152064),
    "72B": (8192, 80, 64, 8, 29568, 152064),
}
VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
}
VISION |= {"fullatt_block_indexes": [7, 15, 23, 31]}
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
LOAD = Load(prompt_tokens=2048, image_tokens=1536, response_tokens=8 * 512)


def training_page() -> str:
    """The whole page."""
    page = TEXT.read_text(encoding="utf-8")
    for name, lines in {"keys": _keys(), "memory": _memory(), "parts": _parts()}.items():
        mark = f"<!-- {name} -->\n"
        assert page.count(mark) == 1, mark
        page = page.replace(mark, "\n".join(lines) + "\n")
    return page


def model_config(name: str) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL by its size, as far as weights and memory depend on it."""
    text = dict(zip(NAMES.split(), MODELS[name], strict=True))
    inner = 3420 if name in ("3B", "7B") else 3456
    vision = VISION | {"intermediate_size": inner, "out_hidden_size": text["hidden_size"]}
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
                cells.append(f"**{size}**" if found.peak <= ASSUMED else size)
            yield f"| {name} | {way} | {' | '.join(cells)} |"


def _parts() -> Iterator[str]:
    yield "```"
    yield from memory_table(estimate(Recipe(**SETTINGS), model_config("7B"), 8, "grpo", LOAD))
    yield "```"


def _keys() -> Iterator[str]:
    sections: dict[str, tuple[list[str], Group]] = {}
    for group in groups():  # pretrain and sft are the same
        same = f"{type(group.model).__name__} {group.model.model_dump_json()}"
        sections.setdefault(same, ([], group))[0].append(f"`[{group.path}]`")
    for paths, group in sections.values():
        yield from ("", f"### {', '.join(paths)}", "", group.meaning, "")
        yield from ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
        for key in group.keys:
            default = f"`{key.default}`" if key.default else ""
            cells = (f"`{key.name}`{' ↻' if key.free else ''}", key.kind, default, key.meaning)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(training_page(), encoding="utf-8")
