"""How many threads a rank takes of the cores that it may use."""

import os

import pytest
import torch

import geo_r1.cores as cores_module
import geo_r1.train.parallel.ranks as ranks_module

HALF, TWO, MUCH = "50000 100000", "200000 100000", "6400000 100000"
OWN = "/slice/job"
# Files below the groups' root, the groups that the system says are this process's own, and the cores.
QUOTAS = {
    "none": ({}, "", 8),
    "no limit": ({"cpu.max": "max 100000"}, "0::/", 8),
    "of a container": ({"cpu.max": TWO}, "0::/", 2),
    "half a core": ({"cpu.max": HALF}, "0::/", 1),
    "one and a half": ({"cpu.max": "150000 100000"}, "0::/", 2),
    "more than there are": ({"cpu.max": MUCH}, "0::/", 8),
    "unreadable": ({"cpu.max": "\x00"}, "0::/", 8),
    "no list of groups": ({"cpu.max": TWO}, None, 2),
    "a list of something else": ({"cpu.max": TWO}, "\x00", 2),
    "own group": ({"slice/job/cpu.max": TWO, "other/cpu.max": HALF}, f"0::{OWN}", 2),
    "group around it": ({"slice/job/cpu.max": "max 100000", "slice/cpu.max": TWO}, f"0::{OWN}", 2),
    "both": ({"slice/job/cpu.max": MUCH, "slice/cpu.max": HALF}, f"0::{OWN}", 1),
    "a path of the host": ({"cpu.max": TWO}, "0::/docker/5a4d", 2),
    "a path out": ({"cpu.max": TWO}, "0::/../../outside", 2),
    "version 1": ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", 3),
    "version 1, none": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", 8),
    "version 1, own": (
        {"cpu/slice/cpu.cfs_quota_us": "300000", "cpu/slice/cpu.cfs_period_us": "100000"},
        f"0::/\n5:memory:/slice\n3:cpu,cpuacct:{OWN}",
        3,
    ),
    "both versions": ({"unified/slice/cpu.max": TWO}, f"3:memory:/\n0::{OWN}", 2),
}


@pytest.mark.parametrize("quota", QUOTAS)
def test_cores_by_affinity_and_quota(quota, tmp_path, monkeypatch):
    files, own, cores = QUOTAS[quota]
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cores_module, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores_module, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    assert cores_module.usable_cores() == cores


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
