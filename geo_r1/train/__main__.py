"""Run a recipe: `torchrun -m geo_r1.train [recipe.toml] [--section.key value ...]`.

A mistake of the user's (recipe, data, rewards) is one line on stderr and exit code 2. A stage that is asked
to stop writes a checkpoint and exits with 0; the same command goes on from there. torchrun turns any other
exit code than 0 into 1, with a report of its own; one process needs none: `python -m geo_r1.train`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from geo_r1.train.config import Recipe
from geo_r1.train.recipe import load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the arguments name; returns the exit code."""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank reads the same recipe
            _say(error)
        return 2
    return _run(recipe)


def _run(recipe: Recipe) -> int:
    # torch takes seconds to import: only once the recipe is known to be right
    from geo_r1.train.distributed import PeerLost, Ranks
    from geo_r1.train.loop import Stopped
    from geo_r1.train.run import run

    ranks = Ranks.start(recipe.run.threads)
    try:
        run(recipe, ranks)
    except Stopped as stopped:
        if ranks.is_main:
            _say(stopped)
    except (ValueError, PeerLost) as error:
        _say(error)  # and leave at once: saying goodbye to ranks that wait elsewhere could hang
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the last checkpoint")
        return 130
    ranks.stop()
    return 0


def _say(what: object) -> None:
    print(f"geo_r1: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
