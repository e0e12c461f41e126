"""A disk that is full, fails or refuses, wherever a run writes: one line, and the rerun loses nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import small_runs as runs
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from geo_r1.train.__main__ import main
from geo_r1.train.state.shards import Writer

STAGES = ("sft", "grpo", "eval")
CHANGES = {
    "sft__save_every": 2,
    "grpo__save_every": 2,
    "sft__steps": 4,
    "grpo__steps": 4,
    "log__rollouts_every": 2,
}
# A function that a run writes with, and at which of its calls it fails.
FAULTS = [
    *((os, "fsync", number) for number in (1, 4, 9, 14)),
    *((os, "replace", number) for number in (1, 2, 4, 6, 8)),
    *((Path, "rename", number) for number in (1, 2, 4, 5, 9)),
    *((Path, "write_text", number) for number in (1, 3, 7)),
    (Path, "mkdir", 2),
    (shutil, "rmtree", 1),
    *((Writer, "write_data", number) for number in (1, 3)),
    (PreTrainedModel, "save_pretrained", 1),
    (PreTrainedTokenizerBase, "save_pretrained", 2),
    (Image.Image, "save", 1),
]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)  # in turn


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """The same run on a disk without faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geo_r1.train.run.write_report", lambda run_dir: run_dir / "report.html")
        return runs.train(tmp_path_factory.mktemp("whole") / "run", *STAGES, **CHANGES)


def failing(real, number, code, run_dir):
    """The n-th call on a path of the run fails; a call without a path counts too."""
    calls = []

    def call(*args, **options):
        paths = [arg for arg in args if isinstance(arg, str | Path)]
        if not paths or any(str(path).startswith(str(run_dir)) for path in paths):
            calls.append(args)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
        return real(*args, **options)

    return call, calls


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=lambda i: f"{FAULTS[i][1]}-{FAULTS[i][2]}")
def test_a_fault_of_the_disk_is_one_line_and_costs_nothing(index, whole, tmp_path, monkeypatch, capfd):
    owner, name, number = FAULTS[index]
    error, run_dir = ERRORS[index % len(ERRORS)], tmp_path / "run"
    argv = runs.arguments(run_dir, *STAGES, **CHANGES)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        call, calls = failing(getattr(owner, name), number, error, run_dir)
        patch.setattr(owner, name, call)
        code = main(argv)
    assert len(calls) >= number, f"only {len(calls)} calls"
    out, err = capfd.readouterr()
    if code:  # else it was something that a run can do without
        [line] = err.splitlines()
        assert code == 2 and line.startswith("geo_r1: ") and os.strerror(error) in line
        assert str(run_dir) in line
    else:
        assert "the run goes on" in out + err, "nothing was said"
    assert main(argv) == 0
    for stage in ("sft", "grpo"):
        assert runs.weights(run_dir, stage) == runs.weights(whole, stage)
    assert (run_dir / "summary.json").read_text() == (whole / "summary.json").read_text()
