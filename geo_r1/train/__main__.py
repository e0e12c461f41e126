"""Run a recipe: `torchrun -m geo_r1.train [recipe.toml] [--section.key value ...]`.

A mistake of the user's (recipe, data, rewards) is one line on stderr and exit code 2. A run that is asked to
stop writes a checkpoint and exits with 0; the same command goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from geo_r1.train.config import Recipe
from geo_r1.train.recipe import load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the arguments name; returns the exit code."""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        return _run(recipe)
    except ValueError as error:
        print(f"geo_r1: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(recipe: Recipe) -> int:
    from geo_r1.train.distributed import (
        Ranks,
    )  # torch, seconds to import: only once the recipe is known to be right
    from geo_r1.train.loop import Stopped
    from geo_r1.train.run import run

    ranks = Ranks.start(recipe.run.threads)
    try:
        run(recipe, ranks)
    except Stopped as stopped:
        if ranks.is_main:
            print(f"geo_r1: {stopped}", file=sys.stderr)
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
