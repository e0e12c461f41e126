"""Tests that need vLLM are skipped if it is not installed."""

import importlib.util
import sys
from pathlib import Path

import pytest
from engine_lab import Lab, make_lab

sys.path.append(str(Path(__file__).parent.parent / "models"))  # its helpers serve here too
HERE = Path(__file__).parent
WITHOUT = {"test_requests.py"}  # needs no vLLM


def pytest_collection_modifyitems(items):
    spec = importlib.util.find_spec("vllm")
    missing = spec is None or spec.origin is None  # this folder alone looks like a package without a file
    for item in items:
        if HERE in item.path.parents:
            # vLLM and its libraries warn about each other, differently in each version; ours stay errors.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::geo_r1"))
            if missing and item.path.name not in WITHOUT:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; make test-vllm"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("engine") / "model")
