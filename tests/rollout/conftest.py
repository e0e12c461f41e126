"""The model tests' helpers serve here too; a server of the tests' own, and a client that has loaded it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "models"))


@pytest.fixture(scope="module")
def lab():
    from vlm_cases import Lab

    return Lab()


@pytest.fixture
def server(monkeypatch):
    # Imported here: `make gpu` runs the other tests where its HTTP client is not installed.
    from fake_server import WEIGHTS, Server

    from geo_r1.rollout.vllm import channel

    monkeypatch.setattr(channel, "expected_weights", lambda _: {n: t.shape for n, t in WEIGHTS.items()})
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    made = Server()
    yield made
    made.close()


@pytest.fixture
def engine(server):
    from fake_server import WEIGHTS, engine_of

    made = engine_of(server)
    made.load(WEIGHTS.items())
    return made
