"""Kinds of errors, and how command lines report them.

A user's mistake prints one line, with exit code 2. An outage prints one line, with exit code 1: the user can
run the same command again. Anything else is a defect: a traceback, with exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

MISTAKE, OUTAGE, INTERRUPTED = 2, 1, 130
LONGEST = 1000  # characters of a line; what is wrong comes first, what would work comes last


class UserError(ValueError):
    """A mistake that the user can fix; the message says what was wrong, where, and what would work."""


class OutageError(RuntimeError):
    """A server, an engine or another rank has gone; the user can run the same command again."""


def printable(text: str) -> str:
    """Text whose control characters, escape sequences and line breaks are spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(message: object, longest: int = LONGEST) -> str:
    """A message for a terminal or a log: one line, printable; a long one keeps its beginning and its end."""
    line = " ".join(printable(str(message)).split())
    half = (longest - 5) // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def say(message: object) -> None:
    """Print a line on stderr, after the project's name."""
    print(f"geo_r1: {one_line(message)}", file=sys.stderr, flush=True)


def exit_code_of(
    command: Callable[[], None], interrupted: str = "interrupted", tell: Callable[[object], None] = say
) -> int:
    """Run a command and return its exit code; defects pass through.

    Args:
        interrupted: what to say after Ctrl-C.
        tell: prints the line.
    """
    try:
        command()
    except UserError as error:
        tell(error)
        return MISTAKE
    except OutageError as error:
        tell(error)
        return OUTAGE
    except KeyboardInterrupt:
        tell(interrupted)
        return INTERRUPTED
    return 0
