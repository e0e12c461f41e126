"""A rank is killed, is stopped or fails: the job ends by itself, says why once, and later goes on."""

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
HANG_TIMEOUT = 5  # seconds
NUM_KILLS = 10  # a stage
STEPS = 30  # more than the runs get done before they are killed
WHOLE = {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "trainer.json"}
JOBS = {"sft": "fsdp2", "grpo": "ddp"}  # stage, strategy
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
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
        strike = (signal.SIGKILL, victim, draw.randint(1, 4), draw.uniform(0, 0.2))
        ended = forked_ranks.run(argv, ranks, strike=strike)
        assert ended.struck
        assert ended.seconds < SOON
        assert ended.codes[victim] == -signal.SIGKILL
        # SIGTERM may come before the other rank notices; within a stage it is a request that cannot be met
        assert ended.codes[1 - victim] in (1, -signal.SIGTERM, -signal.SIGKILL)
        lost = f"geo_r1: rank {1 - victim}: another rank has ended ("
        usual = ("which was killed", "Ctrl-C again stops now")  # of the run before, and of SIGTERM
        said = [line for line in ended.said if not line.endswith(usual)]
        assert len(said) <= 1 and all(line.startswith(lost) for line in said), said
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
    assert runs.checkpoints(folder) == {f"{stage}-{STEPS:06d}"}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stopped_rank_ends_the_run_with_its_name(victim, tmp_path):
    """A process after SIGSTOP lives, keeps its connections, and heeds no other signal than SIGKILL."""
    argv = runs.arguments(tmp_path / "run", "sft", sft__steps=STEPS, run__hang_timeout=HANG_TIMEOUT)
    ended = forked_ranks.run(argv, 3, strike=(signal.SIGSTOP, victim, 2, 0.0))
    assert ended.struck
    assert HANG_TIMEOUT < ended.seconds < HANG_TIMEOUT + SOON
    assert ended.codes[victim] == -signal.SIGKILL
    assert 1 in ended.codes
    hung = "has not answered for 5 s (run.hang_timeout): stopped, or its machine is gone"
    assert ended.said == [f"geo_r1: rank {victim} {hung}"]


# Failure: exit code, and the line after "geo_r1: " and the rank.
FAILURES = {
    "mistake": (2, "sample 7 has no answer"),
    "outage": (1, "the server has gone"),
    "defect": (1, "ValueError: zip() argument 2 is shorter than argument 1"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_has_its_exit_code_and_one_line(failure, ranks, tmp_path):
    ended = forked_ranks.run(runs.arguments(tmp_path / "run", "sft"), ranks, moment=f"{failure}:2")
    code, line = FAILURES[failure]
    assert code in ended.codes and {*ended.codes} <= {code, -signal.SIGTERM}
    kept = failure == "mistake" or (failure == "outage" and ranks == 1)  # of others, not every rank knows
    end = "; sft goes on after step 1" * kept
    expected = {f"geo_r1: {rank}{line}{end}" for rank in (("",) if ranks == 1 else ("rank 0: ", "rank 1: "))}
    [said] = [line for line in ended.said if line.startswith("geo_r1: ")]
    assert said in expected
    traces = [text for text in ended.stderr if "Traceback" in text]
    assert traces if failure == "defect" else not traces
    assert all(f"\n{line}\n" in text for text in traces)
