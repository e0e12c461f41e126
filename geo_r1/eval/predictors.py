"""Answer a benchmark's questions: by a model in process, vLLM, an endpoint, or a file."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from geo_r1.data import PromptEncoder
from geo_r1.data.journal import read_lines
from geo_r1.data.teaching.endpoint import (
    Endpoint,
    EndpointConfig,
    Reply,
    add_endpoint_arguments,
    chat_messages,
)
from geo_r1.errors import UserError
from geo_r1.eval.benchmark import Question
from geo_r1.eval.native import complete, native_sampler
from geo_r1.eval.rows import read_table
from geo_r1.models import EncodedPrompt, PackedVLM, load_model
from geo_r1.models.cost import cached_bytes
from geo_r1.rollout import Completion, SamplingConfig

TEXT_COLUMNS = ("text", "prediction", "response", "completion", "raw_response", "output")
ID_COLUMNS = ("id", "image_id", "img_id", "image_file", "question_id", "key")


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        id: the id of the question's sample.
        text: empty without an answer.
        length: in tokens; None if unknown.
        error: why there is no answer; the next call asks the question again.
    """

    id: str
    text: str
    length: int | None = None
    error: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the predictor."""
    group = parser.add_argument_group("predictor")
    add = group.add_argument
    add("--engine", choices=tuple(PREDICTORS), help="default: chosen by --predictions, --url or --model")
    add("--model", help="a folder or hub name; for an endpoint, the model's name there")
    add("--predictions", type=Path, help="JSONL or CSV of answers, with id and text")
    add("--max-new-tokens", type=int, default=2048, help="most tokens of an answer (2048)")
    add("--max-tokens", type=int, default=65536, help="most tokens cached at a time (65536)")
    add("--max-pixels", type=int, help="shrink larger images to this many pixels")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU")
    add_endpoint_arguments(group, sampling=False)


def predictor_of(options: argparse.Namespace) -> str:
    """The predictor that the options ask for, a key of PREDICTORS.

    Raises:
        UserError: they name none, or lack an option that it needs.
    """
    guesses = {"predictions": "file", "url": "endpoint", "model": "native"}
    name = options.engine or next((e for option, e in guesses.items() if getattr(options, option)), None)
    if name is None:
        raise UserError("nobody to ask: give --model, --url with --model, or --predictions")
    for needed in {"file": ("predictions",), "endpoint": ("url", "model")}.get(name, ("model",)):
        if not getattr(options, needed):
            raise UserError(f"--engine {name} needs --{needed}")
    for limit in ("max_new_tokens", "max_tokens", "max_pixels"):
        if (value := getattr(options, limit)) is not None and value < 1:
            raise UserError(f"--{limit.replace('_', '-')} must be at least 1, got {value}")
    if name == "endpoint":
        _endpoint(options)
    return name


def _endpoint(options: argparse.Namespace) -> EndpointConfig:
    return EndpointConfig.of(options, max_tokens=options.max_new_tokens)


def identity(predictor: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the answers of a predictor."""
    if predictor == "file":
        return {"predictions": str(options.predictions)}
    decisive: dict[str, Any] = {"engine": predictor, "model": options.model}
    if predictor == "endpoint":
        decisive["url"] = options.url
    elif (folder := Path(options.model)).is_dir():
        found = sorted(folder.glob("*.safetensors"))
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]
        decisive["weights"] = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    names = ("max_new_tokens", "max_pixels", "temperature", "dtype")
    return decisive | {name: getattr(options, name) for name in names}


