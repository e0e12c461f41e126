"""Samples of the procedural world: questions, chains of thought, captions, direct answers.

A chain of thought has the four steps of Geo-R1: visual cues, knowledge association, evidence corroboration,
conclusion. The teacher can make two mistakes that real teachers make: if *careless*, it calls every side the
same without comparing them; if it *slips*, it misnames a side of a tile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geo_r1.data.sample import Sample
from geo_r1.data.world import COVERS, LETTERS, Pairing, World
from geo_r1.errors import UserError

QUESTION = (
    "The first image is a panorama. Which of the tiles {labels} shows the same place from above? "
    "Think in <think> </think>, then answer in <answer> </answer>."
)
CAPTION = "Describe the panorama and the tiles {labels}."


@dataclass(frozen=True)
class Numbered:
    """A split's samples by index, for a `Source`.

    Attributes:
        make: (world, split, number, **options) -> sample.
        first: the number of the sample at index 0.
    """

    make: Callable[..., Sample]
    world: World
    split: str
    first: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, index: int) -> Sample:
        return self.make(self.world, self.split, self.first + index, **self.options)


@dataclass(frozen=True)
class RisingQuestions:
    """Questions whose difficulty rises linearly from `start` to the world's own, then stays there.

    Args:
        first: the number of the first question of the split.
        start: difficulty of the first question, 0 to 1.
        num_rising: number of questions until the difficulty is the world's own.

    Raises:
        UserError: `start` is not between 0 and the world's difficulty.
    """

    world: World
    split: str
    first: int
    start: float
    num_rising: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.world.difficulty:
            raise UserError(
                f"world.curriculum_start must be 0 to world.difficulty = {self.world.difficulty}, "
                f"got {self.start}"
            )

    def __call__(self, index: int) -> Sample:
        return question(self.world, self.split, self.first + index, self.difficulty(index))

    def difficulty(self, index: int) -> float:
        end = self.world.difficulty
        return end if index >= self.num_rising else self.start + (end - self.start) * index / self.num_rising


def question(world: World, split: str, index: int, difficulty: float | None = None) -> Sample:
    """A cross-view question without a response: the panorama, labelled tiles, then text.

    Args:
        difficulty: replaces the world's own difficulty, 0 to 1.
    """
    pairing = world.pairing(split, index, difficulty)
    return _sample(world, pairing, QUESTION, None)


def chain_of_thought(
    world: World, split: str, index: int, careless: float = 0.0, slip: float = 0.0
) -> Sample:
    """A question with a teacher's chain of thought as its response.

    Args:
        careless: probability that the teacher calls every side it compares the same.
        slip: probability of misnaming a side of a tile.
    """
    pairing = world.pairing(split, index)
    rng = random.Random(f"{world.seed}/{pairing.id}/teacher")
    cues, tiles = pairing.place.covers, [_named(c.covers, slip, rng) for c in pairing.candidates]
    evidence, chosen = _compare(cues, tiles, careless=rng.random() < careless)
    thought = f"Cues: {' '.join(cues)}. Knowledge: {association(cues)}. "
    thought += f"Evidence: {evidence} Conclusion: {chosen}."
    return _sample(world, pairing, QUESTION, f"<think>{thought}</think><answer>{chosen}</answer>")


def direct_answer(world: World, split: str, index: int, describe: bool = False) -> Sample:
    """A question answered without reasoning; with `describe`, after a description of the panorama."""
    pairing = world.pairing(split, index)
    thought = f"<think>Cues: {' '.join(pairing.place.covers)}.</think>" if describe else ""
    return _sample(world, pairing, QUESTION, f"{thought}<answer>{pairing.answer}</answer>")


def pretraining(world: World, split: str, index: int) -> Sample:
    """A substitute for pretraining: three captions per direct answer; every fourth answer has a description.

    It teaches the model to see and to answer in the right form, but not to find the answer.
    """
    if index % 4:
        return caption(world, split, index)
    return direct_answer(world, split, index, describe=index % 16 == 0)


def caption(world: World, split: str, index: int) -> Sample:
    """A question's images, with a description of each as the response."""
    pairing = world.pairing(split, index)
    named = zip(("panorama", *LETTERS), (pairing.place, *pairing.candidates), strict=False)
    views = [f"{name} {' '.join(place.covers)}." for name, place in named]
    return _sample(world, pairing, CAPTION, " ".join(views))


def association(covers: Sequence[str]) -> str:
    """The kind of place that has these land covers, for the knowledge step."""
    for cover, kind in (("water", "coast"), ("sand", "desert"), ("rock", "mountain"), ("roofs", "town")):
        if cover in covers:
            return kind
    return "country"


def _named(covers: Sequence[str], slip: float, rng: random.Random) -> list[str]:
    """The names that the teacher gives to a tile's sides."""
    return [
        rng.choice([c for c in COVERS if c != cover]) if rng.random() < slip else cover for cover in covers
    ]


def _compare(cues: Sequence[str], tiles: Sequence[Sequence[str]], careless: bool) -> tuple[str, str]:
    """Compare each tile's sides until one differs; a careless teacher stops after the first tile."""
    lines, chosen = [], None
    for letter, tile in zip(LETTERS, tiles, strict=False):
        words, verdict = [letter], "yes."
        for cue, named in zip(cues, tile, strict=True):
            words += [cue, named]
            if cue != named and not careless:
                verdict = "no."
                break
            words.append("same")
        lines.append(" ".join([*words, verdict]))
        if verdict == "yes.":
            chosen = chosen or letter
        if careless:
            break
    return " ".join(lines), chosen or letter


def _sample(world: World, pairing: Pairing, text: str, response: str | None) -> Sample:
    labels = f"A to {LETTERS[world.num_candidates - 1]}"
    images = world.images(pairing)
    content = [{"type": "image"}]
    for letter in LETTERS[: world.num_candidates]:
        content += [{"type": "text", "text": f" {letter}"}, {"type": "image"}]
    content.append({"type": "text", "text": text.format(labels=labels)})
    city = pairing.place.city
    return Sample(
        id=pairing.id,
        messages=({"role": "user", "content": content},),
        images=images,
        response=response,
        answer=pairing.answer,
        metadata={
            "num_choices": world.num_candidates,
            "city": city.name,
            "latitude": city.latitude,
            "longitude": city.longitude,
        },
    )
