"""Less kept for backward, kept elsewhere, or compiled: the same numbers, and no more work than stated."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from vlm_cases import assert_equal_gradients, few, mixed_groups, rows_and_gradients

from geo_r1.kernels import PackedLayout, packed_attention
from geo_r1.models import PackedVLM, memory, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAME = 1e-5 if DEVICE == "cuda" else 0.0  # of the largest entry


def trainable(lab, dtype=torch.float32, compute_dtype=None) -> PackedVLM:
    vlm = PackedVLM(copy.deepcopy(lab.own).to(DEVICE, dtype), compute_dtype, liger=False)
    vlm.model.train()
    return vlm


class Work(TorchDispatchMode):
    """Counts what really runs: attention forwards and products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.attention += op.name().startswith(memory.ATTENTION_OPS) and "backward" not in op.name()
        self.products += op.name() in memory.PRODUCTS
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_what_backward_computes_again(lab, compute_dtype):
    """None; all but each layer's last product; of these, neither the attention nor two products."""
    vlm, work, found = trainable(lab, compute_dtype=compute_dtype), {}, {}
    for kind in ("none", "full", "selective"):
        vlm.checkpoint_layers(kind)
        with Work() as work[kind]:
            found[kind] = rows_and_gradients(vlm, few(lab))
    text, vision = len(vlm.model.model.language_model.layers), len(vlm.model.model.visual.blocks)
    once = work["none"].attention
    assert once >= text + vision
    assert (work["full"].attention, work["selective"].attention) == (2 * once, once)
    gated = hasattr(vlm.model.model.visual.blocks[0].mlp, "gate_proj")
    again = text * 6 + vision * (4 if gated else 3)
    assert work["full"].products - work["none"].products == again
    kept = text * 2 + vision * (2 if gated else 1)  # of two behind the attention, the second is the last
    assert work["full"].products - work["selective"].products == kept
    for kind in ("full", "selective"):
        assert_equal_gradients(found[kind], found["none"], SAME)


def test_the_op_of_our_own_kernels_is_kept_and_the_first_product_behind_it():
    pytest.importorskip("triton")
    layout = PackedLayout.from_lengths([3], [[2]], DEVICE)
    noise = torch.Generator().manual_seed(0)
    x, before, *behind = (
        torch.randn(n, 16, generator=noise).to(DEVICE).requires_grad_() for n in (5, 16, 16, 16, 16)
    )

    def layer(x):
        q = (x @ before)[:, None]
        out = packed_attention(q, q, q, layout, impl="triton")[:, 0]
        for weight in behind:
            out = (out @ weight).sin()
        return out

    found = []
    for options in (None, {}, {"context_fn": memory.selective_contexts}):
        with Work() as work:
            out = layer(x) if options is None else checkpoint(layer, x, use_reentrant=False, **options)
            grads = torch.autograd.grad(out.square().sum(), (x, before, *behind))
        found.append((work.attention, work.products, *grads))
    (plain, full, selective) = found
    assert (plain[0], full[0], selective[0]) == (1, 2, 1)
    assert (full[1] - plain[1], selective[1] - plain[1]) == (4, 2)
    for got in (full, selective):
        for one, expected in zip(got[2:], plain[2:], strict=True):
            assert expected.abs().max() > 0.01 and torch.equal(one, expected)


def test_an_unknown_way_to_checkpoint_is_an_error(qwen2_5_vl):
    with pytest.raises(ValueError, match="no checkpointing 'some'; there is none, selective, full"):
        trainable(qwen2_5_vl).checkpoint_layers("some")


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_frozen_tower_is_not_run_again(lab, kind):
    vlm = trainable(lab)
    vlm.freeze(["vision"])
    vlm.checkpoint_layers(kind)
    calls = []
    for block in vlm.model.model.visual.blocks:
        block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = rows_and_gradients(vlm, few(lab))
    assert len(calls) == len(vlm.model.model.visual.blocks)
    towers = {name.split(".")[2] for name in found if name.startswith("model.visual")}
    assert towers <= {"merger", "deepstack_merger_list"} and "merger" in towers