def from_file(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """Read answers from a file, matched by question id or image name.

    Raises:
        UserError: the file is malformed, answers a question twice, or answers none of these questions.
    """
    given = _read_predictions(options.predictions)
    by_stem = {_stem(key): text for key, text in given.items()}
    names = [question.sample.id for question in questions]
    texts = {name: given.get(name, by_stem.get(_stem(name))) for name in names}
    if given and not any(text is not None for text in texts.values()):
        raise UserError(
            f"{options.predictions} answers none of these questions: its ids are such as "
            f"{next(iter(given))!r:.80}, the questions' such as {names[0]!r:.80}"
        )
    for name, text in texts.items():
        yield Answer(name, text or "", error=f"not in {options.predictions}" if text is None else None)


def _stem(name: str) -> str:
    """An id without an image's file ending, which one of the two files may leave out."""
    head, _, suffix = name.rpartition(".")
    return head if suffix.lower() in ("jpg", "jpeg", "png", "webp") else name


def _read_predictions(path: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    csv = path.suffix == ".csv"
    for number, row in enumerate((r for _, r in read_table(path)), 1) if csv else read_lines(path):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with id and text")
        lowered = {str(key).lower(): value for key, value in row.items()}
        key = next((lowered[name] for name in ID_COLUMNS if lowered.get(name) is not None), None)
        texts = [name for name in TEXT_COLUMNS if name in lowered]
        if key is None or not texts:
            raise UserError(
                f"{where}: needs an id ({', '.join(ID_COLUMNS)}) and a text ({', '.join(TEXT_COLUMNS)}); "
                f"it has {', '.join(lowered) or 'nothing'}"[:300]
            )
        if len(texts) > 1 and "text" not in texts:
            raise UserError(f"{where}: which is the answer, {' or '.join(texts)}? Name it text")
        key, text = str(key), lowered["text" if "text" in texts else texts[0]]
        if key in given:
            raise UserError(f"{where}: {key!r:.80} is answered twice")
        given[key] = "" if text is None else text if isinstance(text, str) else json.dumps(text)
    return given


def from_native(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """Ask a checkpoint in this process, through the native sampler."""
    vlm, tokenizer, encoder = _load(options, keep_images=False)
    sampler = native_sampler(vlm, tokenizer, _sampling(options), options.max_tokens, "--max-tokens")
    prompts = (encoder.encode(question.sample) for question in questions)
    yield from _answers(questions, complete(sampler, tokenizer, prompts))


def from_vllm(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """Ask a checkpoint through vLLM in this process, with the native sampler's weights and prompts."""
    from geo_r1.rollout.vllm.in_process import VLLMEngine
    from geo_r1.rollout.vllm.requests import write_engine_folder

    vlm, tokenizer, encoder = _load(options, keep_images=True, weights_on="cpu")
    prompts = [encoder.encode(question.sample) for question in questions]
    cache = options.max_tokens * cached_bytes(vlm.model.config, vlm.compute_dtype.itemsize)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "model")
        write_engine_folder(folder, vlm.model.config, tokenizer, encoder.image_processor)
        engine = VLLMEngine(
            folder,
            end_token_ids={tokenizer.eos_token_id, *vlm.end_token_ids},
            vision_token_ids=vlm.vision_token_ids,
            dtype=vlm.compute_dtype,
            max_model_len=max(len(prompt.token_ids) for prompt in prompts) + options.max_new_tokens,
            gpu_memory_utilization=0.85,
            kv_cache_bytes=None if torch.cuda.is_available() else cache,
        )

        def sample(turn: list[EncodedPrompt]) -> list[list[Completion]]:
            return engine.sample(turn, 1, _sampling(options), [prompt.sample_id for prompt in turn])

        try:
            engine.load(vlm.model.named_parameters())
            yield from _answers(questions, complete(sample, tokenizer, prompts))
        finally:
            engine.close()


def _sampling(options: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(temperature=options.temperature, max_new_tokens=options.max_new_tokens)


def _answers(
    questions: Sequence[Question], turns: Iterable[list[tuple[Completion, str]]]
) -> Iterator[Answer]:
    for question, (completion, text) in zip(questions, chain.from_iterable(turns), strict=True):
        yield Answer(question.sample.id, text, len(completion.token_ids))


def _load(
    options: argparse.Namespace, *, keep_images: bool, weights_on: str | None = None
) -> tuple[PackedVLM, Any, PromptEncoder]:
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    vlm, tokenizer, image_processor = load_model(options.model, dtype, device=device, weights_on=weights_on)
    vlm.model.requires_grad_(False).eval()
    image_token = vlm.model.config.image_token_id
    encoder = PromptEncoder(
        tokenizer, image_processor, image_token, options.max_pixels, keep_images=keep_images
    )
    return vlm, tokenizer, encoder


def from_endpoint(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """Ask a model at an OpenAI-compatible address."""
    requests = (
        (q.sample.id, lambda q=q: chat_messages(q.sample, max_pixels=options.max_pixels)) for q in questions
    )
    with Endpoint(_endpoint(options)) as endpoint:
        for name, outcome in endpoint.run(requests):
            if isinstance(outcome, Reply):
                yield Answer(name, outcome.text, outcome.output_tokens)
            else:
                yield Answer(name, "", error=outcome.reason)


Predictor = Callable[[Sequence[Question], argparse.Namespace], Iterator[Answer]]
PREDICTORS: dict[str, Predictor] = {
    "native": from_native,
    "vllm": from_vllm,
    "endpoint": from_endpoint,
    "file": from_file,
}
