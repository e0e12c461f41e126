"""Whether two runs are the same, but for the order in which numbers were added up."""

import pytest
import small_runs as runs
from safetensors.torch import load_file

# Sums over ranks are added up in another order than sums over one batch.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
# Adam divides by the gradient's size: at larger rates rounding in a small gradient moves weights further.
RATE = {"sft__optim__lr": 1e-4, "grpo__optim__lr": 1e-4}
# How many micro-batches a rank packs is its own business, and packing decides what is computed how often.
OWN = ("num_micro_batches", "plan/")


def same_metrics(found_dir, expected_dir, stage, num_steps):
    expected, found = runs.metrics(expected_dir, stage), runs.metrics(found_dir, stage)
    assert [row["step"] for row in expected] == [row["step"] for row in found] == [*range(1, num_steps + 1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert {*ours} == {*theirs}
        for name in {*theirs} - {"stage"}:
            if not name.startswith(OWN):
                where = (stage, theirs["step"], name)
                assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=ABSOLUTE), where


def distances(found, expected):
    """||a - b|| / ||a|| of each tensor of two models."""
    a, b = load_file(expected / "model.safetensors"), load_file(found / "model.safetensors")
    assert a.keys() == b.keys()
    return {name: ((a[name] - b[name]).norm() / a[name].norm()).item() for name in a}


def same_weights(found_dir, expected_dir, *stages):
    for stage in stages:
        apart = distances(found_dir / "models" / stage, expected_dir / "models" / stage)
        assert max(apart.values()) <= RELATIVE, max(apart.items(), key=lambda item: item[1])
