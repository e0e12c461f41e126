"""The scripts of examples/, each in a process of its own: what they print, and what they leave behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(script, *arguments):
    """Run a script as its first lines say; returns what it printed."""
    paths = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_fused_ops_train_in_a_plain_loop():
    figures = re.findall(r"(?:loss|reward) ([\d.]+)$", run("fused_loss.py"), re.MULTILINE)
    loss, end_loss, reward, end_reward = map(float, figures)
    assert end_loss < loss - 1
    assert reward < 0.2 and end_reward > 0.8


def test_a_reward_of_ones_own_rises(tmp_path):
    text = run("own_reward.py", tmp_path)
    first, last = map(float, re.search(r"first steps ([\d.]+), last steps ([\d.]+)", text).groups())
    assert last > first
    assert all("rewards/own_reward:letters/mean" in row for row in metrics(tmp_path))


def test_data_of_ones_own_is_learned(tmp_path):
    run("own_data.py", tmp_path)
    losses = [row["loss"] for row in metrics(tmp_path) if row["stage"] == "sft"]
    assert len(losses) == 40 and losses[-1] < losses[0] / 3
    assert (tmp_path / "run" / "report.html").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"base", "sft", "grpo"}
    for stage in ("sft", "grpo"):
        assert (tmp_path / "run" / "models" / stage / "model.safetensors").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_says_how_it_is_run(script):
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert f"python examples/{script}" in text.split('"""')[1]
    assert len(text.splitlines()) <= 80


def test_every_script_has_a_test():
    assert SCRIPTS == ["fused_loss.py", "own_data.py", "own_reward.py"]
