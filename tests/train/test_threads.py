"""How many threads a rank takes of the cores that it may use."""

import os

import pytest
import torch

import geo_r1.train.parallel.ranks as ranks_module

QUOTAS = {
    "none": ({}, 8),
    "no limit": ({"cpu.max": "max 100000"}, 8),
    "two cores": ({"cpu.max": "200000 100000"}, 2),
    "half a core": ({"cpu.max": "50000 100000"}, 1),
    "one and a half": ({"cpu.max": "150000 100000"}, 2),
    "more than there are": ({"cpu.max": "6400000 100000"}, 8),
    "of the first version": ({"quota": "300000", "period": "100000"}, 3),
    "of the first version, none": ({"quota": "-1", "period": "100000"}, 8),
    "unreadable": ({"cpu.max": "\x00"}, 8),
}


@pytest.mark.parametrize("quota", QUOTAS)
def test_cores_by_affinity_and_quota(quota, tmp_path, monkeypatch):
    files, cores = QUOTAS[quota]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = (tmp_path / "cpu.max", None), (tmp_path / "quota", tmp_path / "period")
    monkeypatch.setattr(ranks_module, "QUOTAS", places)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    assert ranks_module.usable_cores() == cores


@pytest.mark.parametrize(
    ("environment", "asked", "threads"),
    [({}, 0, 3), ({"OMP_NUM_THREADS": "2"}, 0, None), ({"OMP_NUM_THREADS": "2"}, 5, 5), ({}, 1, 1)],
)
def test_threads_of_a_rank(environment, asked, threads, monkeypatch):
    """None: as torch has read them from the environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (environment | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "usable_cores", lambda: 6)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    ranks_module.Ranks.start(asked)
    assert given == [threads] * (threads is not None)