@pytest.fixture
def packed_tensors(monkeypatch):
    """Shape, dtype and memory of what goes to the host."""
    seen, pack_one = [], memory.HostMemory._pack

    def spy(self, tensor):
        result = pack_one(self, tensor)
        if result is not tensor:
            seen.append((tuple(tensor.shape), tensor.dtype, tensor.untyped_storage()._cdata))
        return result

    monkeypatch.setattr(memory.HostMemory, "_pack", spy)
    return seen


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_offloaded_activations_come_back_and_weights_stay(lab, compute_dtype, packed_tensors):
    vlm = trainable(lab, compute_dtype=compute_dtype)
    expected = rows_and_gradients(vlm, mixed_groups(lab))
    host = vlm.offload_activations(True)
    host.smallest = 1
    assert_equal_gradients(rows_and_gradients(vlm, mixed_groups(lab)), expected, SAME)
    assert host.num_packed == len(packed_tensors) > 50 and 50 < host.num_unpacked <= host.num_packed
    weights = list(vlm.model.parameters())
    assert not {p.untyped_storage()._cdata for p in weights} & {memory for *_, memory in packed_tensors}
    shapes = {tuple(p.shape) for p in weights if p.ndim == 2}
    matrices = {shape for shape, dtype, _ in packed_tensors if dtype == torch.bfloat16}
    assert not (shapes | {shape[::-1] for shape in shapes}) & matrices


def test_small_tensors_stay(qwen2_5_vl, packed_tensors):
    vlm = trainable(qwen2_5_vl)
    host = vlm.offload_activations(True)
    assert host.smallest == 1 << 20
    rows_and_gradients(vlm, few(qwen2_5_vl))
    assert host.num_packed == 0
    host.smallest = 8192
    rows_and_gradients(vlm, few(qwen2_5_vl))
    assert packed_tensors
    assert all(torch.Size(shape).numel() * dtype.itemsize >= 8192 for shape, dtype, _ in packed_tensors)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_with_checkpointing_the_inputs_of_layers_are_offloaded(lab, packed_tensors, kind):
    """And nothing that a selective checkpoint keeps."""
    vlm = trainable(lab)
    expected = rows_and_gradients(vlm, few(lab))
    host = vlm.offload_activations(True)
    host.smallest = 1
    rows_and_gradients(vlm, few(lab))
    everything = host.num_packed
    vlm.checkpoint_layers(kind)
    del packed_tensors[:]
    assert_equal_gradients(rows_and_gradients(vlm, few(lab)), expected, SAME)
    assert len(vlm.layers) <= len(packed_tensors) < everything / 3
    assert vlm.offload_activations(False) is None
    assert not any(module._forward_pre_hooks for module in vlm.model.modules())
    del packed_tensors[:]
    assert_equal_gradients(rows_and_gradients(vlm, few(lab)), expected, SAME)
    assert not packed_tensors


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("kind, compiled_first", [("none", True), ("full", True), ("selective", False)])
def test_compiled_layers_compute_the_same_and_are_compiled_once(qwen2_5_vl, kind, compiled_first):
    """Two graphs a kind of layer, whatever the lengths: attention is not in them, nor is the checkpoint."""
    from torch._dynamo.utils import counters

    lab, vlm = qwen2_5_vl, trainable(qwen2_5_vl)
    plain = trainable(lab)
    for compiles in (compiled_first, not compiled_first):
        if compiles:
            vlm.compile_layers(backend="aot_eager")
        else:
            vlm.checkpoint_layers(kind)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for groups in (mixed_groups(lab), few(lab, longer=5)):
        assert_equal_gradients(rows_and_gradients(vlm, groups), rows_and_gradients(plain, groups), 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    batch = pack(*few(lab), DEVICE)
    vlm.hidden_states(batch, lambda _, q, k, v, scale: packed_attention(q, k, v, batch.layout, scale=scale))
    graphs.append(counters["stats"]["unique_graphs"])  # nor does it matter whose attention it is
    assert 4 <= graphs[0] == graphs[-1] <= 16
    torch._dynamo.reset()


def test_compiled_layers_offload_with_checkpointing_only(qwen2_5_vl):
    vlm = trainable(qwen2_5_vl)
    vlm.compile_layers(backend="eager")
    with pytest.raises(ValueError, match="offload_activations needs checkpointing"):
        vlm.offload_activations(True)
    vlm.checkpoint_layers("full")
    assert vlm.offload_activations(True) is not None
