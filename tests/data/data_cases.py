"""Helpers for the tests of data: rows in files, encoded images, and mistakes that are one line."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

KEY = "sk-secret-0123456789abcdef"  # of endpoints


def write(path, rows):
    """Write rows as JSONL, or as .json or .parquet by the path's suffix; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ends_with(message, call):
    """The call raises one line that says exactly this."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message and "\n" not in message
