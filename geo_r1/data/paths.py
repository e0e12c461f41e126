"""Paths of the user's files: errors name them, and rows that move to another file keep them valid."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from geo_r1.errors import UserError


@contextmanager
def naming(path: Path | str, failed: str = "written") -> Iterator[None]:
    """Turn an OSError on a user's file into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {failed}: {error.strerror or error}") from error


def moved_row(row: Mapping[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """A row in our own columns, with its images' paths as seen from `folder`; see `moved`."""
    images = row.get("images")
    return (
        {**row, "images": [moved(i, root, folder) for i in images]} if isinstance(images, list) else {**row}
    )


def moved(image: Any, root: Path, folder: Path) -> Any:
    """An image's path as seen from `folder`: relative if the image is in it, absolute otherwise.

    Args:
        image: a path, {"path", "bytes"} or bytes; anything else is returned unchanged.
        root: the folder that relative paths start from now.
        folder: the folder of the file that the row moves to.

    Raises:
        UserError: the image is a web address, not a path.
    """
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, Mapping) and image.get("bytes") is None and isinstance(image.get("path"), str):
        image = image["path"]
    if not isinstance(image, str):
        return image
    if "://" in image or image.startswith("data:"):
        raise UserError(f"image {image!r:.80} is no path; save it as a file")
    parent, name = os.path.split(image)
    return os.path.join(_seen_from(folder.absolute(), root.absolute(), parent), name)


@lru_cache(65536)
def _seen_from(folder: Path, root: Path, parent: str) -> str:
    """The path of an image's parent folder as seen from `folder`; "" for `folder` itself."""
    path = root / parent
    if ".." in path.parts:  # after a link, .. is the parent of its target
        path = Path(os.path.realpath(path))
    for base in (folder, Path(os.path.realpath(folder))):
        if path.is_relative_to(base):
            return "" if path == base else path.relative_to(base).as_posix()
    return str(path)
