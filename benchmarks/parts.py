"""What `make gpu` runs, in which order, and for how long: the times are a GPU's and fit ten minutes."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROCESSES = 12  # that share a part's tests: they wait for Triton's compiler, a core each, not for the GPU


@dataclass(frozen=True)
class Part:
    """One process, or several that share its tests.

    Attributes:
        name: in the record.
        arguments: after the interpreter; {record} is the file it writes, {device} cuda or cpu, {share} the
            process's number and how many there are.
        seconds: its time. What earlier parts left over is added.
        needs: packages without which it is skipped. Whatever else it lacks it says itself, in a line
            {"skipped": reason}.
        reads: what it writes: "facts" (device.py), "extension" (extension.py), "tests" (recorder.py), or
            "run" (the trainer's metrics).
        processes: how many share it, at most one a core.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    reads: str = "tests"
    processes: int = 1


def pytest_part(
    name: str, seconds: float, *arguments: str, needs: tuple[str, ...] = (), processes: int = 1
) -> Part:
    # Warnings are errors on the versions that are pinned; here it is the machine's that run.
    # In one word, or pytest takes the record for a path whose folders say where the root is.
    plugin = ("-m", "pytest", "-p", "benchmarks.recorder", "--record={record}", "--share={share}")
    # A file that cannot be imported takes no other with it.
    options = ("-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
    return Part(name, (*plugin, *options, *arguments), seconds, ("pytest", *needs), processes=processes)


# Peers that take tens of seconds to get going or for each run; none of them decides a target.
SLOW = "compiled or looped or Cross-Entropy"
SCALING = "test_scaling"


def benchmark(
    name: str, seconds: float, *files: str, needs: tuple[str, ...] = (), chosen: str = f"not ({SLOW})"
) -> Part:
    paths = (f"benchmarks/{file}.py" for file in files or (name,))
    return pytest_part(name, seconds, *paths, "-k", chosen, needs=("pytest_benchmark", *needs))


MODEL = ("transformers", "tokenizers", "PIL")
TRAINER = (*MODEL, "pydantic_settings", "pyarrow", "rich", "jinja2", "matplotlib", "tensorboard")
SMALL_RUN = {
    "run.dir": "{record}.run",
    "pretrain.steps": 10,
    "sft.steps": 10,
    "grpo.steps": 5,
    "rollout.max_new_tokens": 64,
    "eval.num_samples": 20,
    "eval.max_new_tokens": 64,
}
PARTS = (
    Part(  # the first to import torch, from a cold disk
        "device",
        ("-m", "benchmarks.device", "{record}", "--device", "{device}"),
        40,
        ("torch", "triton"),
        reads="facts",
    ),
    Part(  # before all that takes the kernels if they are there
        "extension",
        ("-m", "benchmarks.extension", "{record}", "--device", "{device}"),
        60,
        ("pybind11",),
        reads="extension",
    ),
    # The gate's own tests need no GPU; its build of every kernel is `make aot`.
    pytest_part(
        "tests of the kernels",
        90,
        *("tests/kernels", "--ignore=tests/kernels/test_aot.py"),
        processes=MAX_PROCESSES,
    ),
    benchmark("bench_linear", 65),
    benchmark("bench_attention", 60),
    benchmark("bench_train_step", 100, needs=MODEL, chosen=f"not ({SLOW} or {SCALING})"),
    benchmark("bench_grpo_loss, bench_group_advantage", 40, "bench_grpo_loss", "bench_group_advantage"),
    Part("compute-sanitizer", ("-m", "benchmarks.sanitizer", "{record}", "--device", "{device}"), 40),
    pytest_part(
        "tests of the models",
        20,
        *("tests/models", "tests/rollout/test_cuda_graphs.py"),
        needs=(*MODEL, "pyarrow", "jinja2"),
        processes=4,
    ),
    Part(
        "world run",
        (
            *("-m", "geo_r1.train", "recipes/world.toml"),
            *(text for name, value in SMALL_RUN.items() for text in (f"--{name}", str(value))),
        ),
        20,
        TRAINER,
        reads="run",
    ),
    benchmark("scaling of the step", 20, "bench_train_step", needs=MODEL, chosen=SCALING),
    benchmark("bench_sampling", 10, needs=MODEL),  # these two have what the others have left over
    benchmark(
        "slow peers",
        10,
        *("bench_attention", "bench_linear", "bench_train_step", "bench_grpo_loss", "bench_group_advantage"),
        chosen=SLOW,
    ),
)
