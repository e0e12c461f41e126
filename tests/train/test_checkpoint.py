"""Checkpoints hold every bit; what is there is whole, and what fails says why."""

import pickle
import resource
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved_states import (
    ALONE,
    FILES,
    PROCESSES,
    TRAINER,
    assert_same,
    changed,
    die,
    make_state,
    names,
    with_value,
    without,
)

from geo_r1.errors import UserError
from geo_r1.train.state.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    checkpoint_folder,
    newest_checkpoint,
    prune,
)
from geo_r1.train.state.manifest import write_manifest
from geo_r1.train.state.shards import Writer


def test_every_bit_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    assert checkpoints.newest() is None
    checkpoints.save(3, make_state(), wait=True)
    assert checkpoints.newest() == checkpoints.folder(3) == tmp_path / "checkpoints" / "sft-000003"
    assert names(tmp_path / "checkpoints") == {"sft-000003"}
    assert names(checkpoints.folder(3)) == FILES
    state = changed(make_state())
    tensors = dict(state["model"])
    assert checkpoints.load(checkpoints.newest(), state) is state
    assert_same(state, make_state())
    assert all(state["model"][name] is tensor for name, tensor in tensors.items())


def test_a_section_that_is_not_asked_for_is_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(3, make_state(), wait=True)
    state = {"model": changed(make_state())["model"]}
    checkpoints.load(checkpoints.folder(3), state)
    assert state.keys() == {"model"}
    assert torch.equal(state["model"]["odd"], make_state()["model"]["odd"])


def test_parameters_are_written_and_read_without_a_graph(tmp_path):
    layer = torch.nn.Linear(3, 2)
    expected = layer.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    state = {"model": dict(layer.named_parameters()), "trainer": {}}
    checkpoints.save(1, state, wait=True)
    with torch.no_grad():
        layer.weight.zero_()
    checkpoints.load(checkpoints.folder(1), state)
    assert torch.equal(layer.weight, expected)
    assert layer.weight.is_leaf and layer.weight.requires_grad


@pytest.fixture
def slow_disk(monkeypatch):
    """An event without which no checkpoint comes to its end."""
    go_on = threading.Event()
    finish = Writer.finish

    def wait_and_finish(self, metadata, results):
        assert go_on.wait(timeout=60)
        finish(self, metadata, results)

    monkeypatch.setattr(Writer, "finish", wait_and_finish)
    yield go_on
    go_on.set()


