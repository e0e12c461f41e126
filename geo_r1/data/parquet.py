"""Read parquet files row by row, without trusting what they unpack to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from geo_r1.errors import UserError, one_line

BATCH = 64  # rows in memory at a time; they may hold images
# Bytes that a file may unpack to where it is packed DENSE-fold or more: 7 KB can hold 64 times one text of
# 128 MiB. Texts pack 3 to 10-fold, images hardly at all, and such files have no limit.
MAX_UNPACKED = 4 * 2**30
DENSE = 10
MANY = 2**20  # rows; a file with more takes at least a byte for each
NUMBER = 32  # bytes that Python takes for a number


def read_parquet(path: Path, columns: Callable[[list[str]], list[str]] = list) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, with few in memory at a time.

    Args:
        columns: given all column names, returns the ones to read.

    Raises:
        UserError: the file cannot be read, or unpacks to far more than it takes; names it.
    """
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names = columns(table.schema_arrow.names)
            dense = _dense(path, table.metadata, names)
        unpacked = 0
        # as dictionaries, equal texts take memory once, and their lengths are known before they are copied
        with ParquetFile(path, read_dictionary=dense) as table:
            for batch in table.iter_batches(batch_size=BATCH, columns=names):
                if dense:
                    unpacked += sum(map(_unpacked, batch.columns))
                    _check(path, unpacked)
                yield from batch.to_pylist()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
        raise UserError(f"data file {path} cannot be read: {one_line(error)}") from error


def _dense(path: Path, metadata: Any, names: list[str]) -> list[str]:
    """Columns of text or bytes that may unpack to more than the limit; which ones do is only known inside.

    Raises:
        UserError: the file certainly unpacks to more than the limit, or has more rows than bytes.
    """
    if metadata.num_rows > max(MANY, path.stat().st_size):
        raise UserError(
            f"data file {path} has {metadata.num_rows:,} rows, more than bytes: they are all alike"
        )
    dense, certain = [], 0
    for number in range(metadata.num_columns if metadata.num_row_groups else 0):
        chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
        name, values = chunks[0].path_in_schema, sum(chunk.num_values for chunk in chunks)
        packed = sum(chunk.total_compressed_size for chunk in chunks)
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        if not any(name == wanted or name.startswith(f"{wanted}.") for wanted in names):
            continue
        if chunks[0].physical_type != "BYTE_ARRAY":  # each value has the same size
            size = values * max(NUMBER, metadata.schema.column(number).length or 0)
            certain += size if size > MAX_UNPACKED and values > DENSE * packed else 0
        elif unpacked > DENSE * packed and values * unpacked > MAX_UNPACKED:
            dense.append(name)
            repeats = any("DELTA_BYTE_ARRAY" in chunk.encodings for chunk in chunks)  # each text its start
            certain += max(unpacked, MAX_UNPACKED + 1 if repeats else 0)
    _check(path, certain)
    return dense


def _check(path: Path, unpacked: int) -> None:
    if unpacked > MAX_UNPACKED:
        raise UserError(
            f"data file {path} takes {path.stat().st_size:,} bytes and unpacks to more than "
            f"{MAX_UNPACKED >> 30} GiB; write what is so large into files of its own, or as .jsonl"
        )


def _unpacked(array: Any) -> int:
    """Bytes of an array with each value written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return pc.sum(lengths.cast(pa.int64()).take(array.indices)).as_py() or 0
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        parts = array.flatten() if pa.types.is_struct(kind) else [array.keys, array.items]
        return sum(map(_unpacked, parts))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _unpacked(array.flatten())
    return array.nbytes
