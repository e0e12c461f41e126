"""What a checkpoint's files must be, to the bit; and reading their metadata without running code.

manifest.json  {file: [bytes, sha256]} of every other file of the checkpoint

Each rank hashes the shards that it wrote, and later checks its share of all files.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from geo_r1.files import sync

MANIFEST = "manifest.json"
METADATA = ".metadata"
# All that torch.distributed.checkpoint's metadata consists of. None of these runs anything.
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # looks a layout up by name
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its home in Python 3.13
}  # fmt: skip


class Damage(Exception):  # noqa: N818  # what is wrong with a checkpoint, for its error
    """A checkpoint's file is missing, or is not what was written."""


def write_sums(folder: Path, files: Sequence[Path], rank: int) -> None:
    """Hash the files that a rank wrote, for `write_manifest`."""
    _written(folder / f"sums-{rank}.json", {file.name: _sum(file) for file in files})


def write_manifest(folder: Path) -> None:
    """Collect all ranks' hashes, add those of the other files, and write them as the manifest."""
    sums: dict[str, Any] = {}
    for part in sorted(folder.glob("sums-*.json")):
        sums |= json.loads(part.read_text())
        part.unlink()
    sums |= {file.name: _sum(file) for file in folder.iterdir() if file.name not in sums}
    _written(folder / MANIFEST, sums)


def check_files(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Compare every `size`-th file of a checkpoint with its manifest, from the `rank`-th on.

    Raises:
        Damage: a file is missing or another; names it.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        wanted = [(str(name), int(length), str(digest)) for name, (length, digest) in sorted(sums.items())]
    except FileNotFoundError:
        raise Damage(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Damage(f"{MANIFEST}: {type(error).__name__}") from error
    for name, length, digest in wanted[rank::size]:
        file = folder / name
        try:
            found = file.stat().st_size
            if found != length:
                raise Damage(f"{name} has {found} bytes, {length} were written")
            if _sum(file)[1] != digest:
                raise Damage(f"{name} has changed since it was written")
        except OSError as error:
            raise Damage(f"{name}: {error.strerror}") from error


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint; its metadata may name only the classes that metadata consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA} holds a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no checkpoint needs")


def _sum(file: Path) -> tuple[int, str]:
    stream: BinaryIO
    with file.open("rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def _written(file: Path, sums: dict[str, Any]) -> None:
    file.write_text(json.dumps(sums))
    sync(file)
