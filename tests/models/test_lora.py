"""Adapters in place: what they compute, who is trained, and the plain model that they merge into."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from test_liger import stand_ins  # noqa: F401  # a fixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText
from vlm_cases import Lab, assert_equal_gradients, few, mixed_groups, relative_error, rows_and_gradients

import geo_r1.models.lora
from geo_r1.models import PackedVLM, pack
from geo_r1.models.lora import (
    ADAPTER,
    DOWN,
    UP,
    adapters_off,
    add_lora,
    lora_layers,
    merged_state,
    merged_weight,
)

pytest.importorskip("peft")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 5.0


def adapted(model, targets=TARGETS, vision=True, dropout=0.0):
    """A copy with adapters that compute something: B is drawn, too."""
    model = copy.deepcopy(model)
    add_lora(model, RANK, ALPHA, dropout, targets, vision)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
    return model


def adapter_names(model):
    """Names of the adapters' weights in the model's state dict."""
    return {name + end for name in lora_layers(model) for end in (DOWN, UP)}


@torch.no_grad()
def merge(model):
    """Add adapters to the weights of a whole model, and take them out; the weights stay frozen."""
    for path, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        base.weight.copy_(merged_weight(base.weight, down, up, layer.lora_alpha[ADAPTER]))
        model.set_submodule(path, base)
    if hasattr(model, "peft_config"):
        del model.peft_config


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("way", ["plain", "checkpointed", "liger", "liger, checkpointed"])
def test_rows_and_gradients_are_those_of_the_merged_weights(lab, way, request):
    """y = (W + s B A) x, so with the gradient G of W + s B A: dB = s G A', dA = s B' G; no other has one."""
    s = ALPHA / RANK
    plain, model = PackedVLM(adapted(lab.own)), PackedVLM(adapted(lab.own))
    merge(plain.model)
    plain.model.requires_grad_(True)
    by_weight = rows_and_gradients(plain, mixed_groups(lab))
    expected = {"rows": by_weight["rows"]}
    for path, layer in lora_layers(model.model).items():
        G, A, B = by_weight[f"{path}.weight"], layer.lora_A.default.weight, layer.lora_B.default.weight
        expected[f"{path}.lora_A.default.weight"] = s * B.detach().T @ G
        expected[f"{path}.lora_B.default.weight"] = s * G @ A.detach().T
    if "liger" in way:
        request.getfixturevalue("stand_ins").fuse_layers(model.model)
    if "checkpointed" in way:
        model.checkpoint_layers("full")
        model.model.train()
    found = rows_and_gradients(model, mixed_groups(lab))
    assert relative_error(found["rows"], expected["rows"]) < 1e-12
    assert found.keys() == {"rows", *adapter_names(model.model)}
    assert any("visual" in name for name in found) and any("language_model" in name for name in found)
    assert_equal_gradients(found, expected, 1e-11)


def test_text_alone_and_chosen_layers(qwen2_5_vl):
    model = adapted(qwen2_5_vl.own, ("v_proj", "down_proj"), vision=False)
    layers = [f"model.language_model.layers.{i}" for i in range(len(model.model.language_model.layers))]
    paths = [f"{layer}.{p}" for layer in layers for p in ("self_attn.v_proj", "mlp.down_proj")]
    assert list(lora_layers(model)) == paths
    assert adapter_names(model) <= model.state_dict().keys()
    found = rows_and_gradients(PackedVLM(model), few(qwen2_5_vl)).keys() - {"rows"}
    assert found == adapter_names(model) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_at_first_nothing_changes_and_the_seed_decides(lab):
    state = torch.get_rng_state()
    models = [copy.deepcopy(lab.own) for _ in range(3)]
    for model, seed in zip(models, (4, 4, 5), strict=True):
        add_lora(model, RANK, ALPHA, 0.0, TARGETS, vision=True, seed=seed)
        assert type(model) is type(lab.own)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = {name for name in one if "lora_A" in name}
    assert {name for name in one if not torch.equal(one[name], other[name])} == drawn
    assert 2 * len(drawn) == len(adapter_names(models[0]))
    batch = pack(*few(lab))
    with torch.no_grad():
        expected = lab.packed.loss_rows(batch)
        assert torch.equal(PackedVLM(models[0]).loss_rows(batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_meta_they_have_names_shapes_and_dtypes(qwen2_5_vl, dtype):
    real = copy.deepcopy(qwen2_5_vl.own).to(dtype)
    empty = copy.deepcopy(real).to("meta")
    empty.tie_weights()
    for model in (real, empty):
        add_lora(model, RANK, ALPHA, 0.0, TARGETS, vision=True)
    expected = {name: (p.shape, p.requires_grad) for name, p in real.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in empty.named_parameters()} == expected
    assert {(p.dtype, p.device.type) for p in empty.parameters()} == {(dtype, "meta")}
    assert {p.dtype for p in real.parameters()} == {dtype}


def test_adapters_off_is_the_base_model(lab):
    vlm, batch = PackedVLM(adapted(lab.own, dropout=0.1)), pack(*few(lab))
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    vlm.model.train()  # no dropout within, either
    with torch.no_grad():
        expected = lab.packed.loss_rows(batch)
        with adapters_off(vlm.model):
            with adapters_off(vlm.model):
                assert torch.equal(vlm.loss_rows(batch), expected)
            assert torch.equal(vlm.loss_rows(batch), expected)
        vlm.model.eval()
        on = vlm.loss_rows(batch)
        assert relative_error(on, expected) > 1e-2
        with pytest.raises(KeyError), adapters_off(vlm.model):
            raise KeyError
        assert torch.equal(vlm.loss_rows(batch), on)
    assert trained == {name for name, p in vlm.model.named_parameters() if p.requires_grad}


def test_dropout_is_on_the_adapters_inputs(qwen2_5_vl):
    vlm, batch = PackedVLM(adapted(qwen2_5_vl.own, dropout=0.5)), pack(*few(qwen2_5_vl))
    whole = vlm.loss_rows(batch)
    vlm.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert relative_error(vlm.loss_rows(batch), whole) > 1e-3


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_folder_is_one_that_transformers_loads(lab, dtype, tolerance, tmp_path):
    model = adapted(copy.deepcopy(lab.own).to(dtype))
    inputs = lab.own_inputs(lab.prompt((56, 84), "where?"), [9, 8, 7])
    with torch.no_grad():
        expected = model(**inputs).logits
        merge(model)
        assert list(model.state_dict()) == list(lab.own.state_dict())
        assert not hasattr(model, "peft_config") and not lora_layers(model)
        assert relative_error(model(**inputs).logits, expected) < tolerance
        model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("adapter*"))
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            tmp_path, dtype=dtype, output_loading_info=True
        )
        assert not any(report.values())
        assert relative_error(loaded(**inputs).logits, expected) < tolerance
    merge(model)  # nothing to do


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_state_is_that_of_the_merged_model(qwen2_5_vl, dtype):
    model = adapted(copy.deepcopy(qwen2_5_vl.own).to(dtype), ("q_proj", "down_proj"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    expected = model.state_dict()
    for tensors in (list(state.items()), list(state.items())[::-1]):
        found = dict(merged_state(tensors, ALPHA))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
    if dtype == torch.bfloat16:  # rounded once
        path = "model.language_model.layers.0.mlp.down_proj"
        W, A, B = (
            state[f"{path}.{end}.weight"].double()
            for end in ("base_layer", "lora_A.default", "lora_B.default")
        )
        assert torch.equal(expected[f"{path}.weight"], (W + ALPHA / RANK * B @ A).float().to(dtype))
    unchanged = list(qwen2_5_vl.own.state_dict().items())
    assert [name for name, _ in merged_state(unchanged, ALPHA)] == [name for name, _ in unchanged]


def test_autocast_trains_adapters_in_their_own_dtype(qwen2_5_vl):
    model = adapted(copy.deepcopy(qwen2_5_vl.own).float())
    wide = rows_and_gradients(PackedVLM(model), few(qwen2_5_vl))
    found = rows_and_gradients(PackedVLM(model, torch.bfloat16), few(qwen2_5_vl))
    rows, wide_rows = found.pop("rows"), wide.pop("rows")
    assert rows.dtype == torch.bfloat16 and {grad.dtype for grad in found.values()} == {torch.float32}
    assert relative_error(rows.float(), wide_rows) < 0.1
    assert found.keys() == wide.keys() == adapter_names(model)
    cosine = [nn.functional.cosine_similarity(found[n].flatten(), wide[n].flatten(), 0).item() for n in wide]
    assert min(cosine) > 0.95


@pytest.mark.parametrize(
    ("targets", "vision", "said"),
    [
        (("q_proj", "lm_head"), 1, "lora.targets names lm_head; the text layers' linear layers are q_proj, "),
        (("embed_tokens", "fc1"), True, "lora.targets names embed_tokens, fc1; "),
        (("input_layernorm",), False, "lora.targets names input_layernorm; "),
        ((), False, "nothing would be trained"),
    ],
)
def test_targets_that_cannot_be_had(qwen2_5_vl, targets, vision, said):
    model = copy.deepcopy(qwen2_5_vl.own)
    with pytest.raises(ValueError, match=said):
        add_lora(model, RANK, ALPHA, 0.0, targets, vision)
    assert all(p.requires_grad for p in model.parameters())


def test_without_peft(qwen2_5_vl, monkeypatch):
    monkeypatch.setattr(geo_r1.models.lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need peft: pip install '\.\[lora\]'"):
        add_lora(qwen2_5_vl.own, RANK, ALPHA, 0.0, TARGETS)
    with adapters_off(qwen2_5_vl.own):
        assert adapter_names(qwen2_5_vl.own) == set()


class Root(nn.Module):
    """Everything that reads sharded weights runs in its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)


