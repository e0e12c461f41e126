"""Benchmarks of geospatial reasoning: a model here, vLLM, an endpoint or a file of answers is scored.

python -m geo_r1.eval cross-view --data test.jsonl --model runs/mine/models/grpo --out evals/mine
python -m geo_r1.eval geolocation --data im2gps3k.csv --images photos --url http://localhost:8000/v1 \\
    --model NAME --out evals/endpoint

After a stop or a kill the same command goes on. A user's mistake is one line on stderr and exit code 2, an
outage one line and exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from geo_r1.errors import exit_code_of
from geo_r1.eval import cross_view, geochain, geolocation, imageo, mcq
from geo_r1.eval.predictors import configure
from geo_r1.eval.run import evaluate

BENCHMARKS = [module.BENCHMARK for module in (cross_view, geolocation, imageo, geochain, mcq)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m geo_r1.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS:
        command = commands.add_parser(benchmark.name, help=benchmark.help, description=benchmark.help)
        command.set_defaults(run=benchmark)
        command.add_argument(
            "--out", type=Path, required=True, help="folder of the results; a run goes on there"
        )
        command.add_argument("--limit", type=int, help="only the first questions")
        command.add_argument("--name", help="of the row in the table")
        benchmark.configure(command)
        configure(command)
    options = parser.parse_args(argv)
    return exit_code_of(
        lambda: evaluate(options.run, options, Console(stderr=True)), "interrupted; the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main())
