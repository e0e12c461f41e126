"""One of two ranks is killed at any moment: the job ends by itself, says why, and later goes on."""

import json
import os
import random
import signal

import forked_ranks
import pytest
import small_runs as runs
import torch
import torch.distributed.checkpoint as dcp
from compared_runs import RATE, same_metrics, same_weights

from geo_r1.train.state.checkpoint import newest_checkpoint

SOON = 60  # seconds; some 3 on a machine that is not shared
NUM_KILLS = 10  # a stage
STEPS = 30  # more than the runs get done before they are killed
WHOLE = {".metadata", "__0_0.distcp", "__1_0.distcp", "trainer.json"}
JOBS = {"sft": "fsdp2", "grpo": "ddp"}  # stage, strategy
UPDATES = {"sft": 1, "grpo": runs.SMALL["grpo.num_iterations"]}  # a step


def read_whole(checkpoint):
    """Read every tensor of a checkpoint, and its step."""
    assert {path.name for path in checkpoint.iterdir()} == WHOLE
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.full(kind.size, torch.nan, dtype=kind.properties.dtype)
        for name, kind in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert all(tensor.isfinite().all() for tensor in state.values())
    step = json.loads((checkpoint / "trainer.json").read_text())["trainer"]["step"]
    updates = {tensor.item() for name, tensor in state.items() if name.endswith(".step")}
    assert updates == {step * UPDATES[checkpoint.name.split("-")[0]]}
    assert checkpoint.name.endswith(f"-{step:06d}")
    return step


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("stage", JOBS)
def test_a_killed_rank_ends_the_run_which_goes_on(stage, tmp_path):
    ranks, options = forked_ranks.STRATEGIES[JOBS[stage]]
    options = options | RATE | {f"{stage}__steps": STEPS, f"{stage}__save_every": 1}
    forked_ranks.train(tmp_path / "whole", stage, strategy=JOBS[stage], **options)
    argv, folder = runs.arguments(tmp_path / "run", stage, **options), tmp_path / "run"
    draw = random.Random(stage)
    reached = 0
    for number in range(NUM_KILLS):
        victim = number % 2
        ended = forked_ranks.run(argv, ranks, kill=(victim, draw.randint(1, 4), draw.uniform(0, 0.2)))
        assert ended.killed
        assert ended.seconds < SOON
        assert ended.codes[victim] == -signal.SIGKILL
        # an interpreter that hangs while it ends is ended by its alarm
        assert ended.codes[1 - victim] in (1, -signal.SIGALRM)
        assert ended.said == [f"geo_r1: rank {victim} was killed (no goodbye)"]
        steps = [read_whole(path) for path in (folder / "checkpoints").glob(f"{stage}-*")]
        newest = newest_checkpoint(folder, stage)
        assert max(steps, default=0) >= reached, "a checkpoint that was there is lost"
        assert newest is None if not steps else newest.name == f"{stage}-{max(steps):06d}"
        assert len(steps) <= 3  # two are kept, and the third goes when it is there
        reached = max(steps, default=0)
        assert not (folder / "models" / stage).exists()
    assert reached > 0, "some come after a checkpoint"
    forked_ranks.train(folder, stage, strategy=JOBS[stage], **options)
    same_metrics(folder, tmp_path / "whole", stage, STEPS)
    same_weights(folder, tmp_path / "whole", stage)
    assert runs.files_under(folder / "checkpoints") == set()
