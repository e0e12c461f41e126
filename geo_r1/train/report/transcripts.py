"""Prompts and completions of chosen steps: one parquet file per step, for notebooks and for the report.

    rollouts/grpo-000100.parquet    a row per completion, a row group per prompt

Any of these opens one, with the images in every row:

    pandas.read_parquet("rollouts/grpo-000100.parquet")
    pyarrow.parquet.read_table("rollouts/grpo-000100.parquet")
    datasets.load_dataset("parquet", data_files="rollouts/*.parquet")    # decodes the images

The file holds an image once per prompt: its bytes are dictionary-encoded.
"""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from geo_r1.data import Sample, load_image
from geo_r1.data.decoding import ImageSource, read_image
from geo_r1.data.messages import IMAGE_MARKER
from geo_r1.errors import UserError, one_line
from geo_r1.files import beside, written_beside
from geo_r1.rollout import Completion

FOLDER = "rollouts"
PART = "rewards/"  # of a column's name: the rewards of one function, as in metrics.jsonl
MAX_DICTIONARY = 2**30  # bytes; with pyarrow's own 1 MiB, larger images would be stored once a completion

# The columns of every file, before those named `rewards/<function>`, and whether they may be null.
COLUMNS = pa.schema(
    pa.field(name, kind, nullable=nullable)
    for name, kind, nullable in (
        ("stage", pa.string(), False),
        ("step", pa.int64(), False),  # from 1, as in metrics.jsonl
        ("position", pa.int64(), False),  # the prompt's, in the order of training
        ("sample_id", pa.string(), False),
        ("prompt", pa.string(), False),  # with <image> in place of each image
        ("answer", pa.string(), True),
        ("completion", pa.int32(), False),  # its number among the prompt's, from 0
        ("text", pa.string(), False),
        ("num_tokens", pa.int32(), False),  # including the end token
        ("ended", pa.bool_(), False),  # False: cut off
        ("reward", pa.float64(), True),
        ("advantage", pa.float64(), True),
        ("logp_mean", pa.float64(), True),  # nats per token, as sampled
    )
)
# Dictionaries, so that a prompt's completions share its images in memory too; files hold plain bytes.
IMAGES = pa.list_(pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary())), ("path", pa.string())]))


@dataclass(frozen=True)
class Transcript:
    """A prompt and its N completions.

    Attributes:
        position: in the training order.
        texts: [N] the completions as text.
        reward: [N] their totals, task units; None without a score.
        by_function: [N] the rewards of each function; the functions are the same throughout a step.
        advantage: [N], no unit; None if dynamic sampling left the group out.
    """

    position: int
    sample: Sample
    completions: Sequence[Completion]
    texts: Sequence[str]
    reward: Sequence[float | None]
    by_function: Mapping[str, Sequence[float | None]]
    advantage: Sequence[float] | None = None


def write_transcripts(run_dir: Path, stage: str, step: int, transcripts: Sequence[Transcript]) -> Path | None:
    """Write the file of a step, from 1, and return its path; without transcripts, write nothing.

    A file that exists is replaced in one move. A prompt is its text, with `<image>` for each image; several
    messages begin with their roles. Images are the files' own bytes, or PNG if they were
    never encoded. A lone surrogate, which UTF-8 cannot encode, becomes a question mark.

    Raises:
        UserError: an image can no longer be read; names the sample and the file.
    """
    if not transcripts:
        return None
    functions = list(transcripts[0].by_function)
    fields = [*COLUMNS, *(pa.field(utf8(PART + name), pa.float64()) for name in functions)]
    # `datasets` accepts images only in a column that may be null
    fields.insert(COLUMNS.get_field_index("completion"), pa.field("images", IMAGES))
    schema = pa.schema(fields)
    path = run_dir / FOLDER / f"{stage}-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_beside(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            dictionary_pagesize_limit=MAX_DICTIONARY,
            write_page_checksum=True,
            store_schema=False,  # or readers get dictionaries instead of bytes
        ) as writer,
    ):
        writer.add_key_value_metadata({"huggingface": _features(schema)})
        for transcript in transcripts:
            assert list(transcript.by_function) == functions, transcript.sample.id
            writer.write_table(_table(stage, step, transcript, schema))
    return path


