"""From raw imagery with coordinates to training data.

python -m geo_r1.data pairs        cross-view questions from panoramas and satellite tiles with coordinates
python -m geo_r1.data cot          chains of thought for them, by a teacher
python -m geo_r1.data fact-check   sort them by what holds
python -m geo_r1.data convert      between training formats

A mistake that you can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType

from geo_r1.data.formats import convert
from geo_r1.data.pairing import pairs
from geo_r1.data.teaching import cot, fact_check
from geo_r1.errors import exit_code_of

COMMANDS = {"pairs": pairs, "cot": cot, "fact-check": fact_check, "convert": convert}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code."""
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
    before = signal.signal(signal.SIGTERM, _interrupt)  # its processes and partial files end with it
    try:
        return exit_code_of(partial(COMMANDS[options.command].command, options))
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Do as Ctrl-C does, which an event loop handles itself while it runs."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


if __name__ == "__main__":
    sys.exit(main())
