"""The stages of `make gpu`, in order, with their times, which are for a GPU and fit ten minutes."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROCESSES = 12  # for a stage's tests: they wait for Triton's compiler, one core each, not for the GPU


@dataclass(frozen=True)
class Stage:
    """One process, or several that share its tests.

    Attributes:
        name: in the record.
        arguments: after the interpreter; $record is the file it writes, $device cuda or cpu, $share the
            process's number and the number of processes.
        seconds: its time; time left over from earlier stages is added.
        needs: packages without which it is skipped. If it lacks anything else, it writes a line
            {"skipped": reason} itself.
        processes: how many share it, at most one per core.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    processes: int = 1


def module(name: str, file: str, seconds: float, *needs: str) -> Stage:
    return Stage(name, ("-m", f"benchmarks.{file}", "$record", "--device", "$device"), seconds, needs)


def pytest_stage(
    name: str, seconds: float, *arguments: str, needs: tuple[str, ...] = (), processes: int = 1
) -> Stage:
    # Warnings are errors only with the pinned versions; this machine has its own.
    # --record=FILE in one word: else pytest takes FILE for a test path and looks for its root there.
    plugin = ("-m", "pytest", "-p", "benchmarks.recorder", "--record=$record", "--share=$share")
    # If a file cannot be imported, the others still run.
    options = ("-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
    return Stage(name, (*plugin, *options, *arguments), seconds, ("pytest", *needs), processes)


# Peers that take tens of seconds to start or for each run; no target depends on them.
SLOW = "compiled or looped or Cross-Entropy"
SCALING = "test_scaling"


def benchmark(
    name: str, seconds: float, *files: str, needs: tuple[str, ...] = (), chosen: str = f"not ({SLOW})"
) -> Stage:
    paths = (f"benchmarks/bench_{file}.py" for file in files)
    return pytest_stage(name, seconds, *paths, "-k", chosen, needs=("pytest_benchmark", *needs))


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
RUN = (
    *("-m", "geo_r1.train", "recipes/world.toml"),
    *(text for name, value in SMALL_RUN.items() for text in (f"--{name}", str(value))),
)
ROWS = ("grpo_loss", "group_advantage")
STAGES = {
    "device": module(
        "device", "device", 40, "torch", "triton"
    ),  # the first to import torch, from a cold disk
    "build": module("extension", "extension", 60, "pybind11"),
    # test_aot.py needs no GPU, and `make aot` builds every kernel.
    "tests": pytest_stage(
        "tests of the kernels",
        90,
        *("tests/kernels", "--ignore=tests/kernels/test_aot.py"),
        processes=MAX_PROCESSES,
    ),
    "linear": benchmark("bench_linear", 65, "linear"),
    "attention": benchmark("bench_attention", 60, "attention"),
    "step": benchmark(
        "bench_train_step", 100, "train_step", needs=MODEL, chosen=f"not ({SLOW} or {SCALING})"
    ),
    "rows": benchmark("bench_grpo_loss, bench_group_advantage", 40, *ROWS),
    "sanitizer": module("compute-sanitizer", "sanitizer", 40),
    "models": pytest_stage(
        "tests of the models",
        20,
        *("tests/models", "tests/rollout/test_cuda_graphs.py"),
        needs=(*MODEL, "pyarrow", "jinja2"),
        processes=4,
    ),
    "run": Stage("world run", RUN, 20, TRAINER),
    "scaling": benchmark("scaling of the step", 20, "train_step", needs=MODEL, chosen=SCALING),
    "sampling": benchmark("bench_sampling", 10, "sampling", needs=MODEL),  # with time that is left over
    "slow": benchmark("slow peers", 10, "attention", "linear", "train_step", *ROWS, chosen=SLOW),
}
