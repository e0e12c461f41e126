"""Kernels are tested where they can run: on the GPU where there is one.

Elsewhere on the CPU: Triton's by its interpreter, those of csrc/ by an emulator that they are compiled for.
"""

import os
import signal
import sys

import pytest
import torch
from emulator import build
from quick import quicken

GPU = torch.cuda.is_available()
NO_CUDA = None  # why nothing here can stand in for a GPU
SKIPPED = pytest.StashKey[str]()

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    NO_CUDA = build.why_not()
    # In the place of the build for GPUs, if there is one; None makes its import fail.
    sys.modules["geo_r1._C"] = build.load() if NO_CUDA is None else None
EMULATED = not GPU and NO_CUDA is None


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    """Our own kernels, one kind after the other."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def quick():
    quicken()


@pytest.fixture
def ctrl_c():
    """Ctrl-C does what it does at a terminal; where tests run in the background, shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=EMULATED)
def shuffled_threads():
    """Threads of emulated kernels take turns by lot, the same for each run of a test."""
    build.adversary(order="shuffled")


def pytest_collection_modifyitems(config, items):
    """Skip tests with an `impl` of "cuda" where that cannot run."""
    cuda = [
        item for item in items if hasattr(item, "callspec") and item.callspec.params.get("impl") == "cuda"
    ]
    if not cuda:
        return
    from geo_r1.kernels import impls

    device, reasons = torch.device("cuda" if GPU else "cpu"), []
    for item in cuda:
        op = "packed_attention" if item.path.stem.startswith("test_attention") else "grpo_loss"
        if reason := NO_CUDA or impls.why_not(op, "cuda", device):
            item.add_marker(pytest.mark.skip(reason=reason))
            reasons.append(reason)
    if reasons:
        told = "; ".join(dict.fromkeys(reasons))
        config.stash[SKIPPED] = f"{len(reasons)} tests of impl='cuda' skipped: {told}"


def pytest_terminal_summary(terminalreporter, config):
    if SKIPPED in config.stash:
        terminalreporter.write_line(config.stash[SKIPPED], yellow=True)
