"""Write chains of thought: a teacher that knows the answer explains how to find it.

The teacher is a model behind an OpenAI-compatible endpoint, or the procedural world's own. Each sample is
written as it comes. After a stop, the same command continues and does not repeat a request.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from functools import partial
from pathlib import Path

from geo_r1.data.paths import naming
from geo_r1.data.rows import read_samples
from geo_r1.data.sample import Sample
from geo_r1.data.teaching.cot_output import CotOutput
from geo_r1.data.teaching.endpoint import (
    Endpoint,
    EndpointConfig,
    Messages,
    add_endpoint_arguments,
    chat_messages,
)
from geo_r1.errors import UserError

KNOWN = ("city", "country", "continent", "latitude", "longitude", "driving_side")
MAX_PROMPT = 2**20  # bytes
PROMPT = """\
Write the model solution of the question above. It is read by somebody who sees the same pictures and the same
question and nothing else, so reason as if you had found the answer yourself and never say that you were told.

For you alone:
- right answer: {answer}
{metadata}

Go through four steps in this order, each under its heading:

Visual cues: what the pictures show that tells one place from another, such as the course of roads and
shores, roofs, vegetation, terrain, signs and their script, markings, light. Only what can be seen.
Knowledge association: what these cues are known to mean, from the region down to the place.
Evidence corroboration: hold the cues against every candidate, or every place that comes into question; say
what speaks for the right one and which detail rules out each of the others.
Conclusion: the one answer that is left, and how sure it is.

State nothing that the pictures or the list above contradict. Do not repeat yourself; 120 to 300 words.
Reply with exactly this and nothing around it:

<think>
Visual cues: ...
Knowledge association: ...
Evidence corroboration: ...
Conclusion: ...
</think>
<answer>{answer}</answer>"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--teacher", choices=("endpoint", "world"), default="endpoint", help="the writer (%(default)s)")
    add("--out", type=Path, required=True, help="JSONL to write or continue")
    add("--data", type=Path, help="samples with answers: JSONL, JSON or parquet")
    add("--limit", type=int, help="use only this many samples from the start of --data")
    add("--prompt", type=Path, help="text in place of our prompt; {answer} and {metadata} are filled in")
    add("--retry-failed", action="store_true", help="ask again for the samples that failed")
    add("--max-pixels", type=int, help="shrink larger images to this size")
    add("--price-in", type=float, default=0.0, help="USD per million tokens of prompts")
    add("--price-out", type=float, default=0.0, help="USD per million tokens of replies")
    add("--num", type=int, default=2000, help="number of samples from --teacher world (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the world (%(default)s)")
    add_endpoint_arguments(parser)


def command(options: argparse.Namespace) -> None:
    """Write chains of thought until every sample has one or has failed.

    Raises:
        UserError: an option or a sample is wrong, or no request can succeed.
        KeyboardInterrupt: by Ctrl-C; all replies so far are written.
    """
    for name in ("limit", "num", "max_pixels"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("price_in", "price_out"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    if options.out.suffix != ".jsonl":
        raise UserError(f"--out {options.out} must end in .jsonl")
    (_from_world if options.teacher == "world" else _from_endpoint)(options)


def _from_world(options: argparse.Namespace) -> None:
    from geo_r1.data.teaching.world_teacher import world_samples

    if options.data or options.url:
        raise UserError("--teacher world makes its own samples and asks nobody: leave out --data and --url")
    decisive = {"teacher": "world", "seed": options.seed}
    with (
        CotOutput.opened(options, decisive, {"num": options.num}, ()) as output,
        output.progress() as advance,
    ):
        advance(options.num)
        for sample in world_samples(options.num, options.seed):
            if sample.id not in output:
                output.write(sample, {"response": sample.response, "teacher": "world"})
            advance()


def _from_endpoint(options: argparse.Namespace) -> None:
    config = EndpointConfig.of(options)
    if options.data is None:
        raise UserError("--teacher endpoint needs --data, samples with answers")
    if options.data.resolve() == options.out.resolve():
        raise UserError(f"--out {options.out} is --data itself: choose another")
    prompt = PROMPT if options.prompt is None else _read_prompt(options.prompt)
    samples = read_samples(options.data)[: options.limit]
    for sample in samples:
        if sample.answer is None and "{answer}" in prompt:
            raise UserError(f"{options.data}: sample {sample.id} has no answer to tell the teacher")
    decisive = {
        "teacher": "endpoint",
        "model": config.model,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
    }
    settings = {name: getattr(options, name) for name in ("url", "temperature", "max_tokens", "max_pixels")}
    with CotOutput.opened(options, decisive, settings, {sample.id for sample in samples}) as output:
        for sample in samples:
            output.check_same(sample)
        todo = {sample.id: sample for sample in samples if sample.id not in output}
        requests = (
            (name, partial(_ask, sample, prompt, options.max_pixels)) for name, sample in todo.items()
        )
        with Endpoint(config) as endpoint, output.progress() as advance:
            advance(len(samples), len(samples) - len(todo))
            for name, outcome in endpoint.run(requests):
                output.take(todo[name], outcome, config.model)
                advance()


def _read_prompt(path: Path) -> str:
    with naming(f"--prompt {path}", "read"), path.open("rb") as file:
        text = file.read(MAX_PROMPT + 1)
    if len(text) > MAX_PROMPT or not text.strip():
        raise UserError(f"--prompt {path} must hold from 1 byte to {MAX_PROMPT >> 20} MiB of text")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt {path} is not UTF-8: byte {error.start}") from None


def _ask(sample: Sample, prompt: str, max_pixels: int | None) -> Messages:
    return chat_messages(sample, text=fill(prompt, sample), max_pixels=max_pixels)


def fill(prompt: str, sample: Sample) -> str:
    """Fill in a sample's answer and the known facts about its place; other braces stay unchanged."""
    known = {key: sample.metadata[key] for key in KNOWN if sample.metadata.get(key) not in (None, "")}
    lines = [
        f"- {key.replace('_', ' ')}: {' '.join(str(value).split())[:200]}" for key, value in known.items()
    ]
    values = {"answer": sample.answer or "", "metadata": "\n".join(lines) or "- nothing more is known"}
    return re.sub(r"\{(answer|metadata)\}", lambda match: values[match[1]], prompt)
