"""Checkpoints of two ranks: any placement of the tensors reads any other, and ranks fail together."""

import errno
import json
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
import torch.distributed as dist
from saved_states import (
    ALONE,
    FILES,
    PROCESSES,
    assert_same,
    changed,
    die,
    make_state,
    names,
    rank_of,
    whole,
    without,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from geo_r1.train.parallel.ranks import RankLost
from geo_r1.train.state.checkpoint import Checkpoints
from geo_r1.train.state.shards import Writer


def sharded(state, placement=None):
    """The state spread over all ranks; of its tensors only those that have rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread(name, value):
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        dim = 1 if name == "half" else 0
        return distribute_tensor(value, mesh, [placement or Shard(dim)], src_data_rank=None)

    return {
        section: {name: spread(name, value) for name, value in state[section].items()}
        for section in ("model", "optim")
    } | {"trainer": state["trainer"]}


def as_rank(rank, meeting, function, args):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        return function(rank_of(rank, 2), *args)
    finally:
        dist.destroy_process_group()


def on_two_ranks(tmp_path, function, *args):
    """What the function returns, or raises, on each of two ranks."""
    meeting = tmp_path / f"meeting-{function.__name__}"
    with ProcessPoolExecutor(2, PROCESSES) as pool:
        running = [pool.submit(as_rank, rank, meeting, function, args) for rank in range(2)]
        return [one.exception(timeout=60) or one.result() for one in running]


def save_sharded(ranks, run_dir):
    checkpoints = Checkpoints(run_dir, "sft", ranks, 2)
    state = sharded(make_state())
    assert len(state["model"]["single"].to_local()) == 1 - ranks.rank
    checkpoints.save(3, state)
    for value in state["model"].values():
        value.zero_()
    checkpoints.wait()
    assert names(checkpoints.folder(3)) == FILES | {"__1_0.distcp"}
    # Read as it was, as copies, and whole.
    for placed in (sharded, lambda state: sharded(state, Replicate()), lambda state: state):
        found = checkpoints.load(checkpoints.newest(), placed(changed(make_state())))
        assert_same(found, make_state())
    # Written as copies, which the ranks share out among them, and read in shards.
    checkpoints.save(4, sharded(make_state(), Replicate()))
    checkpoints.save(5, make_state(), wait=True)
    for step in (4, 5):
        assert_same(checkpoints.load(checkpoints.folder(step), sharded(changed(make_state()))), make_state())
    checkpoints.mark_best(5, 0.5)
    ranks.barrier()
    assert Checkpoints(run_dir, "sft", ranks, 2).best() == (5, 0.5)
    checkpoints.close()
    return "done"


def load_sharded(ranks, run_dir):
    checkpoints = Checkpoints(run_dir, "sft", ranks, 2)
    return whole(checkpoints.load(checkpoints.newest(), sharded(changed(make_state())))["model"]["odd"])


def test_shards_become_whole_and_whole_become_shards(tmp_path):
    assert on_two_ranks(tmp_path, save_sharded, tmp_path) == ["done", "done"]
    alone = Checkpoints(tmp_path, "sft", ALONE, 2)
    for step in (4, 5):
        assert_same(alone.load(alone.folder(step), changed(make_state())), make_state())
    alone.save(6, make_state(), wait=True)
    for odd in on_two_ranks(tmp_path, load_sharded, tmp_path):
        assert torch.equal(odd, make_state()["model"]["odd"])


def train_sharded(ranks, run_dir):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(run_dir, "sft", ranks, 2)
    end = {}
    for step in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 3) * (step + 1)).sum().backward()
        optimizer.step()
        state = {"model": dict(model.named_parameters()), "trainer": {"step": step}}
        state["optim"] = {
            f"{name}.{entry}": value
            for name, parameter in model.named_parameters()
            for entry, value in optimizer.state[parameter].items()
        }
        if step == 1:
            checkpoints.save(step, state)  # and on with the next step meanwhile
        end[step] = {name: whole(value).detach().clone() for name, value in state["model"].items()}
    checkpoints.wait()
    checkpoints.load(checkpoints.folder(1), state)
    for name, value in state["model"].items():
        assert torch.equal(whole(value), end[1][name])
    for step in (2, 3):
        optimizer.zero_grad()
        model(torch.ones(2, 3) * (step + 1)).sum().backward()
        optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(whole(value), end[3][name]), name
    return end[1]


def test_fsdp_and_adamw_go_on_bit_by_bit(tmp_path):
    end, _ = on_two_ranks(tmp_path, train_sharded, tmp_path)
    alone = Checkpoints(tmp_path, "sft", ALONE, 2)
    state = alone.load(alone.folder(1), {"model": {name: torch.zeros_like(x) for name, x in end.items()}})
    for name, value in state["model"].items():
        assert torch.equal(value, end[name])


def one_rank_fails(ranks, run_dir):
    checkpoints = Checkpoints(run_dir, "sft", ranks, 2)
    write_data = Writer.write_data

    def fail(self, plan, planner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.rank == 1:
        Writer.write_data = fail
    checkpoints.save(1, make_state())
    with pytest.raises(ValueError) as unwritten:
        checkpoints.wait()
    Writer.write_data = write_data
    checkpoints.save(2, make_state(), wait=True)
    state = make_state() if ranks.rank == 0 else without("model", "odd")
    with pytest.raises(ValueError) as unread:
        checkpoints.load(checkpoints.folder(2), state)
    if ranks.rank == 1:
        (checkpoints.folder(2) / "__1_0.distcp").unlink()
    ranks.barrier()
    with pytest.raises(ValueError) as lost:
        checkpoints.load(checkpoints.folder(2), make_state())
    checkpoints.close()
    return [str(error.value) for error in (unwritten, unread, lost)]


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    first, second = on_two_ranks(tmp_path, one_rank_fails, tmp_path)
    folder = tmp_path / "checkpoints"
    assert first == second
    assert first == [
        f"checkpoint {folder}/sft-000001 cannot be written: rank 1: No space left on device",
        f"checkpoint {folder}/sft-000002 is of another model: model.odd is [5, 3] float32 there, absent here",
        f"checkpoint {folder}/sft-000002 is damaged: __1_0.distcp: No such file or directory",
    ]
    assert names(folder) == {"sft-000002"}  # and what the first had left is gone


def one_rank_dies(ranks, run_dir, told):
    if ranks.rank == 1:
        Writer.write_data = die
    checkpoints = Checkpoints(run_dir, "sft", ranks, 2)
    checkpoints.save(1, make_state())
    with pytest.raises(RankLost, match=r"^another rank has ended \("):
        checkpoints.wait()
    checkpoints.close()
    told.write_text(json.dumps(sorted(names(run_dir / "checkpoints"))))


def test_a_rank_that_dies_leaves_no_checkpoint(tmp_path):
    told, meeting = tmp_path / "told", tmp_path / "meeting"
    with ProcessPoolExecutor(1, PROCESSES) as first, ProcessPoolExecutor(1, PROCESSES) as second:
        args = (tmp_path, told)
        survivor = first.submit(as_rank, 0, meeting, one_rank_dies, args)
        victim = second.submit(as_rank, 1, meeting, one_rank_dies, args)
        assert isinstance(victim.exception(timeout=60), BrokenProcessPool)
        assert survivor.exception(timeout=60) is None
    assert json.loads(told.read_text()) == [".sft-000001.partial"]