def test_the_state_may_change_once_save_returns(tmp_path, slow_disk, monkeypatch):
    write_data = Writer.write_data

    def wait_and_write(self, plan, planner):
        assert slow_disk.wait(timeout=60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(Writer, "write_data", wait_and_write)
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    state = make_state()
    state["trainer"] = dict(TRAINER)
    checkpoints.save(3, state)
    for section in ("model", "optim"):
        for value in state[section].values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    state["optim"]["loops"] = 0
    state["trainer"]["step"] = 0
    assert checkpoints.newest() is None
    slow_disk.set()
    checkpoints.wait()
    checkpoints.load(checkpoints.newest(), state)
    assert_same(state, make_state())


def test_a_second_save_waits_for_the_first(tmp_path, slow_disk, monkeypatch):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(1, make_state())
    assert checkpoints.newest() is None
    wait = checkpoints.wait
    monkeypatch.setattr(checkpoints, "wait", lambda: (slow_disk.set(), wait()))
    checkpoints.save(2, make_state())
    assert "sft-000001" in names(tmp_path / "checkpoints")
    checkpoints.close()
    assert checkpoints.newest() == checkpoints.folder(2)


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    assert checkpoints.best() is None
    other = Checkpoints(tmp_path, "grpo", ALONE, 1)
    other.save(1, make_state(), wait=True)
    for step in range(1, 7):
        checkpoints.save(step, make_state())
        if step in (1, 2):
            checkpoints.mark_best(step, step / 10)
    checkpoints.wait()
    kept = {"sft-000002", "sft-000005", "sft-000006", "sft-best.json", "grpo-000001"}
    assert names(tmp_path / "checkpoints") == kept
    assert Checkpoints(tmp_path, "sft", ALONE, 2).best() == checkpoints.best() == (2, 0.2)
    # A best one that a killed run never finished does not count, and the one before it is still there.
    checkpoints.mark_best(9, 0.9)
    assert checkpoints.best() == (9, 0.9)
    again = Checkpoints(tmp_path, "sft", ALONE, 1)
    assert again.best() == (2, 0.2)
    again.save(9, make_state(), wait=True)  # which nobody marks, this time
    assert Checkpoints(tmp_path, "sft", ALONE, 1).best() == (2, 0.2)
    assert names(tmp_path / "checkpoints") == kept - {"sft-000005", "sft-000006"} | {"sft-000009"}
    again.mark_best(9, 0.7)
    again.save(10, make_state(), wait=True)
    assert names(tmp_path / "checkpoints") == {"sft-000009", "sft-000010", "sft-best.json", "grpo-000001"}
    (tmp_path / "checkpoints" / "sft-best.json").write_text("[[9, 0.")
    with pytest.raises(
        ValueError, match=r"checkpoints/sft-best\.json cannot be read: .*no step is the best$"
    ):
        Checkpoints(tmp_path, "sft", ALONE, 1)
    (tmp_path / "checkpoints" / "sft-best.json").unlink()
    again.finish()
    assert names(tmp_path / "checkpoints") == {"sft-000010", "grpo-000001"}
    prune(tmp_path, "sft", 0)
    assert names(tmp_path / "checkpoints") == {"grpo-000001"}
    prune(tmp_path, "grpo", 0)
    assert names(tmp_path / "checkpoints") == set()


def test_steps_are_numbers_not_text(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint_folder(tmp_path, "sft", step).mkdir(parents=True)
    assert newest_checkpoint(tmp_path, "sft") == tmp_path / "checkpoints" / "sft-1000000"


def test_a_checkpoint_never_replaces_another(tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(1, make_state(), wait=True)
    with pytest.raises(AssertionError, match="there already"):
        checkpoints.save(1, make_state())


# What goes wrong.


def test_a_save_that_fails_is_told_once_and_the_next_may_succeed(tmp_path):
    run_dir = tmp_path / "run"
    checkpoints = Checkpoints(run_dir, "sft", ALONE, 2)  # there is no such folder
    failure = (
        f"^checkpoint {run_dir}/checkpoints/sft-000001 cannot be written: checkpoints: No such file or dir"
    )
    checkpoints.save(1, make_state())
    with pytest.raises(ValueError, match=failure):
        checkpoints.wait()
    checkpoints.wait()
    checkpoints.save(1, make_state())
    with pytest.raises(ValueError, match=failure):
        checkpoints.save(2, make_state())
    run_dir.mkdir()
    checkpoints.save(2, make_state(), wait=True)
    assert names(run_dir / "checkpoints") == {"sft-000002"}


def fill_the_disk(run_dir):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(run_dir, "sft", ALONE, 2)
    checkpoints.save(1, {"model": {"w": torch.zeros(100_000)}, "trainer": {}}, wait=True)


def test_a_full_disk_is_one_line(tmp_path):
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        error = pool.submit(fill_the_disk, tmp_path).exception(timeout=60)
    assert isinstance(error, ValueError)
    folder = tmp_path / "checkpoints" / "sft-000001"
    assert str(error) == f"checkpoint {folder} cannot be written: File too large"
    assert names(tmp_path / "checkpoints") == {".sft-000001.partial"}
    prune(tmp_path, "sft", 1)
    assert names(tmp_path / "checkpoints") == set()


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(data, at):
    """One bit of a file, at a share of its length."""
    place = int(at * len(data))
    return data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]


def hole(data):
    return data[: len(data) // 3] + bytes(256) + data[len(data) // 3 + 256 :]


# A file, what becomes of its bytes (None: it is deleted), and what is said.
CHANGED = "has changed since it was written"
BREAKAGES = {
    "no manifest": ("manifest.json", None, "it has no manifest.json"),
    "cut manifest": ("manifest.json", lambda b: b[:40], "manifest.json: JSONDecodeError"),
    "other manifest": ("manifest.json", lambda b: b"[1]", "manifest.json: AttributeError"),
    "no metadata": (".metadata", None, r"\.metadata: No such file or directory"),
    "cut metadata": (".metadata", lambda b: b[:99], r"\.metadata has 99 bytes, \d+ were written"),
    "a bit of metadata": (".metadata", lambda b: flip(b, 0.4), rf"\.metadata {CHANGED}"),
    "no shard": ("__0_0.distcp", None, r"__0_0\.distcp: No such file or directory"),
    "empty shard": ("__0_0.distcp", lambda b: b"", r"__0_0\.distcp has 0 bytes, \d+ were written"),
    "a bit of a shard": ("__0_0.distcp", lambda b: flip(b, 0.3), rf"__0_0\.distcp {CHANGED}"),
    "one of the last bits": ("__0_0.distcp", lambda b: flip(b, 0.9999), rf"__0_0\.distcp {CHANGED}"),
    "a hole in a shard": ("__0_0.distcp", hole, rf"__0_0\.distcp {CHANGED}"),
    "no trainer": ("trainer.json", None, r"trainer\.json: No such file or directory"),
    "another step": ("trainer.json", lambda b: b.replace(b"17", b"71"), rf"trainer\.json {CHANGED}"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_damage_is_noticed_before_a_tensor_is_read(breakage, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(3, make_state(), wait=True)
    name, change, reason = BREAKAGES[breakage]
    file = checkpoints.folder(3) / name
    edit(file, change) if change else file.unlink()
    state = changed(make_state())
    with pytest.raises(
        DamagedCheckpointError, match=rf"^checkpoint {checkpoints.folder(3)} is damaged: {reason}"
    ) as e:
        checkpoints.load(checkpoints.folder(3), state)
    assert "\n" not in str(e.value)
    assert capfd.readouterr().err == ""
    assert_same(state, changed(make_state()))


class Planted:
    """Unpickling this writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


FOREIGN = {
    "code": (Planted, r"\.metadata names pathlib\.Path\.touch, which no checkpoint needs"),
    "a list": (lambda _: [1], r"\.metadata holds a list"),
    "torch's own functions": (lambda _: torch.hub.load, r"\.metadata names torch\.hub\.load, which no"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_metadata_runs_no_code(what, tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(3, make_state(), wait=True)
    folder, (make, reason) = checkpoints.folder(3), FOREIGN[what]
    (folder / ".metadata").write_bytes(pickle.dumps(make(tmp_path / "ran")))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match=f"^checkpoint {folder} cannot be read: {reason}"):
        checkpoints.load(folder, make_state())
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_set_aside_and_no_longer_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    for step in (1, 2):
        checkpoints.save(step, make_state(), wait=True)
        checkpoints.mark_best(step, step / 10)
    aside = checkpoints.set_aside(checkpoints.newest())
    assert aside == tmp_path / "checkpoints" / "damaged-sft-000002"
    assert names(aside) == FILES
    assert checkpoints.newest() == checkpoints.folder(1)
    assert checkpoints.best() == (1, 0.1)
    for name in ("sft-000002.bak", "sft-2", "sft-000007 (copy)", "damaged-sft-000001"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "sft-000009").write_text("a file")
    assert newest_checkpoint(tmp_path, "sft") == checkpoints.folder(1)


OTHERS = {
    "a tensor more": (with_value("model", "new", torch.zeros(2)), "it has no model.new"),
    "a tensor less": (without("model", "odd"), r"model.odd is [5, 3] float32 there, absent here"),
    "another shape": (
        with_value("model", "odd", torch.zeros(3, 5)),
        "model.odd is [5, 3] float32 there, [3, 5] float32 here",
    ),
    "another dtype": (
        with_value("model", "half", torch.zeros(7, 4)),
        "model.half is [7, 4] bfloat16 there, [7, 4] float32 here",
    ),
    "no number": (
        with_value("optim", "loops", torch.zeros(2)),
        "optim.loops is a number there, [2] float32 here",
    ),
    "a number more": (with_value("optim", "b", 1), "it has no optim.b"),
    "a number less": (without("optim", "loops"), "optim.loops is a number there, absent here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_one_line(other, tmp_path):
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    checkpoints.save(3, make_state(), wait=True)
    state, difference = OTHERS[other]
    with pytest.raises(ValueError) as e:
        checkpoints.load(checkpoints.folder(3), state)
    assert str(e.value) == f"checkpoint {checkpoints.folder(3)} is of another model: {difference}"


def test_a_disk_without_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, "sft", ALONE, 2), make_state()
    size = sum(x.nbytes for part in ("model", "optim") for x in state[part].values() if hasattr(x, "nbytes"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size + 100))
    checkpoints.check_room(state, 100)
    with pytest.raises(UserError, match=r"sft take 0\.00 GiB, and 0\.00 GiB are free; make room, or"):
        checkpoints.check_room(state, 101)


def save_until_killed(run_dir, owner, attribute, number, after):
    """Save steps 1, 2, 3, ..., of which two are kept; die at, or after, the n-th call of a function."""
    real, calls = getattr(owner, attribute), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) < number or after:
            out = real(*args, **kwargs)
        if len(calls) == number:
            die()
        return out

    setattr(owner, attribute, counted)
    checkpoints = Checkpoints(run_dir, "sft", ALONE, 2)
    for step in range(1, 9):
        checkpoints.save(step, make_state(), wait=True)


# Renames: of a save its metadata and its folder, and each old checkpoint's before it is deleted.
KILLS = {
    "before the first byte": ((Writer, "write_data", 2, False), {"sft-000001", ".sft-000002.partial"}),
    "before the metadata": ((Writer, "write_data", 2, True), {"sft-000001", ".sft-000002.partial"}),
    "before the name": ((Path, "rename", 4, False), {"sft-000001", ".sft-000002.partial"}),
    "after the name": ((Path, "rename", 4, True), {"sft-000001", "sft-000002"}),
    "before deleting": ((Path, "rename", 7, False), {"sft-000001", "sft-000002", "sft-000003"}),
    "in deleting": ((Path, "rename", 7, True), {".sft-000001.partial", "sft-000002", "sft-000003"}),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_whole_checkpoints_only(moment, tmp_path):
    kill, left = KILLS[moment]
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        error = pool.submit(save_until_killed, tmp_path, *kill).exception(timeout=60)
    assert isinstance(error, BrokenProcessPool)
    assert names(tmp_path / "checkpoints") == left
    checkpoints = Checkpoints(tmp_path, "sft", ALONE, 2)
    newest = checkpoints.newest()
    assert newest.name == max(name for name in left if not name.startswith("."))
    assert_same(checkpoints.load(newest, changed(make_state())), make_state())
    step = int(newest.name[-6:]) + 1  # what was half written is written again
    partial = tmp_path / "checkpoints" / f".sft-{step:06d}.partial"
    partial.mkdir(exist_ok=True)
    (partial / "__7_0.distcp").write_text("of another rank")
    checkpoints.save(step, make_state(), wait=True)
    assert names(checkpoints.folder(step)) == FILES
    assert names(tmp_path / "checkpoints") == {f"sft-{step - 1:06d}", f"sft-{step:06d}"}