def read_transcripts(path: Path, most: int) -> tuple[list[list[dict[str, Any]]], int]:
    """The rows of a file's first prompts, and its number of prompts; only a prompt's first row has `images`.

    Raises:
        UserError: the file is broken or lacks a column; names it.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            missing = [name for name in [*COLUMNS.names, "images"] if name not in names]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}")
            rewards = [name for name in names if name.startswith(PART)]
            wanted = pa.schema([*COLUMNS, *(pa.field(name, pa.float64()) for name in rewards)])
            prompts = [_rows(file, i, wanted) for i in range(min(most, file.num_row_groups))]
            return prompts, file.num_row_groups
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = one_line(error)
        raise UserError(f"{path}: expected the transcripts of a step, found: {reason:.200}") from error


def transcript_files(run_dir: Path) -> list[tuple[str, int, Path]]:
    """Stage, step and path of every file of a run, in this order. Files with other names are ignored."""
    found = []
    for path in (run_dir / FOLDER).glob("*.parquet"):
        match = re.fullmatch(r"(.+)-(\d+)", path.stem)
        if match and not path.name.startswith("."):
            found.append((match[1], int(match[2]), path))
    return sorted(found)


def forget_after(run_dir: Path, stage: str, step: int) -> None:
    """Delete a stage's files of steps after `step`, and files that a killed run left half-written."""
    for name, number, path in transcript_files(run_dir):
        if name == stage and number > step:
            path.unlink()
    for path in (run_dir / FOLDER).glob(beside(Path(f"{stage}-*.parquet")).name):
        path.unlink()


def _features(schema: pa.Schema) -> str:
    """The columns as `datasets` describes them: it then decodes the images."""
    features: dict[str, Any] = {
        field.name: {"_type": "Value", "dtype": {"double": "float64"}.get(str(field.type), str(field.type))}
        for field in schema
    }
    features["images"] = {"_type": "Sequence", "feature": {"_type": "Image"}}
    return json.dumps({"info": {"features": features}})


def _table(stage: str, step: int, transcript: Transcript, schema: pa.Schema) -> pa.Table:
    sample, completions = transcript.sample, transcript.completions
    size = len(completions)
    columns: dict[str, Any] = {
        "stage": [stage] * size,
        "step": [step] * size,
        "position": [transcript.position] * size,
        "sample_id": [utf8(sample.id)] * size,
        "prompt": [utf8(prompt_text(sample.messages))] * size,
        "answer": [None if sample.answer is None else utf8(sample.answer)] * size,
        "images": _images(sample, size),
        "completion": range(size),
        "text": [utf8(text) for text in transcript.texts],
        "num_tokens": [len(completion.token_ids) for completion in completions],
        "ended": [completion.ended for completion in completions],
        "reward": transcript.reward,
        "advantage": [None] * size if transcript.advantage is None else transcript.advantage,
        "logp_mean": [statistics.fmean(c.logp) if c.logp else None for c in completions],
    }
    columns |= {utf8(PART + name): values for name, values in transcript.by_function.items()}
    return pa.table(columns, schema=schema)


def _images(sample: Sample, size: int) -> pa.Array:
    """[size] lists of all of a sample's images, over one copy of their bytes."""
    count = len(sample.images)
    encoded = pa.array([_encoded(image, sample.id) for image in sample.images], pa.binary())
    indices = pa.array([*range(count)] * size, pa.int32())
    names = [utf8(image.name) if isinstance(image, Path) else None for image in sample.images] * size
    fields = [IMAGES.value_type.field(i) for i in range(2)]
    images = pa.StructArray.from_arrays(
        [pa.DictionaryArray.from_arrays(indices, encoded), pa.array(names, pa.string())], fields=fields
    )
    offsets = pa.array([i * count for i in range(size + 1)], pa.int32())
    return pa.ListArray.from_arrays(offsets, images)


def _encoded(image: ImageSource, owner: str) -> bytes:
    if isinstance(image, Path | bytes):
        return read_image(image, owner)
    assert isinstance(image, Image.Image)
    png = io.BytesIO()
    load_image(image, owner).save(png, "PNG")
    return png.getvalue()


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as text, with `<image>` for each image; several begin with their roles."""
    texts = [
        "".join(part["text"] if part["type"] == "text" else IMAGE_MARKER for part in message["content"])
        for message in messages
    ]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _rows(file: pq.ParquetFile, group: int, wanted: pa.Schema) -> list[dict[str, Any]]:
    rows = file.read_row_group(group, columns=wanted.names).select(wanted.names).cast(wanted).to_pylist()
    if len({row["position"] for row in rows}) != 1:
        raise ValueError(f"row group {group} is not one prompt")
    first = next(file.iter_batches(batch_size=1, row_groups=[group], columns=["images"]))
    rows[0]["images"] = first.column(0).to_pylist()[0]
    return rows


def utf8(text: str) -> str:
    """Text with a question mark for each lone surrogate, which UTF-8 cannot encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