def compare_shards(rank, folder):
    """One of two ranks: sharded adapters compute and learn what whole ones do, and step aside."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lab = Lab()
    batch = pack(*few(lab))
    whole, vlm = PackedVLM(adapted(lab.own)), PackedVLM(adapted(lab.own))
    mesh, root = init_device_mesh("cpu", (2,)), Root(vlm.model)
    for layer in (*vlm.model.model.language_model.layers, *vlm.model.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    expected = rows_and_gradients(whole, few(lab))
    for _ in range(2):
        with torch.no_grad(), adapters_off(vlm.model):
            torch.testing.assert_close(root(vlm.loss_rows, batch), lab.packed.loss_rows(batch))
        found = rows_and_gradients(vlm, few(lab), lambda batch: root(vlm.loss_rows, batch))
        torch.testing.assert_close(found.pop("rows"), expected["rows"])
        found = {name: grad.full_tensor() for name, grad in found.items()}
        assert_equal_gradients(found, {name: expected[name] for name in expected if name != "rows"}, 1e-6)
    whole_state = ((name, tensor.full_tensor()) for name, tensor in vlm.model.state_dict().items())
    merge(whole.model)
    for name, tensor in merged_state(whole_state, ALPHA):
        assert torch.equal(tensor, whole.model.state_dict()[name])
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine torch's threads may abort an interpreter that takes its time to end


def test_in_shards(tmp_path):
    torch.multiprocessing.spawn(compare_shards, (str(tmp_path),), nprocs=2)
