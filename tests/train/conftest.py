import sys
from pathlib import Path

import pytest
import small_runs as runs

import geo_r1.train.run
from geo_r1.data import World, exemplars
from geo_r1.models.tiny import build_tiny

sys.path.append(str(Path(__file__).parent.parent / "data"))  # its chat server serves here too


@pytest.fixture(scope="session", autouse=True)
def tiny_model(tmp_path_factory):
    """A folder with a model smaller still than `tiny`, which every small run starts from."""
    world = World()
    samples = [exemplars.chain_of_thought(world, "train", i) for i in range(20)]
    texts = [part.get("text", "") for sample in samples for part in sample.messages[0]["content"]]
    texts = ["user\n", "assistant\n", *texts, *(sample.response for sample in samples)]
    folder = tmp_path_factory.mktemp("model")
    for piece in build_tiny(texts, hidden_size=64, num_layers=2):
        piece.save_pretrained(folder)
    runs.SMALL["model.path"] = folder
    return folder


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    """The report has tests of its own, and takes longer than a small run."""
    monkeypatch.setattr(geo_r1.train.run, "write_report", lambda run_dir: run_dir / "report.html")
