"""All ranks of a run have the same recipe, data and versions, or the run ends before it begins."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import geo_r1
from geo_r1.errors import UserError
from geo_r1.train.parallel.ranks import Ranks
from geo_r1.train.recipe.load import first_difference
from geo_r1.train.recipe.run_sections import STAGES
from geo_r1.train.recipe.sections import Recipe

PIECES, PIECE = 64, 1 << 20  # of a large file; one of up to 64 MiB is read whole


def check_ranks_agree(recipe: Recipe, ranks: Ranks) -> None:
    """Compare what every rank is about to run.

    Raises:
        UserError: on every rank; names the first value that differs, and the rank.
    """
    if ranks.size == 1:
        return
    values = recipe.model_dump(mode="json")
    del values["run"]["threads"]  # machines may differ
    files = {getattr(recipe, stage).data for stage in STAGES} - {"world"}
    mine: dict[str, Any] = {
        "recipe": values,
        "contents": {name: _digest(Path(name)) for name in sorted(files)},
        "version": {name: version(name) for name in ("torch", "transformers")}
        | {"geo_r1": geo_r1.__version__, "python": platform.python_version()},
    }
    everyone = ranks.gather(mine)
    for rank, other in enumerate(everyone):
        if difference := first_difference(everyone[0], other, "", f"on rank {rank}"):
            raise UserError(
                f"the ranks differ: {difference}; start all of them with the same recipe and data"
            )


def _digest(path: Path) -> str | None:
    """A hash of a file's size and of pieces that are spread evenly over it; None if it cannot be read."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for index in range(PIECES):
                file.seek(max(index * PIECE, index * (size - PIECE) // (PIECES - 1)))
                digest.update(file.read(PIECE))
    except OSError:
        return None
    return digest.hexdigest()[:16]
