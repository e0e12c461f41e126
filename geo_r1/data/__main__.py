"""Turn raw imagery with coordinates into training data, and check it.

python -m geo_r1.data pairs        cross-view questions from panoramas and satellite tiles with coordinates
python -m geo_r1.data cot          chains of thought for these questions, written by a teacher
python -m geo_r1.data fact-check   sort chains of thought into kept, again and rejected
python -m geo_r1.data convert      convert between training formats
python -m geo_r1.data check        decode every image of a file and say which samples are bad

A mistake that you can fix prints one line on stderr and exits with code 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType

from geo_r1.data import check
from geo_r1.data.formats import convert
from geo_r1.data.pairing import pairs
from geo_r1.data.teaching import cot, fact_check
from geo_r1.errors import exit_code_of

COMMANDS = {"pairs": pairs, "cot": cot, "fact-check": fact_check, "convert": convert, "check": check}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named in the arguments and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m geo_r1.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.configure(commands.add_parser(name, help=summary, description=module.__doc__))
    options = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that workers and partial files are cleaned up
    try:
        return exit_code_of(partial(COMMANDS[options.command].command, options))
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Act like Ctrl-C; a running event loop has its own handler for that."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


if __name__ == "__main__":
    sys.exit(main())
