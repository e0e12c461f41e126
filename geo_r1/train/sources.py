"""The samples of each stage: of the procedural world, or of the file that the stage's `data` names.

Before the first step every row is read, and the header of every image. A bad sample ends the run, or is left
out and counted, as `data.on_bad_sample` says. So does one whose image turns out to be truncated in a step.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from geo_r1.data import Sample, World, exemplars, read_samples
from geo_r1.data.decoding import ImageError, ImageSource, check_image
from geo_r1.data.loader import PromptLoader
from geo_r1.data.source import Source
from geo_r1.errors import UserError, say
from geo_r1.eval.cross_view import question_of
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.run_sections import DataConfig
from geo_r1.train.recipe.sections import Recipe

THREADS = 16  # that look at images; a file on a network takes milliseconds
CHUNK = 64  # images that a thread takes at a time
MANY = 50_000  # images; looking at them takes several seconds


class BadSamples:
    """Counts the samples of a stage that are left out as bad, on all ranks, against `max_bad_share`.

    Attributes:
        found: why they are bad, by file and row.
    """

    def __init__(self, config: DataConfig, ranks: Ranks, source: Source, loader: PromptLoader) -> None:
        self.config, self.ranks, self.loader = config, ranks, loader
        self.found = dict(source.bad)
        self.size = (source.size or 0) + len(source.bad)

    def count(self) -> int:
        """The number of bad samples so far; all ranks call it together.

        Raises:
            UserError: on every rank, if it is over the limit.
        """
        new = {name: reason for name, reason in self.loader.bad.items() if name not in self.found}
        for part in self.ranks.gather(new):
            self.found |= part
        _check_share(self.config, self.found, self.size)
        return len(self.found)

    def __str__(self) -> str:
        return _counted(self.found, self.size)


def open_sources(recipe: Recipe, world: World, stages: Iterable[str], ranks: Ranks) -> dict[str, Source]:
    """The sources of these stages, after a look at the header of every image; all ranks call it together.

    The ranks of a machine share its images out, since another machine may hold other files. A sample that is
    bad on one rank is bad on all.

    Raises:
        UserError: a sample is bad, and `on_bad_sample` is "error"; or more than `max_bad_share` are.
    """
    stages = sorted(stages)  # all ranks have one order
    read = {stage: _read(recipe, stage) for stage in stages if getattr(recipe, stage).data != "world"}
    reasons = _look([sample for samples, _ in read.values() for sample in samples], ranks)
    sources = {stage: open_source(recipe, world, stage) for stage in stages if stage not in read}
    for stage, (samples, bad) in read.items():
        size = len(samples) + len(bad)
        good = [sample for sample in samples if id(sample) not in reasons]
        bad |= {sample.where: reasons[id(sample)] for sample in samples if id(sample) in reasons}
        if bad and recipe.data.on_bad_sample == "error":
            raise UserError(": ".join(next(iter(bad.items()))))
        _check_share(recipe.data, bad, size)
        if bad and ranks.is_main:
            say(f"{stage}: {_counted(bad, size)}; they are left out")
        sources[stage] = _of_file(recipe, stage, good, bad)
    return sources


def open_source(recipe: Recipe, world: World, stage: str) -> Source:
    """The samples of one stage, without a look at their images."""
    if getattr(recipe, stage).data != "world":
        return _of_file(recipe, stage, *_read(recipe, stage))
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


def _of_file(recipe: Recipe, stage: str, samples: list[Sample], bad: dict[str, str]) -> Source:
    if not samples:
        raise UserError(f"{getattr(recipe, stage).data} holds no good sample: {_counted(bad, len(bad))}")
    return Source.of(samples, recipe.data.curriculum and stage != "eval", bad)


def _read(recipe: Recipe, stage: str) -> tuple[list[Sample], dict[str, str]]:
    """The samples of a stage's file, and why its other rows are bad."""
    data: str = getattr(recipe, stage).data
    _refuse_hub_name(data, f"{stage}.data")
    bad: dict[str, str] = {}
    collected = bad if recipe.data.on_bad_sample == "skip" else None
    check = partial(_check_serves, stage, data)
    return read_samples(data, recipe.data.image_root, check=check, bad=collected), bad


def _check_serves(stage: str, data: str, sample: Sample) -> None:
    if stage == "eval":
        question_of(sample)
    elif stage != "grpo" and sample.response is None:
        raise UserError(f"sample {sample.id} of {data} has no response, which {stage} needs")


def _look(samples: Sequence[Sample], ranks: Ranks) -> dict[int, str]:
    """Why samples cannot be shown to a model, by the `id` of the object."""
    work: list[tuple[Sample, ImageSource]] = []
    shown: set[Path] = set()
    for sample in samples:
        for image in sample.images:
            if not isinstance(image, Path) or image not in shown:  # questions share tiles
                work.append((sample, image))
                shown.update([image] if isinstance(image, Path) else [])
    if len({*ranks.gather(len(work))}) > 1:
        raise UserError("the ranks read different data files; give every machine the same ones")
    hosts = ranks.gather(socket.gethostname())
    first, peers = hosts[: ranks.rank].count(hosts[ranks.rank]), hosts.count(hosts[ranks.rank])
    if len(work) > MANY and ranks.is_main:
        say(f"looking at {len(work):,} images before the first step")
    mine = range(first, len(work), peers)
    chunks = [mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = {i: reason for part in pool.map(partial(_faults, work), chunks) for i, reason in part.items()}
    faults = {i: reason for part in ranks.gather(found) for i, reason in part.items()}
    of_file = {work[i][1]: reason for i, reason in faults.items() if isinstance(work[i][1], Path)}
    reasons = {id(work[i][0]): reason for i, reason in sorted(faults.items(), reverse=True)}
    for sample in samples:
        bad = next((of_file[i] for i in sample.images if isinstance(i, Path) and i in of_file), None)
        if bad is not None:
            reasons.setdefault(id(sample), bad)
    return reasons


def _faults(work: Sequence[tuple[Sample, ImageSource]], indices: range) -> dict[int, str]:
    found = {}
    for i in indices:
        sample, image = work[i]
        try:
            check_image(image, sample.id, sample.image_root)
        except ImageError as error:
            found[i] = error.reason
    return found


def _check_share(config: DataConfig, bad: Mapping[str, str], size: int) -> None:
    if len(bad) > config.max_bad_share * size:
        raise UserError(f"{_counted(bad, size)}, more than data.max_bad_share = {config.max_bad_share:g}")


def _counted(bad: Mapping[str, str], size: int) -> str:
    where, reason = next(iter(bad.items()), ("", ""))
    listed = f"python -m geo_r1.data check lists them; {where}: {reason}"
    return f"{len(bad):,} of {size:,} samples are bad ({listed})"


def _refuse_hub_name(data: str, key: str) -> None:
    """Tell somebody who names a data set of the hub how to make a file of it."""
    found = re.fullmatch(r"(?:hf://datasets/)?([\w.-]+/([\w.-]+))", data)
    if found and not data.endswith((".jsonl", ".parquet")) and not Path(data).exists():
        name, file = found[1], f"{found[2]}.parquet"
        export = f"import datasets; datasets.load_dataset('{name}', split='train').to_parquet('{file}')"
        raise UserError(f'{key}: no file {data}. A data set of the hub becomes one by: python -c "{export}"')
