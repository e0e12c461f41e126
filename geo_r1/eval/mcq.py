"""Any multiple-choice set, to check that general skills survive training.

Reads our own rows (`prompt`, `images`, `answer`, `num_choices`), and rows like those of MMMU and
GEOBench-VLM: `question`, `options` (a list, or its text), `answer`, and images as `image`, `images` or
`image_1`, `image_2`, …; in the text `<image>` or `<image 1>` marks their place.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Any

from geo_r1.data.columns import present
from geo_r1.data.rows import read_rows
from geo_r1.data.sample import Sample, sample_of
from geo_r1.errors import UserError
from geo_r1.eval import cross_view
from geo_r1.eval.benchmark import Benchmark, Column, Question, broken_down
from geo_r1.eval.cross_view import figures, question_of, score
from geo_r1.eval.rows import RELATIVE, add_data, literal, texts_of

SUFFIX = "Think in <think> </think>, then answer with the letter of the right choice in <answer> </answer>."
LONGEST_OPTIONS = 65536  # characters of options that come as text
_NUMBERED = re.compile(r"<image ?(\d{1,2})>")


def _configure(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "JSONL, JSON or parquet", RELATIVE)
    parser.add_argument(
        "--by", action="append", default=[], metavar="COLUMN", help="add a table by COLUMN; may be repeated"
    )


def _questions(options: argparse.Namespace) -> list[Question]:
    root, open_ended = options.images or options.data.parent, 0
    kept: list[tuple[Sample, dict[str, Any]]] = []
    for number, row in read_rows(options.data):
        where = f"{options.data}, row {number}"
        if isinstance(row, Mapping) and "options" in row and row["options"] in (None, "[]", []):
            open_ended += 1  # MMMU has some without options
            continue
        own = isinstance(row, Mapping) and "options" in row
        columns = _own_columns(row, where) if own else row
        sample = sample_of(columns, where, root, fenced=options.images is not None)
        answer, num_choices = question_of(sample)
        by = texts_of(sample.metadata, options.by)
        kept.append((sample, {"answer": answer, "num_choices": num_choices, "city": "", "by": by}))
    for column in options.by:
        if kept and not any(truth["by"][column] for _, truth in kept):
            raise UserError(f"{options.data}: --by {column}: no row has a value in that column")
    return [Question(sample, truth | {"left_out": open_ended}) for sample, truth in kept]


def _own_columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert a row with `question` and `options` to our own columns."""
    columns = present(row)
    text, options = str(columns.pop("question", "")), _options(columns.pop("options"), where)
    images = [columns.pop(name) for name in _image_columns(columns)]
    images = [image for entry in images for image in (entry if isinstance(entry, list) else [entry])]
    lettered = (f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    prompt = "\n".join([text, *lettered, SUFFIX])
    order = [int(number) for number in _NUMBERED.findall(prompt)]
    if order:  # numbered marks may repeat, and come in any order
        if max(order) > len(images) or min(order) < 1:
            raise UserError(f"{where}: the text marks image {max(order)}, the row has {len(images)}")
        images = [images[number - 1] for number in order]
        prompt = _NUMBERED.sub("<image>", prompt)
    answer = _letter(columns.pop("answer", None), options, where)
    return columns | {"prompt": prompt, "images": images, "answer": answer, "num_choices": len(options)}


def _letter(answer: Any, options: list[str], where: str) -> Any:
    """The letter of an answer given as a letter, a number from 0, or an option's text."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        if str(answer) in options and options.index(str(answer)) != answer:
            raise UserError(
                f"{where}: the answer {answer} is a number from 0, or an option: write its letter"
            )
        return ascii_uppercase[answer]
    is_letter = isinstance(answer, str) and answer.strip().upper() in list(ascii_uppercase[: len(options)])
    if not is_letter and str(answer) in options:
        return ascii_uppercase[options.index(str(answer))]
    return answer


def _options(options: Any, where: str) -> list[str]:
    if isinstance(options, str) and len(options) <= LONGEST_OPTIONS:
        options = literal(options) or options  # MMMU writes the list as Python does
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise UserError(f"{where}: options must be a list of 2 to 26, got {options!r:.80}")
    return [str(option) for option in options]


def _image_columns(row: Mapping[str, Any]) -> Iterator[str]:
    numbered = [name for name in row if re.fullmatch(r"image_\d{1,2}", name)]
    yield from (name for name in ("image", "images") if name in row)
    yield from sorted(numbered, key=lambda name: int(name[6:]))


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all records, and by each column of `--by`."""
    groups = {
        f"{column}: {group}": row
        for column in records[0]["by"]
        for group, row in broken_down(records, partial(_group, column), figures).items()
    }
    return figures(records) | {"left_out": records[0]["left_out"], "by": groups}


def _group(column: str, record: Mapping[str, Any]) -> str | None:
    return record["by"][column]


BENCHMARK = Benchmark(
    name="mcq",
    help="any multiple-choice set in JSONL or parquet, such as MMMU or GEOBench-VLM",
    configure=_configure,
    questions=_questions,
    score=score,
    summarise=summarise,
    columns=(
        *(column for column in cross_view.BENCHMARK.columns if column.key != "well_formed"),
        Column("without options", "left_out", "count"),
    ),
    breakdowns=("by",),
)
