"""Run a recipe: a TOML file or the name of one in the package (default: `world`). Options set single keys.

--dry-run prints what a recipe would train, what that takes and what is missing, for the ranks that are there;
--dry-run=8, for eight. It ends with READY, or with NOT READY and exit code 2. --serve starts the vLLM server
that rollout.server_url names instead of training. It listens to this machine alone, on port 8000, or on
another with --serve=9000. Whoever reaches that port can run code there; --serve=HOST:9000 listens on the
address of a private network.

On several GPUs or machines: torchrun [its options] -m geo_r1.train, with the same arguments.

A mistake of yours (recipe, data, rewards) is one line on stderr and exit code 2; a lost rank or server is one
line and exit code 1. A stage that is asked to stop writes a checkpoint and exits with 0; the same command
continues from there. torchrun turns every other exit code than 0 into 1 and adds a report of its own.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from geo_r1.errors import UserError, exit_code_of, say
from geo_r1.train.recipe.load import DRY_RUN, SERVE, load_recipe
from geo_r1.train.recipe.sections import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe that the arguments name; returns the exit code."""
    command = partial(_main, sys.argv[1:] if argv is None else argv)
    return exit_code_of(command, "interrupted; the same command goes on from the last checkpoint", _tell)


def rank_main(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` of one rank of several; torchrun's report shows the traceback of a defect.

    Ends the process at once: torch's threads may abort, or hang, an interpreter that takes its time to end.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        code = record(main)(argv) or 0
    except BaseException as error:
        code = 1
        traceback.print_exc()
        _tell(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(message: object) -> None:
    """Say why this process ends; of several ranks, the first to fail does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        say(message)
    else:
        from geo_r1.train.parallel.heartbeat import say_once

        say_once(f"rank {os.environ.get('RANK', 0)}: {message}")


def _main(argv: Sequence[str]) -> None:
    arguments, ranks = _without(DRY_RUN, argv)
    arguments, address = _without(SERVE, arguments)
    if ranks is not None and address is not None:
        raise UserError(f"{DRY_RUN} and {SERVE} do not go together: leave one out")
    num_ranks = None if ranks is None else _number(ranks or os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(arguments, __doc__)
    if address is not None:
        from geo_r1.train.serve import become_server

        become_server(recipe, address)
    elif num_ranks is None:
        _train(recipe)
    elif os.environ.get("RANK", "0") == "0":
        from geo_r1.train.estimate.dry_run import what_it_takes

        text, missing = what_it_takes(recipe, num_ranks)
        print(text)
        if missing:
            more = f"; {len(missing) - 1} more above" if missing[1:] else ""
            raise UserError(f"not ready: {missing[0]}{more}")


# Threads that spin while they wait take a second process's core; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a disk says, whichever file it is about.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


def _train(recipe: Recipe) -> None:
    # torch takes seconds to import: only once the recipe is known to be right
    import torch

    from geo_r1.train.parallel.ranks import Ranks, rank_losses
    from geo_r1.train.run import run_recipe
    from geo_r1.train.stages.loop import Stopped

    with rank_losses():
        ranks, well = Ranks.start(recipe.run.threads, recipe.run.hang_timeout), False
        try:
            run_recipe(recipe, ranks)
            well = True
        except Stopped as stopped:
            well = True
            if ranks.is_main:
                say(stopped)
        except OSError as error:
            file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
            if error.errno in STORAGE or (file and file.absolute().is_relative_to(recipe.run.dir.absolute())):
                reason = f"{file or recipe.run.dir} cannot be read or written: {error.strerror}"
                raise UserError("; ".join([reason, *getattr(error, "__notes__", [])])) from error
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory: {error} Lower optim.max_tokens or rollout.max_tokens; {DRY_RUN} says "
                "what else would help"
            ) from error
        finally:
            ranks.stop(well)


def _without(flag: str, argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the flag's value: empty where it has none, None where it is not there."""
    found = [argument for argument in argv if argument.split("=")[0] == flag]
    rest = [argument for argument in argv if argument not in found]
    if not found:
        return rest, None
    after = argv[[*argv].index(found[-1]) + 1 :][:1]
    _, equals, value = found[-1].partition("=")
    if not equals and after and re.fullmatch(r"([^-/][^/]*:)?\d+", after[0]):
        raise UserError(f"write {flag}={after[0]}, in one word")
    if equals and not value:
        raise UserError(f"{flag}= has no value: write one, or {flag} alone")
    return rest, value


def _number(ranks: str) -> int:
    if not ranks.isdecimal() or int(ranks) < 1:
        raise UserError(f"{DRY_RUN} takes a number of ranks, such as {DRY_RUN}=8, not {ranks}")
    return int(ranks)


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") != "1":
        rank_main()
    sys.exit(main())
