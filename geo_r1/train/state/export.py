"""The model of a finished stage, as a transformers folder with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

import geo_r1
from geo_r1.errors import UserError
from geo_r1.files import beside, publish, sync
from geo_r1.train.recipe.load import dump_recipe
from geo_r1.train.recipe.sections import Recipe
from geo_r1.train.state.shards import reason_of

GENERATION = "generation_config.json"
# Files of the base model that its processors read and that training does not touch.
BASE_FILES = ("processor_config.json", "video_preprocessor_config.json")
SNIPPET = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder = "{folder}"
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder)  # AutoProcessor does all this with torchvision

images = image_processor([Image.open("photo.jpg").convert("RGB")], return_tensors="pt")
content = [{{"type": "image"}}, {{"type": "text", "text": "Where was this photo taken?"}}]
text = tokenizer.apply_chat_template(
    [{{"role": "user", "content": content}}], tokenize=False, add_generation_prompt=True
)
patches = images["image_grid_thw"].prod().item() // image_processor.merge_size**2
text = text.replace("<|image_pad|>", "<|image_pad|>" * patches)
inputs = tokenizer(text, return_tensors="pt")
image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
output = model.generate(
    **inputs, **images, mm_token_type_ids=(inputs["input_ids"] == image_token).int(), max_new_tokens=256
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def export_model(
    folder: Path, model: PreTrainedModel, companions: list[Any], base: str, texts: Mapping[str, str]
) -> None:
    """Write a transformers folder; it appears whole or not at all.

    Args:
        companions: tokenizer and image processor, saved beside the weights.
        base: folder or hub name of the model from which training started; gives the files that its
            processors read and training does not touch.
        texts: further files, by name.

    Raises:
        UserError: it cannot be written, or a weight is not finite.
    """
    assert not folder.exists(), f"{folder} is there already"
    check_finite(model)
    generation, unfinished = model.generation_config, beside(folder)
    # transformers loads generation configs that it refuses to save: a temperature without sampling, for one
    texts = {**texts, GENERATION: (generation or GenerationConfig()).to_json_string()}
    model.generation_config = GenerationConfig()
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        for piece in (model, *companions):
            piece.save_pretrained(unfinished)
        for name in BASE_FILES:
            path = cached_file(base, name, _raise_exceptions_for_missing_entries=False, local_files_only=True)
            if path is not None:
                shutil.copyfile(path, unfinished / name)
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        for file in unfinished.iterdir():
            sync(file)
        publish(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {folder} cannot be written: {reason_of(error)}") from error
    finally:
        model.generation_config = generation


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that no later stage could use.

    Raises:
        UserError: a weight is not finite; names it.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"the model has weights that are not finite, the first is {name}; lower the learning rate "
                "and go on from an older checkpoint"
            )


def model_card(recipe: Recipe, stage: str, folder: Path) -> str:
    """README.md of an exported model: what it is, how it was made, how to use it."""
    base = recipe.model.path
    figures = _last_figures(recipe.run.dir / "metrics.jsonl", stage)
    shown = {name: value for name, value in figures.items() if not name.startswith(("time/", "memory/"))}
    table = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(shown.items()))
    head = "" if base == "tiny" or Path(base).exists() else f"base_model: {base}\n"
    return f"""---
{head}library_name: transformers
pipeline_tag: image-text-to-text
tags: [geo_r1, {stage}]
---

# {folder.name} of {recipe.run.dir.resolve().name}

`{base}` after the stage `{stage}` of [geo_r1](https://arxiv.org/abs/2510.00072) {geo_r1.__version__}, on the
data `{getattr(recipe, stage).data}`.

## Use

```python
{SNIPPET.format(folder=folder)}```

## The last step

| metric | value |
| --- | --- |
{table}

## Recipe

```toml
{dump_recipe(recipe)}```
"""


def _last_figures(metrics: Path, stage: str) -> dict[str, float]:
    """The figures of a stage's last step, as far as they can be read."""
    found: dict[str, float] = {}
    with suppress(OSError):
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("stage") == stage:
                    found = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return found
