"""From raw imagery with coordinates to training data.

python -m geo_r1.data pairs        cross-view questions from panoramas and satellite tiles with coordinates
python -m geo_r1.data cot          chains of thought for them, by a teacher
python -m geo_r1.data fact-check   which of these hold
python -m geo_r1.data convert      between training formats

A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from geo_r1.data.formats import convert
from geo_r1.data.pairing import pairs
from geo_r1.data.teaching import cot, fact_check

COMMANDS = {"pairs": pairs, "cot": cot, "fact-check": fact_check, "convert": convert}
INTERRUPTED = 130


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
        COMMANDS[options.command].command(options)
    except ValueError as error:
        print(f"geo_r1: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"geo_r1: {error.filename or 'a file'} cannot be written or read: {error.strerror}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("geo_r1: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
