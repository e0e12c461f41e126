"""The stages of `make gpu` and its sets, each for a call of 300 seconds on an H200 with 16 cores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

MAX_PROCESSES = 12  # for a stage's tests: they wait for Triton's compiler, one core each, not for the GPU


@dataclass(frozen=True)
class Stage:
    """One process, or several that share its tests.

    Attributes:
        name: in the record.
        arguments: after the interpreter; $record is the file it writes, $device cuda or cpu, $share the
            process's number and the number of processes.
        seconds: an estimate; not measured on a GPU yet.
        needs: packages without which it is skipped. If it lacks anything else, it writes a line
            {"skipped": reason} itself.
        processes: how many share it, at most one per core.
        sources: files and folders that decide its results, beside those that its arguments name.
        rehearsal: further arguments in a rehearsal, which make it small.
        always: it says what this machine is or has, so each call runs it.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    processes: int = 1
    sources: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    always: bool = False


def module(name: str, file: str, seconds: float, *needs: str, **options: Any) -> Stage:
    arguments = ("-m", f"benchmarks.{file}", "$record", "--device", "$device")
    return Stage(name, arguments, seconds, needs, **options)


def pytest_stage(
    name: str, seconds: float, *arguments: str, needs: tuple[str, ...] = (), **options: Any
) -> Stage:
    # Warnings are errors only with the pinned versions; this machine has its own.
    # --record=FILE in one word: else pytest takes FILE for a test path and looks for its root there.
    plugin = ("-m", "pytest", "-p", "benchmarks.recorder", "--record=$record", "--share=$share")
    # If a file cannot be imported, the others still run.
    quiet = ("-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
    return Stage(name, (*plugin, *quiet, *arguments), seconds, ("pytest", *needs), **options)


# Peers that take tens of seconds to start or for each run; no target depends on them.
SLOW = "compiled or looped or Cross-Entropy"
SCALING = "test_scaling"
# Peers' wheels, which can be unpacked beside the checkout: their modules, names and sizes.
WHEELS = {
    "liger_kernel": ("liger-kernel", "0.9 MB"),
    "cut_cross_entropy": ("cut-cross-entropy", "23 KB"),
    "cudnn": ("nvidia-cudnn-frontend", "11.6 MB"),
}


def benchmark(
    name: str,
    seconds: float,
    *files: str,
    chosen: str = f"not ({SLOW})",
    needs: tuple[str, ...] = (),
    **options: Any,
) -> Stage:
    paths = (f"benchmarks/bench_{file}.py" for file in files)
    stage = pytest_stage(
        name,
        seconds,
        *paths,
        "--benchmark-columns=median,rounds",
        "-k",
        chosen,
        needs=("pytest_benchmark", *needs),
        **options,
    )
    return replace(stage, sources=(*stage.sources, "benchmarks/measure.py"))


KERNELS = ("geo_r1/kernels", "csrc")
ROWS = ("geo_r1/kernels/loss", "geo_r1/kernels/launch.py", "csrc")
ATTENTION = ("geo_r1/kernels/attention", "geo_r1/kernels/layout", "geo_r1/kernels/launch.py", "csrc")
ENGINE = (*KERNELS, "geo_r1/models", "geo_r1/rollout")
MODEL = ("transformers", "tokenizers", "PIL")
TRAINER = (*MODEL, "pydantic_settings", "pyarrow", "rich", "jinja2", "matplotlib", "tensorboard")
SMALL_RUN = {
    "run.dir": "$record.run",
    "pretrain.steps": 10,
    "sft.steps": 10,
    "grpo.steps": 5,
    "rollout.max_new_tokens": 64,
    "eval.num_samples": 20,
    "eval.max_new_tokens": 64,
}
TINIER_RUN = {"pretrain.steps": 2, "sft.steps": 2, "grpo.steps": 1, "eval.num_samples": 4}


def command_line(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text for name, value in values.items() for text in (f"--{name}", str(value)))


STAGES = {
    # the first to import torch, from a cold disk
    "device": module("device", "device", 25, "torch", "triton", always=True),
    "build": module("extension", "extension", 45, "pybind11", always=True),
    "ops": pytest_stage(
        "every op against float64", 30, "benchmarks/check_ops.py", sources=KERNELS, processes=MAX_PROCESSES
    ),
    # its longest test builds all kernels on every core, beside the others
    "suspects": pytest_stage("suspects", 35, "benchmarks/check_suspects.py", sources=KERNELS, processes=3),
    "products": benchmark("bare products", 15, "products", chosen=""),
    "rows": benchmark(
        "bench_grpo_loss, bench_group_advantage",
        30,
        "grpo_loss",
        "group_advantage",
        sources=(*ROWS, "geo_r1/kernels/advantage"),
    ),
    "linear": benchmark(
        "bench_linear",
        30,
        "linear",
        chosen=f"not ({SLOW} or cross_entropy)",
        sources=ROWS,
        rehearsal=("--every", "2"),
    ),
    "attention": benchmark("bench_attention", 45, "attention", sources=ATTENTION, rehearsal=("--every", "3")),
    "sweep": module("sweep of launch rows", "sweep", 40, "torch", "triton", sources=KERNELS),
    "step": benchmark(
        "bench_train_step",
        *(80, "train_step"),
        needs=MODEL,
        chosen=f"not ({SLOW} or {SCALING})",
        sources=(*ENGINE, "benchmarks/steps.py", "benchmarks/shapes.py"),
        rehearsal=("-k", "test_step and tiny"),
    ),
    # test_aot.py needs no GPU, and `make aot` builds every kernel.
    "tests": pytest_stage(
        "tests of the kernels",
        70,
        *("tests/kernels", "--ignore=tests/kernels/test_aot.py"),
        sources=KERNELS,
        processes=MAX_PROCESSES,
        rehearsal=("--every", "40"),
    ),
    "sanitizer": module("compute-sanitizer", "sanitizer", 30, sources=KERNELS),
    "peers": benchmark(
        "slow peers",
        *(35, "attention", "linear", "train_step", "grpo_loss", "group_advantage"),
        chosen=f"{SLOW} or cross_entropy",
        sources=ENGINE,
        rehearsal=("-k", "cross_entropy"),
    ),
    "models": pytest_stage(
        "tests of the models",
        15,
        *("tests/models", "tests/rollout/test_cuda_graphs.py"),
        needs=(*MODEL, "pyarrow", "jinja2"),
        processes=4,
        sources=ENGINE,
        rehearsal=("--every", "40"),
    ),
    "scaling": benchmark(
        "scaling of the step",
        15,
        "train_step",
        needs=MODEL,
        chosen=SCALING,
        sources=ENGINE,
        rehearsal=("--every", "14"),
    ),
    "run": Stage(
        "world run",
        ("-m", "geo_r1.train", "recipes/world.toml", *command_line(SMALL_RUN)),
        15,
        TRAINER,
        sources=("geo_r1",),
        rehearsal=command_line(TINIER_RUN),
    ),
    "sampling": benchmark(
        "bench_sampling", 10, "sampling", needs=MODEL, sources=ENGINE, rehearsal=("--every", "4")
    ),
}
SETS = {
    "one": ("device", "build", "ops", "suspects", "products", "rows", "linear", "attention", "sweep"),
    "two": ("device", "build", "step", "tests", "sanitizer", "peers"),
    "three": ("device", "build", "models", "scaling", "run", "sampling"),  # no target depends on these
}
