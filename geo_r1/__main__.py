"""geo-r1 COMMAND ...; python -m geo_r1 COMMAND ... is the same.

geo-r1 train    run a recipe: python -m geo_r1.train
geo-r1 ablate   compare recipes that differ in one thing: python -m geo_r1.train.ablate
geo-r1 data     make training data from raw imagery: python -m geo_r1.data
geo-r1 eval     run a benchmark: python -m geo_r1.eval
geo-r1 ops      print which kernels run here: python -m geo_r1.kernels

geo-r1 COMMAND --help lists a command's options, geo-r1 --version prints the version. On several GPUs:
torchrun [its options] -m geo_r1.train ...

Exit codes: 0 done, or stopped with a checkpoint; 2 a mistake that the user can mend; 1 an outage or a defect;
130 interrupted.
"""

from __future__ import annotations

import difflib
import runpy
import sys

import geo_r1
from geo_r1 import errors

COMMANDS = {
    "train": "geo_r1.train",
    "ablate": "geo_r1.train.ablate",
    "data": "geo_r1.data",
    "eval": "geo_r1.eval",
    "ops": "geo_r1.kernels",
}


def main() -> int:
    """Run the command that sys.argv names; returns the exit code."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help", ""):
        print((__doc__ or "").strip())
        return 0 if name else errors.MISTAKE
    if name == "--version":
        print(f"geo-r1 {geo_r1.__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        errors.say(f"unknown command {name}: {hint}")
        return errors.MISTAKE
    sys.argv[1:] = rest
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)  # it imports torch, and may exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
