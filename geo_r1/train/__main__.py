"""Run a recipe: `torchrun -m geo_r1.train [recipe.toml] [--section.key value ...]`.

`--dry-run` only says what it would train and what that takes, on the ranks that are there; `--dry-run=8` on
eight. `--serve` does not train either: it becomes the vLLM server that `rollout.server_url` names, on port
8000 or, with `--serve=9000`, on another.

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

SECONDS_FOR_THE_REASON = 2.0  # the rank that knows it is ending, too
INTERRUPTED = 130
DRY_RUN = "--dry-run"
SERVE = "--serve"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the arguments name; returns the exit code."""
    is_main = os.environ.get("RANK", "0") == "0"  # every rank reads the same recipe
    try:
        arguments, num_ranks = _without(DRY_RUN, sys.argv[1:] if argv is None else argv)
        arguments, port = _without(SERVE, arguments)
        recipe = load_recipe(arguments)
        if port is not None:
            from geo_r1.train.serve import serve

            serve(recipe, port or 8000)
        if num_ranks is None:
            return _run(recipe)
        if is_main:
            from geo_r1.train.estimate.dry_run import dry_run

            print(dry_run(recipe, num_ranks or int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    except ValueError as error:
        if is_main:
            _say(error)
        return 2


def _without(flag: str, argv: Sequence[str]) -> tuple[list[str], int | None]:
    """The other arguments, and the flag's number: 0 where it has none, None where it is not there."""
    found = [argument for argument in argv if argument.split("=")[0] == flag]
    rest = [argument for argument in argv if argument not in found]
    if not found:
        return rest, None
    after = argv[[*argv].index(found[-1]) + 1 :][:1]
    if "=" not in found[-1] and after and after[0].isdecimal():
        raise ValueError(f"write {flag}={after[0]}, in one word")
    number = found[-1].partition("=")[2]
    if "=" in found[-1] and (not number.isdecimal() or int(number) < 1):
        raise ValueError(f"{flag} takes a number, such as {flag}=8, not {number}")
    return rest, int(number or 0)


def _run(recipe: Recipe) -> int:
    # torch takes seconds to import: only once the recipe is known to be right
    import torch

    from geo_r1.train.loop import Stopped
    from geo_r1.train.parallel.lifeline import OTHER
    from geo_r1.train.parallel.ranks import PeerLost, Ranks
    from geo_r1.train.run import run

    try:
        ranks = Ranks.start(recipe.run.threads)
    except (OSError, ValueError) as error:  # another rank did not come, or there is no GPU for this one
        _say(error)
        return OTHER
    tell = ranks.lifeline.fail
    try:
        run(recipe, ranks)
        ranks.stop()
        return 0
    except Stopped as stopped:
        if ranks.is_main:
            _say(stopped)
        ranks.stop()
        return 0
    except ValueError as error:
        tell(str(error))
    except PeerLost as error:
        if ranks.lifeline.reason(SECONDS_FOR_THE_REASON) is None:
            tell(str(error), OTHER)
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    except torch.OutOfMemoryError as error:
        tell(
            f"out of GPU memory: {error} Lower optim.max_tokens or rollout.max_tokens; {DRY_RUN} says what "
            "else would help"
        )
    except BaseException as error:
        # An engine's own collective raises when another rank has ended; its trace would hide why.
        lost = isinstance(error, RuntimeError) and ranks.lifeline.reason(SECONDS_FOR_THE_REASON) is not None
        if not lost:  # a defect: the others shall know of it, and the trace be seen
            if ranks.size > 1:
                tell(f"{type(error).__name__}: {error}", OTHER)
            raise
    ranks.leave()
    return ranks.lifeline.exit_code


def _say(what: object) -> None:
    print(f"geo_r1: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # all is written and said; torch's threads may abort, or hang, an interpreter that ends at its leisure
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
