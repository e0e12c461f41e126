"""What the tests of checkpoints save, and in which processes."""

import multiprocessing as mp
import os
import signal

import torch
from torch.distributed.tensor import DTensor

from geo_r1.train.parallel.ranks import Ranks


def rank_of(rank, size):
    return Ranks(rank, size, torch.device("cpu"))


ALONE = rank_of(0, 1)
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed.fsdp", "geo_r1.train.state.checkpoint"])
FILES = {".metadata", "__0_0.distcp", "manifest.json", "trainer.json"}
TRAINER = {"step": 3, "drawn": 17, "nested": {"rate": 0.1 + 0.2, "name": "ä"}}


def make_state():
    draw = torch.Generator().manual_seed(0)
    model = {
        "odd": torch.randn(5, 3, generator=draw),  # two ranks divide neither size
        "single": torch.randn(1, generator=draw),  # one rank's shard is empty
        "half": torch.randn(7, 4, generator=draw).bfloat16(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "view": torch.randn(6, 8, generator=draw).t()[1:5],
    }
    optim = {"odd.exp_avg": torch.randn(5, 3, generator=draw), "odd.step": torch.tensor(3.0), "loops": 4}
    optim |= {"scale": 1 / 3, "codes": torch.arange(9, dtype=torch.uint8)}
    return {"model": model, "optim": optim, "trainer": TRAINER}


def changed(state):
    """The same names and kinds, with other values."""
    return {
        "model": {name: value * 0 - 1 for name, value in state["model"].items()},
        "optim": {name: value * 0 for name, value in state["optim"].items()},
        "trainer": {"step": 0},
    }


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same(state, expected):
    assert state["trainer"] == expected["trainer"]
    for section in ("model", "optim"):
        assert state[section].keys() == expected[section].keys()
        for name, value in expected[section].items():
            found = whole(state[section][name])
            if isinstance(value, torch.Tensor):
                assert found.dtype == value.dtype, name
                torch.testing.assert_close(found, value, rtol=0, atol=0, msg=name)
            else:
                assert found == value, name


def names(folder):
    return {path.name for path in folder.iterdir()}


def with_value(section, name, value):
    state = make_state()
    state[section][name] = value
    return state


def without(section, name):
    state = make_state()
    del state[section][name]
    return state


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
