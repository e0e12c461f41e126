"""Under torchrun each rank has an engine, or ranks share one; each samples its own prompts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sampling_ranks.py")


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_ranks_sample_their_own_prompts(tmp_path, tensor_parallel_size):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path), str(tensor_parallel_size)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
