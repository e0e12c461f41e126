"""Ask the questions of a benchmark, score the answers, and write figures, table and map.

<out>/eval.json      what the answers were made with; another call must agree with it
      answers.jsonl  id, text and length of each answer, appended as they come
      records.jsonl  the reading of each answer, and whether it is right
      summary.json   table.md   map.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from geo_r1.data.journal import Journal
from geo_r1.errors import UserError, say
from geo_r1.eval.benchmark import Benchmark, Question
from geo_r1.eval.map import draw_map
from geo_r1.eval.predictors import PREDICTORS, Answer, Predictor, identity, predictor_of
from geo_r1.eval.table import markdown, show
from geo_r1.files import write_text, written_beside
from geo_r1.places import open_gazetteer


def evaluate(benchmark: Benchmark, options: argparse.Namespace, console: Console) -> None:
    """Run a benchmark and write its results; questions that an earlier run has answered are not asked again.

    Raises:
        UserError: the data, the model or the predictions are wrong, or the folder is another evaluation's.
    """
    predictor, out = predictor_of(options), options.out
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    questions = benchmark.questions(options)[: options.limit]
    if not questions:
        raise UserError(f"{options.data} asks nothing")
    if any(question.truth.get("latitude") is not None for question in questions):
        open_gazetteer()  # for the map: a missing package is an error now, not after hours of answers
    for name, count in Counter(question.sample.id for question in questions).items():
        if count > 1:
            raise UserError(f"{options.data}: two questions share the id {name!r:.80}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder: {error.strerror}") from error
    _check_folder(out / "eval.json", {"benchmark": benchmark.name, **identity(predictor, options)}, questions)
    if predictor == "file":
        answers = {answer.id: answer for answer in PREDICTORS[predictor](questions, options)}
    else:
        answers = _ask(questions, PREDICTORS[predictor], options, out / "answers.jsonl", console)
    records = []
    for question in questions:
        answer = answers[question.sample.id]
        scored = benchmark.score(question, answer.text)
        records.append({"id": answer.id, "length": answer.length, "error": answer.error, **scored})
    summary = {"num_samples": len(records), **benchmark.summarise(records)}
    failures = [record for record in records if record["error"]]
    summary["failed"] = len(failures)
    name = options.name or str(options.model or options.predictions.stem)
    write_text(out / "records.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(out / "summary.json", json.dumps(summary, indent=2))
    write_text(out / "table.md", markdown(benchmark, name, summary))
    if (figure := draw_map(records)) is not None:
        with written_beside(out / "map.png") as partial:
            figure.savefig(partial, dpi=160, format="png")
    show(benchmark, name, summary)
    if failures:
        again = "" if predictor == "file" else "; the same command asks again"
        told = f"{len(failures)} of {len(records)} were not answered, such as {failures[0]['id']!r:.80}"
        told += f": {failures[0]['error']:.300}{again}"
        if len(failures) == len(records) and predictor != "file":
            raise UserError(told)
        say(told)


def _ask(
    questions: Sequence[Question],
    predictor: Predictor,
    options: argparse.Namespace,
    path: Path,
    console: Console,
) -> dict[str, Answer]:
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Journal(path) as journal, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        answers = {key: Answer(key, row["text"], row["length"]) for key, row in journal.records.items()}
        todo = [question for question in questions if question.sample.id not in answers]
        task = progress.add_task("answers", total=len(questions), completed=len(questions) - len(todo))
        for answer in predictor(todo, options) if todo else ():
            answers[answer.id] = answer
            if answer.error is None:
                journal.append({"id": answer.id, "text": answer.text, "length": answer.length})
            progress.advance(task)
    return answers


def _check_folder(path: Path, decisive: dict[str, Any], questions: Sequence[Question]) -> None:
    """Keep answers of other questions, or of another model, out of this evaluation."""
    digest = hashlib.sha256()
    for sample in (question.sample for question in questions):
        digest.update(json.dumps([sample.id, *map(dict, sample.messages)]).encode())
        for image in sample.images:
            content = image if isinstance(image, bytes) else str(image).encode()
            digest.update(hashlib.sha256(content).digest())
    decisive = json.loads(json.dumps(decisive | {"questions": digest.hexdigest()[:16]}))
    if not path.exists():
        write_text(path, json.dumps(decisive, indent=2))
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} does not say what {path.parent} was made with; give another --out"
        ) from error
    for key, value in decisive.items():
        if before.get(key) != value:
            raise UserError(
                f"{path.parent} was made with {key} = {before.get(key)}, now {value}; give another --out"
            )
