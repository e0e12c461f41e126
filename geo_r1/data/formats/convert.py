"""Rewrite a file of samples for another trainer, with its columns and valid image paths."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from geo_r1.data.formats.known import FORMATS, detect
from geo_r1.data.journal import MAX_LINE
from geo_r1.data.paths import moved, naming
from geo_r1.data.rows import read_rows
from geo_r1.errors import UserError, one_line
from geo_r1.files import beside, write_text, written_beside

Rows = Iterator[tuple[str, dict[str, Any]]]  # where, row
Writer = Callable[[Callable[[], Rows], Path], int]  # returns the number of rows
BATCH = 256  # rows per parquet row group; they may hold images

# LLaMA-Factory's entries for files. It resets every column or tag that an entry leaves out.
DATASET_INFO: dict[str, dict[str, Any]] = {
    "llama-factory": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}},
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--from", dest="source", default="auto", choices=["auto", *FORMATS],
                        help="format of --in; auto, the default, goes by the first row")  # fmt: skip
    parser.add_argument("--to", dest="target", required=True, choices=[*FORMATS], help="format of --out")
    parser.add_argument("--in", dest="input", type=Path, required=True, metavar="FILE",
                        help=".jsonl, .json (one list) or .parquet")  # fmt: skip
    parser.add_argument("--out", dest="output", type=Path, required=True, metavar="FILE",
                        help="the same types as --in; replaced if it exists")  # fmt: skip
    parser.add_argument("--image-root", type=Path, metavar="DIR",
                        help="folder of relative image paths; default: the folder of --in")  # fmt: skip
    parser.add_argument("--flatten", action="store_true",
                        help="if the format needs it, put images first, name them by number in the text, "
                        "and begin the text with the system turn")  # fmt: skip


def command(options: argparse.Namespace) -> None:
    """Convert a file and print the number of rows.

    Raises:
        UserError: the format is unclear, or a row is malformed or does not fit it; names file and row.
    """
    source, why = options.source, ""
    if source == "auto":
        number, first = next(read_rows(options.input), (0, None))
        source, why = detect(first), ", as the first one looks,"
        if not number:
            raise UserError(f"{options.input} holds no samples")
        if source is None:
            raise UserError(
                f"{options.input}, row {number}: of no format, or of several; "
                f"say --from with one of {', '.join(FORMATS)}"
            )
    given = {name: getattr(options, name) for name in ("target", "image_root", "flatten")}
    count = convert_file(options.input, options.output, source=source, **given)
    print(one_line(f"{count} rows of {source}{why} written as {options.target}: {options.output}"))


def convert_file(
    path: Path, out: Path, *, source: str, target: str, image_root: Path | None = None, flatten: bool = False
) -> int:
    """Convert a file, and list it in `dataset_info.json` beside it if LLaMA-Factory needs that.

    Args:
        path, out: .jsonl, .json or .parquet; JSONL and parquet are streamed.
        source, target: names of `FORMATS`.
        image_root: the folder that relative image paths start from; None: the folder of `path`.
        flatten: see `Format.write`.

    Returns:
        The number of rows.

    Raises:
        UserError: a file cannot be read or written in its format, or has no row; names file and row.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"{out}: expected {', '.join(WRITERS)}")
    info = out.with_name("dataset_info.json")
    if out == info and target in DATASET_INFO:
        raise UserError(f"{out}: LLaMA-Factory lists its data sets there; choose another name")
    known = _known_sets(info) if target in DATASET_INFO else {}
    root = (path.parent if image_root is None else image_root).absolute()
    folder = out.parent.absolute()

    def rows() -> Rows:
        for number, row in track(read_rows(path), "rows", console=Console(stderr=True), transient=True):
            where = f"{path}, row {number}"
            try:
                own = FORMATS[source].read(row, where)
                if isinstance(own.get("images"), list):
                    own["images"] = [moved(image, root, folder) for image in own["images"]]
                yield where, FORMATS[target].write(own, flatten=flatten)
            except RecursionError:
                raise UserError(f"{where}: nested too deep") from None
            except ValueError as error:
                raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error

    try:
        with naming(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(out) as partial:
                count = WRITERS[out.suffix](rows, partial)
                if not count:
                    raise UserError(f"{path} holds no samples")
    finally:
        with suppress(OSError):  # the file is gone if all went well
            beside(out).unlink()
    if target in DATASET_INFO:
        known[out.stem] = {"file_name": out.name} | DATASET_INFO[target]
        with naming(info):
            write_text(info, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    return count


def _known_sets(info: Path) -> dict[str, Any]:
    if not info.exists():
        return {}
    try:
        known = json.loads(info.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{info} cannot be read: {one_line(error)}") from error
    if not isinstance(known, dict):
        raise UserError(f"{info} is a {type(known).__name__}, not a table of data sets")
    return known


def _json(where: str, row: dict[str, Any]) -> bytes:
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # bytes, dates, NaN, lone surrogates
        raise UserError(f"{where}: not to be written as JSON: {error}") from error
    if len(line) >= MAX_LINE:
        raise UserError(f"{where}: it takes {len(line)} bytes as JSON, more than {MAX_LINE >> 20} MiB")
    return line


def _write_json(before: bytes, between: bytes, after: bytes) -> Writer:
    def write(rows: Callable[[], Rows], path: Path) -> int:
        count = 0
        with path.open("wb") as file:
            for count, (where, row) in enumerate(rows(), 1):
                file.write((between if count > 1 else before) + _json(where, row))
            file.write(after)
        return count

    return write


def _batches(rows: Rows) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def _write_parquet(rows: Callable[[], Rows], path: Path) -> int:
    """Read the rows twice: first for their types, since columns may be absent, then for their values."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema, count, where = pa.schema([]), 0, ""
    try:
        for batch in _batches(rows()):
            where = f"{batch[0][0]} and the {len(batch) - 1} after it"
            found = pa.schema(list(pa.array([row for _, row in batch]).type))
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
            count += len(batch)
        with ParquetWriter(path, schema) as writer:
            for batch in _batches(rows()):
                where = f"{batch[0][0]} and the {len(batch) - 1} after it"
                table = pa.array([row for _, row in batch], pa.struct(list(schema)))
                writer.write_batch(pa.RecordBatch.from_struct_array(table))
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        reason = one_line(error)
        raise UserError(f"{where}: a table wants one type a column: {reason}; .jsonl does not") from error
    return count


WRITERS: dict[str, Writer] = {
    ".jsonl": _write_json(b"", b"\n", b"\n"),
    ".json": _write_json(b"[\n", b",\n", b"\n]\n"),
    ".parquet": _write_parquet,
}
