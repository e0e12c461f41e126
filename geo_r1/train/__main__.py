"""Run a recipe: a TOML file or a recipe of the package (`world` if none is named), and single keys on top.

--dry-run only says what it would train and what that takes, on the ranks that are there; --dry-run=8 on
eight. --serve does not train either: it becomes the vLLM server that rollout.server_url names, for this
machine alone, on port 8000 or, with --serve=9000, on another. Whoever reaches that port can run code there:
--serve=HOST:9000 takes the address of a private network.

On several GPUs or machines: torchrun [its options] -m geo_r1.train, and the same arguments.

A mistake of the user's (recipe, data, rewards) is one line on stderr and exit code 2. A stage that is asked
to stop writes a checkpoint and exits with 0; the same command goes on from there. torchrun turns any other
exit code than 0 into 1, with a report of its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from geo_r1.train.recipe.load import DRY_RUN, SERVE, load_recipe
from geo_r1.train.recipe.sections import Recipe

SECONDS_FOR_THE_REASON = 2.0  # the rank that knows it is ending, too
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the arguments name; returns the exit code."""
    is_main = os.environ.get("RANK", "0") == "0"  # every rank reads the same recipe
    try:
        arguments, ranks = _without(DRY_RUN, sys.argv[1:] if argv is None else argv)
        arguments, address = _without(SERVE, arguments)
        if ranks is not None and address is not None:
            raise ValueError(f"{DRY_RUN} and {SERVE} do not go together: leave one out")
        num_ranks = None if ranks is None else _number(ranks or os.environ.get("WORLD_SIZE", "1"))
        recipe = load_recipe(arguments, __doc__)
        if address is not None:
            from geo_r1.train.serve import become_server

            become_server(recipe, address)
        if num_ranks is None:
            return _run(recipe)
        if is_main:
            from geo_r1.train.estimate.dry_run import what_it_takes

            print(what_it_takes(recipe, num_ranks))
        return 0
    except ValueError as error:
        if is_main:
            _say(error)
        return 2


def _without(flag: str, argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the flag's value: empty where it has none, None where it is not there."""
    found = [argument for argument in argv if argument.split("=")[0] == flag]
    rest = [argument for argument in argv if argument not in found]
    if not found:
        return rest, None
    after = argv[[*argv].index(found[-1]) + 1 :][:1]
    _, equals, value = found[-1].partition("=")
    if not equals and after and re.fullmatch(r"([^-/][^/]*:)?\d+", after[0]):
        raise ValueError(f"write {flag}={after[0]}, in one word")
    if equals and not value:
        raise ValueError(f"{flag}= has no value: write one, or {flag} alone")
    return rest, value


def _number(ranks: str) -> int:
    if not ranks.isdecimal() or int(ranks) < 1:
        raise ValueError(f"{DRY_RUN} takes a number of ranks, such as {DRY_RUN}=8, not {ranks}")
    return int(ranks)


def _run(recipe: Recipe) -> int:
    # torch takes seconds to import: only once the recipe is known to be right
    import torch

    from geo_r1.errors import OutageError
    from geo_r1.train.parallel.lifeline import OTHER
    from geo_r1.train.parallel.ranks import PeerLost, Ranks
    from geo_r1.train.run import run_recipe
    from geo_r1.train.stages.loop import Stopped

    try:
        ranks = Ranks.start(recipe.run.threads)
    except (OSError, ValueError) as error:  # another rank did not come, or there is no GPU for this one
        _say(error)
        return OTHER
    tell = ranks.lifeline.fail
    try:
        run_recipe(recipe, ranks)
        ranks.stop()
        return 0
    except Stopped as stopped:
        if ranks.is_main:
            _say(stopped)
        ranks.stop()
        return 0
    except OutageError as error:
        tell(str(error), OTHER)
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
