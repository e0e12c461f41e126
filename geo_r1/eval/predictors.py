"""Where answers to a benchmark's questions come from: a model in process, vLLM, an endpoint, or a file."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from geo_r1.eval.benchmark import Question
from geo_r1.eval.native import PROMPTS_A_TURN, complete, encode
from geo_r1.eval.rows import read_table
from geo_r1.models import PackedVLM, load_model
from geo_r1.models.cost import cached_bytes
from geo_r1.rollout import SamplingConfig

TEXT_COLUMNS = ("text", "prediction", "response", "completion", "raw_response", "output")
ID_COLUMNS = ("id", "image_id", "img_id", "image_file", "question_id", "key")


@dataclass(frozen=True)
class Answer:
    """What was said to one question.

    Attributes:
        id: of the question's sample.
        text: empty where nothing was said.
        length: in tokens; None where it is not known.
        error: why there is no answer; such a question is asked again by the next call.
    """

    id: str
    text: str
    length: int | None = None
    error: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who answers."""
    group = parser.add_argument_group("who answers")
    group.add_argument(
        "--engine", choices=tuple(ENGINES), help="without it: by --predictions, --url, --model"
    )
    group.add_argument("--model", help="a folder or hub name; of an endpoint, the model's name there")
    group.add_argument("--predictions", type=Path, help="JSONL or CSV of somebody's answers: id and text")
    group.add_argument("--max-new-tokens", type=int, default=2048, help="tokens of an answer (2048)")
    group.add_argument("--max-tokens", type=int, default=65536, help="tokens cached at a time (65536)")
    group.add_argument("--max-pixels", type=int, help="larger pictures are shrunk to it")
    group.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU")
    add_endpoint_arguments(group, sampling=False)


