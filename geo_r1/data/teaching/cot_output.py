"""The files that `cot` writes: samples, failures, and a card with counts of both."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from geo_r1.data.journal import Journal
from geo_r1.data.paths import naming
from geo_r1.data.sample import Sample
from geo_r1.data.teaching.chat import Failure, Reply
from geo_r1.errors import UserError, one_line
from geo_r1.files import write_text, written_beside


class CotOutput:
    """The output so far. OUT.jsonl has training rows, and OUT.failed.jsonl the reasons of the other samples.

    OUT.card.json has counts, and OUT_images/ the images that have no file of their own.
    """

    def __init__(self, out: Path, written: Journal, failed: Journal, prices: Mapping[str, float]) -> None:
        self.out, self.written, self.failed, self.prices = out, written, failed, prices
        self.tokens = dict.fromkeys(prices, 0)  # input_tokens, output_tokens
        for record in (*written.records.values(), *failed.records.values()):
            self._count(record.get("usage"))

    @classmethod
    @contextmanager
    def opened(
        cls,
        options: argparse.Namespace,
        decisive: Mapping[str, Any],
        settings: Mapping[str, Any],
        asked: Iterable[str],
    ) -> Iterator[CotOutput]:
        """Open the files of --out, new or to be continued; the card is written at the start and at the end.

        Args:
            decisive: settings that must not change between calls.
            settings: other entries of the card.
            asked: samples whose failures --retry-failed removes.
        """
        out: Path = options.out
        failed, card = out.with_suffix(".failed.jsonl"), out.with_suffix(".card.json")
        with naming(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            if any(path.exists() and path.stat().st_size for path in (out, failed)):
                _check_card(card, out, decisive)
            else:
                write_text(card, json.dumps({**decisive, **settings}, indent=1) + "\n")
        if options.retry_failed and failed.exists():
            _forget(failed, set(asked))
        with Journal(out) as written, Journal(failed) as failures:
            prices = {"input_tokens": options.price_in, "output_tokens": options.price_out}
            output = cls(out, written, failures, prices)
            try:
                yield output
            finally:
                with naming(card):
                    write_text(
                        card, json.dumps({**decisive, **settings, **output.figures()}, indent=1) + "\n"
                    )
                print(one_line(output))

    def __contains__(self, name: str) -> bool:
        return name in self.written.records or name in self.failed.records

    def check_same(self, sample: Sample) -> None:
        """Raise UserError if another question with the sample's id has been answered."""
        row = self.written.records.get(sample.id)
        if row and (row.get("prompt"), row.get("answer")) != (list(sample.messages), sample.answer):
            raise UserError(
                f"{self.out}: sample {sample.id!r:.80} was another question: choose another --out"
            )

    def __str__(self) -> str:
        reasons = Counter(record.get("error") for record in self.failed.records.values()).most_common(1)
        often = f" (most often: {reasons[0][0]})" if reasons else ""
        return f"{self.out}: {len(self.written.records)} samples, {self._told()}{often}"

    def take(self, sample: Sample, outcome: Reply | Failure, teacher: str) -> None:
        """Write the outcome of a sample to one of the files."""
        usage: dict[str, Any] = {}
        reason = outcome.reason if isinstance(outcome, Failure) else None
        if isinstance(outcome, Reply):
            usage = {"input_tokens": outcome.input_tokens, "output_tokens": outcome.output_tokens}
            if outcome.finish_reason == "length":
                reason = f"cut off after {outcome.output_tokens} tokens: raise --max-tokens"
            else:
                try:
                    self.write(sample, {"response": outcome.text, "teacher": teacher, "usage": usage})
                except UserError as error:
                    if isinstance(error.__cause__, OSError):
                        raise
                    reason = str(error)  # the record does not fit in a line
        if reason is not None:
            self.failed.append({"id": sample.id, "error": reason} | ({"usage": usage} if usage else {}))
        self._count(usage)

    def write(self, sample: Sample, columns: Mapping[str, Any]) -> None:
        """Append a sample's training row, with image paths relative to the output's folder."""
        home = self.out.parent.resolve()
        images = [
            os.path.relpath(
                image.resolve() if isinstance(image, Path) else self._keep(image, sample, n), home
            )
            for n, image in enumerate(sample.images)
        ]
        metadata = json.loads(json.dumps(dict(sample.metadata), default=str))  # a table's dates become text
        row = {"id": sample.id, "prompt": list(sample.messages), "images": images, "answer": sample.answer}
        self.written.append({**row, **metadata, **columns})

    def _keep(self, image: Image.Image | bytes, sample: Sample, number: int) -> Path:
        """Write an image that has no file of its own."""
        name = sample.id if re.fullmatch(r"\w[\w.-]{0,79}", sample.id, re.ASCII) else ""
        name = name or hashlib.blake2b(sample.id.encode(errors="replace"), digest_size=16).hexdigest()
        suffix = "png"
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                suffix = (opened.format or suffix).lower()
        path = self.out.resolve().with_name(f"{self.out.stem}_images") / f"{name}_{number}.{suffix}"
        with naming(path), written_beside(path) as partial_path:
            path.parent.mkdir(exist_ok=True)
            if isinstance(image, bytes):
                partial_path.write_bytes(image)
            else:
                image.save(partial_path, "PNG")
        return path

    def figures(self) -> dict[str, Any]:
        counts = {"num_samples": len(self.written.records), "num_failed": len(self.failed.records)}
        return counts | self.tokens | ({"cost_usd": self._cost()} if any(self.prices.values()) else {})

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """A progress bar; yields advance(total=None, done=0). Call it with the total, then once a sample."""
        columns = (TextColumn("chains of thought"), BarColumn(), MofNCompleteColumn())
        figures = TextColumn("{task.fields[told]}", markup=False)
        with Progress(*columns, figures, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task, start, count = bar.add_task("", total=None, told=""), time.monotonic(), 0

            def advance(total: int | None = None, done: int = 0) -> None:
                nonlocal count
                if total is not None:
                    bar.update(task, total=total, completed=done)
                    return
                count += 1
                rate = count / max(time.monotonic() - start, 1e-3)
                bar.update(task, advance=1, told=f"{rate:.2g}/s, {self._told()}")

            yield advance

    def _told(self) -> str:
        cost = f", {self._cost():.2f} USD" if any(self.prices.values()) else ""
        return f"{sum(self.tokens.values()):,} tokens{cost}, {len(self.failed.records)} failed"

    def _cost(self) -> float:
        return sum(self.prices[name] * tokens for name, tokens in self.tokens.items()) / 1e6

    def _count(self, usage: Any) -> None:
        if isinstance(usage, Mapping):
            for name in self.tokens:
                self.tokens[name] += usage[name] if isinstance(usage.get(name), int) else 0


def _check_card(card: Path, out: Path, decisive: Mapping[str, Any]) -> None:
    try:
        found = json.loads(card.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{out} has no readable {card.name}, which says how it was made: choose another --out"
        )
    for name, value in decisive.items():
        if found.get(name) != value:
            raise UserError(
                f"{out} was made with {name} {found.get(name)!r:.80}, not {value!r:.80}: choose another --out"
            )


def _forget(failed: Path, names: set[str]) -> None:
    """Remove these samples from the file of failures, all at once."""
    with Journal(failed) as journal:
        kept = [record for name, record in journal.records.items() if name not in names]
    with naming(failed):
        write_text(failed, "".join(json.dumps(record) + "\n" for record in kept))
