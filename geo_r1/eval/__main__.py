"""Benchmarks of geospatial reasoning: who answers is a model here, vLLM, an endpoint, or a file of answers.

python -m geo_r1.eval cross-view --data test.jsonl --model runs/mine/models/grpo --out evals/mine
python -m geo_r1.eval geolocation --data im2gps3k.csv --images photos --url http://localhost:8000/v1 \\
    --model NAME --out evals/endpoint

Stopped or killed, the same command goes on. A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from geo_r1.eval import cross_view, geochain, geolocation, imageo, mcq
from geo_r1.eval.predictors import configure
from geo_r1.eval.run import evaluate

BENCHMARKS = [module.BENCHMARK for module in (cross_view, geolocation, imageo, geochain, mcq)]
INTERRUPTED = 130


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
    try:
        evaluate(options.run, options, Console(stderr=True))
    except ValueError as error:
        print(f"geo_r1: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("geo_r1: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
