"""The samples of each stage: of the procedural world, or of the file that the stage's `data` names."""

from __future__ import annotations

import re
from pathlib import Path

from geo_r1.data import World, exemplars, read_samples
from geo_r1.data.source import Source
from geo_r1.errors import UserError
from geo_r1.eval.cross_view import question_of
from geo_r1.train.recipe.sections import Recipe


def open_source(recipe: Recipe, world: World, stage: str) -> Source:
    """The samples of a stage: of the world, or of the file that its `data` names."""
    data = getattr(recipe, stage).data
    if data != "world":
        _refuse_hub_name(data, f"{stage}.data")
        samples = read_samples(data, recipe.data.image_root)
        for sample in samples:
            if stage == "eval":
                question_of(sample)
            elif stage != "grpo" and sample.response is None:
                raise UserError(f"sample {sample.id} of {data} has no response, which {stage} needs")
        return Source.of(samples, recipe.data.curriculum and stage != "eval")
    options = recipe.world
    if stage == "pretrain":
        return Source(exemplars.Numbered(exemplars.pretraining, world, "train"), None)
    if stage == "sft":
        first = 1_000_000
        if options.response == "answer":
            return Source(exemplars.Numbered(exemplars.direct_answer, world, "train", first), None)
        teacher = {"careless": options.careless, "slip": options.slip}
        return Source(exemplars.Numbered(exemplars.chain_of_thought, world, "train", first, teacher), None)
    if stage == "grpo" and options.curriculum_start is not None:
        start, num_rising = options.curriculum_start, options.curriculum_samples
        return Source(exemplars.RisingQuestions(world, "train", 2_000_000, start, num_rising), None)
    first = 2_000_000 if stage == "grpo" else 0
    split = "train" if stage == "grpo" else "test"
    return Source(exemplars.Numbered(exemplars.question, world, split, first), None)


def _refuse_hub_name(data: str, key: str) -> None:
    """Tell somebody who names a data set of the hub how to make a file of it."""
    found = re.fullmatch(r"(?:hf://datasets/)?([\w.-]+/([\w.-]+))", data)
    if found and not data.endswith((".jsonl", ".parquet")) and not Path(data).exists():
        name, file = found[1], f"{found[2]}.parquet"
        export = f"import datasets; datasets.load_dataset('{name}', split='train').to_parquet('{file}')"
        raise UserError(f'{key}: no file {data}. A data set of the hub becomes one by: python -c "{export}"')