def engine_of(options: argparse.Namespace) -> str:
    """Which engine the options ask for.

    Raises:
        ValueError: they name none, or lack what it needs.
    """
    guesses = {"predictions": "file", "url": "endpoint", "model": "native"}
    engine = options.engine or next((e for name, e in guesses.items() if getattr(options, name)), None)
    if engine is None:
        raise ValueError("nobody to ask: give --model, --url with --model, or --predictions")
    for name in {"file": ("predictions",), "endpoint": ("url", "model")}.get(engine, ("model",)):
        if not getattr(options, name):
            raise ValueError(f"--engine {engine} needs --{name}")
    for name in ("max_new_tokens", "max_tokens", "max_pixels"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if engine == "endpoint":
        _endpoint(options)
    return engine


def _endpoint(options: argparse.Namespace) -> EndpointConfig:
    return EndpointConfig.of(options, max_tokens=options.max_new_tokens)


def identity(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers of an engine, besides the questions."""
    if engine == "file":
        return {"predictions": str(options.predictions)}
    decisive: dict[str, Any] = {"engine": engine, "model": options.model}
    if engine == "endpoint":
        decisive["url"] = options.url
    elif (folder := Path(options.model)).is_dir():
        files = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))
        ]
        decisive["weights"] = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    names = ("max_new_tokens", "max_pixels", "temperature", "dtype")
    return decisive | {name: getattr(options, name) for name in names}


def from_file(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """Somebody's answers, by the questions' ids or by the names of their pictures.

    Raises:
        ValueError: the file is malformed, answers a question twice, or knows none of these questions.
    """
    given = _read_predictions(options.predictions)
    by_stem = {_stem(key): text for key, text in given.items()}
    missing = 0
    for question in questions:
        name = question.sample.id
        text = given.get(name, by_stem.get(_stem(name)))
        missing += text is None
        yield Answer(name, text or "", error=f"not in {options.predictions}" if text is None else None)
    if given and missing == len(questions):
        raise ValueError(
            f"{options.predictions} answers none of these questions: its ids are such as "
            f"{next(iter(given))!r:.80}, the questions' such as {questions[0].sample.id!r:.80}"
        )


def _stem(name: str) -> str:
    """An id without a picture's ending, which one of two files may have and the other not."""
    head, _, suffix = name.rpartition(".")
    return head if suffix.lower() in ("jpg", "jpeg", "png", "webp") else name


def _read_predictions(path: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    for number, row in _rows(path):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object with id and text")
        lowered = {str(key).lower(): value for key, value in row.items()}
        key = next((lowered[name] for name in ID_COLUMNS if lowered.get(name) is not None), None)
        texts = [name for name in TEXT_COLUMNS if name in lowered]
        if key is None or not texts:
            raise ValueError(
                f"{where}: needs an id ({', '.join(ID_COLUMNS)}) and a text ({', '.join(TEXT_COLUMNS)}); "
                f"it has {', '.join(lowered) or 'nothing'}"[:300]
            )
        if len(texts) > 1 and "text" not in texts:
            raise ValueError(f"{where}: which is the answer, {' or '.join(texts)}? Name it text")
        key, text = str(key), lowered["text" if "text" in texts else texts[0]]
        if key in given:
            raise ValueError(f"{where}: {key!r:.80} is answered twice")
        given[key] = "" if text is None else text if isinstance(text, str) else json.dumps(text)
    return given


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix != ".csv":
        yield from read_lines(path)
        return
    for number, (_, row) in enumerate(read_table(path), 1):
        yield number, row


def from_native(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """A checkpoint in this process, by the native sampler."""
    vlm, tokenizer, encoder = _load(options, keep_pictures=False)
    samples = [question.sample for question in questions]
    turns = complete(
        vlm,
        tokenizer,
        encoder,
        samples,
        max_new_tokens=options.max_new_tokens,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        budget="--max-tokens",
    )
    answered = 0
    for turn in turns:
        for sample, (completion, text) in zip(samples[answered:], turn, strict=False):
            yield Answer(sample.id, text, len(completion.token_ids))
        answered += len(turn)


def from_vllm(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """A checkpoint by vLLM in this process, with the weights and prompts of the native sampler."""
    from geo_r1.rollout.vllm.in_process import VLLMEngine
    from geo_r1.rollout.vllm.requests import write_engine_folder

    vlm, tokenizer, encoder = _load(options, keep_pictures=True, weights_on="cpu")
    prompts = [encode(encoder, question.sample) for question in questions]
    longest = max((len(prompt.token_ids) for prompt in prompts if prompt), default=0)
    on_gpu = torch.cuda.is_available()
    cache = options.max_tokens * cached_bytes(vlm.model.config, vlm.compute_dtype.itemsize)
    sampling = SamplingConfig(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_engine_folder(Path(folder) / "model", vlm.model.config, tokenizer, encoder.image_processor)
        engine = VLLMEngine(
            Path(folder) / "model",
            end_token_ids={tokenizer.eos_token_id, *vlm.end_token_ids},
            vision_token_ids=vlm.vision_token_ids,
            dtype=vlm.compute_dtype,
            max_model_len=longest + options.max_new_tokens,
            gpu_memory_utilization=0.85,
            kv_cache_bytes=None if on_gpu else cache,
        )
        try:
            engine.load(vlm.model.named_parameters())
            everything = [(q.sample.id, p) for q, p in zip(questions, prompts, strict=True) if p is not None]
            for start in range(0, len(everything), PROMPTS_A_TURN):
                asked = everything[start : start + PROMPTS_A_TURN]
                groups = engine.sample([p for _, p in asked], 1, sampling, [name for name, _ in asked])
                for (name, _), [completion] in zip(asked, groups, strict=True):
                    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                    yield Answer(name, text, len(completion.token_ids))
        finally:
            engine.close()


def _load(
    options: argparse.Namespace, *, keep_pictures: bool, weights_on: str | None = None
) -> tuple[PackedVLM, Any, PromptEncoder]:
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    vlm, tokenizer, image_processor = load_model(options.model, dtype, device=device, weights_on=weights_on)
    vlm.model.requires_grad_(False).eval()
    image_token = vlm.model.config.image_token_id
    encoder = PromptEncoder(
        tokenizer, image_processor, image_token, options.max_pixels, keep_pictures=keep_pictures
    )
    return vlm, tokenizer, encoder


def from_endpoint(questions: Sequence[Question], options: argparse.Namespace) -> Iterator[Answer]:
    """A model behind an OpenAI-compatible address."""
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
ENGINES: dict[str, Predictor] = {
    "native": from_native,
    "vllm": from_vllm,
    "endpoint": from_endpoint,
    "file": from_file,
}
