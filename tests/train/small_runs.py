"""Small runs of the trainer: what every test of it starts from, and reward functions for recipes to name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from geo_r1.train.__main__ import main

HERE = Path(__file__).parent
# What no two runs share, even equal ones.
UNSTABLE = ("time/", "tokens_per_second", "memory/")
# A loss that is not near zero: a KL term, and a second update from the same completions.
SMALL = {
    "run.threads": 1,
    "sft.steps": 5,
    "sft.batch_size": 4,
    "sft.optim.lr": 1e-3,
    "grpo.steps": 5,
    "grpo.prompts_per_step": 2,
    "grpo.num_completions": 4,
    "grpo.num_iterations": 2,
    "grpo.loss.beta": 0.1,
    "grpo.optim.lr": 1e-3,
    "rollout.max_new_tokens": 16,
    "rewards.functions": ["small_runs:spread"],
    "rewards.options": {},
    "eval.num_samples": 6,
    "eval.max_new_tokens": 8,
    "eval.gallery": 2,
    "log.tensorboard": False,
}


def spread(completion_ids, **_):
    """A reward that differs within every group."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def first_of_group_unscored(completion_ids, **_):
    return [None if i % 4 == 0 else value for i, value in enumerate(spread(completion_ids))]


def first_group_constant(completion_ids, **_):
    return [1.0 if i < 4 else value for i, value in enumerate(spread(completion_ids))]


def same_for_some_answers(completion_ids, answer, **_):
    """A reward that is equal within about every second group."""
    return [
        1.0 if letter in "AB" else value for letter, value in zip(answer, spread(completion_ids), strict=True)
    ]


def never_scores(completion_ids, **_):
    return [None] * len(completion_ids)


def raises(completion_ids, **_):
    raise KeyError("heading")


def one_too_few(completion_ids, **_):
    return [0.0] * (len(completion_ids) - 1)


def needs_completions(completion_ids, **_):
    assert completion_ids, "called without completions"
    return spread(completion_ids)


def arguments(run_dir: Path, *stages: str, **changes) -> list[str]:
    """Command-line arguments of a small run; `changes` has option names with "__" for the dot."""
    options = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    for stage in ("sft", "grpo"):  # as `changes` gives epochs, it replaces the steps
        if f"{stage}.epochs" in options:
            del options[f"{stage}.steps"]
    options |= {"run.dir": run_dir, "run.stages": list(stages)}
    texts = {k: json.dumps(v) if isinstance(v, list | dict | bool) else str(v) for k, v in options.items()}
    return [str(empty_recipe(run_dir.parent)), *(f"--{name}={text}" for name, text in texts.items())]


def empty_recipe(folder: Path) -> Path:
    path = folder / "small.toml"
    path.write_text("")
    return path


def train(run_dir: Path, *stages: str, **changes) -> Path:
    """Run in this process; it has to succeed."""
    assert main(arguments(run_dir, *stages, **changes)) == 0
    return run_dir


def launch(argv: list[str], *, ranks: int = 1, environment: dict[str, str] | None = None):
    """Run `python -m geo_r1.train`, or torchrun with several ranks, in processes of its own."""
    command = [sys.executable, "-m", "geo_r1.train"]
    if ranks > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, "-m", *torchrun, "-m", "geo_r1.train"]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | (environment or {})
    return subprocess.run([*command, *argv], capture_output=True, text=True, env=variables, timeout=90)


def metrics(run_dir: Path, stage: str) -> list[dict]:
    """The stage's lines of metrics.jsonl without what no two runs share."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(UNSTABLE)}
        for row in rows
        if row["stage"] == stage
    ]


def weights(run_dir: Path, stage: str) -> bytes:
    return (run_dir / "models" / stage / "model.safetensors").read_bytes()


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_dataset(folder: Path, count: int, **changes) -> Path:
    """A JSONL file of questions over two images on disk; `changes` replace columns of the second row."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        for view, size in (("ground", (56, 28)), ("above", (56, 56))):
            image = Image.new("RGB", size, (20 * number, 90, 160 if view == "above" else 60))
            image.save(folder / "images" / f"{view}{number}.png")
        row = {
            "id": f"row{number}",
            "prompt": "Ground: <image> Above: <image> Same place, A or B?",
            "images": [f"images/ground{number}.png", f"images/above{number}.png"],
            "response": f"<think>{number}</think><answer>{'AB'[number % 2]}</answer>",
            "answer": "AB"[number % 2],
            "num_choices": 2,
        }
        rows.append(row | (changes if number == 1 else {}))
    return write_rows(folder / "data.jsonl", [{k: v for k, v in r.items() if v is not None} for r in rows])
