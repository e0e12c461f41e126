"""Layers by liger-kernel == transformers' own, and only in the model that was handed over.

Without liger-kernel stand-ins in plain torch take its place, which write over the same tensors.
With it, its kernels run too: on a GPU, or in Triton's interpreter.
"""

import copy
import functools
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import transformers
from torch.autograd import Function
from vlm_cases import assert_equal_gradients, few, mixed_groups, relative_error, rows_and_gradients

import geo_r1.models.qwen_vl
from geo_r1.models import PackedVLM, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter is wrong in bfloat16
LAYERS = ("rms_norm", "rotary", "swiglu", "vision_rotary")


class LigerRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place) == (0.0, "llama", True) and X.shape[-1:] == W.shape
        wide = X.double()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(X, W, rstd)
        return ((wide * rstd) * W).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        X, W, rstd = ctx.saved_tensors
        normed = X.double() * rstd
        dW = (dY * normed).sum(tuple(range(X.ndim - 1))).to(W.dtype)
        m = dY * W
        dX = dY.contiguous()
        dX.data.copy_(rstd * (m - normed * (m * normed).mean(-1, keepdim=True)))
        return dX, dW, None, None, None, None, None


class LigerSiLUMulFunction(Function):
    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        assert a.shape == b.shape and a.dtype == b.dtype
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        gate = a.sigmoid()
        d_gate, d_up = dc * (a * gate * (1 - gate) + gate) * b, dc * a * gate
        a.data.copy_(d_gate)
        b.data.copy_(d_up)
        return a, b, None, None


class LigerRopeFunction(Function):
    @staticmethod
    def rotated(x, cos, sin):
        x = x.transpose(1, 2).contiguous()  # [1, T, heads, D]
        a, b = x.double().chunk(2, -1)
        cos, sin = (angle[:, :, None, : angle.shape[-1] // 2] for angle in (cos, sin))  # halves are equal
        x.data.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        return x.transpose(1, 2)

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        assert q.ndim == k.ndim == 4 and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        ctx.save_for_backward(cos, sin)
        return tuple(LigerRopeFunction.rotated(x, cos, sin) for x in (q, k))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *(LigerRopeFunction.rotated(x, cos, -sin) for x in (dq, dk)), None, None, None, None


STAND_INS = {"rms_norm": LigerRMSNormFunction, "swiglu": LigerSiLUMulFunction, "rope": LigerRopeFunction}
MODULE = "geo_r1.models.liger"


@pytest.fixture
def stand_ins(monkeypatch):
    """geo_r1.models.liger, on functions in plain torch."""
    for name, function in STAND_INS.items():
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]


@pytest.fixture
def kernels(monkeypatch):
    """geo_r1.models.liger, on liger-kernel's own functions."""
    if find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    module = importlib.import_module(MODULE)
    if DEVICE == "cpu":  # the interpreter has no libdevice, and hands numbers over as Python's own
        import liger_kernel.ops.rms_norm
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._implicit_cvt
        monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
        monkeypatch.setattr(
            interpreter, "_implicit_cvt", lambda x: Number(x) if isinstance(x, float) else convert(x)
        )
    return module


class Number(float):
    def to(self, dtype):
        return self


def model_like(lab, dtype=torch.float32):
    return copy.deepcopy(lab.own).to(DEVICE, dtype)


def assert_as_true_as(found, plain, truth):
    """The error against float64 is at most twice that of transformers' own layers in the same dtype."""
    assert found.keys() == plain.keys() <= truth.keys()
    for name, expected in found.items():
        exact = truth[name].to(DEVICE)
        error, usual = ((x.double() - exact).norm() / exact.norm() for x in (expected, plain[name]))
        assert error <= 2 * usual + 1e-6, f"{name}: {error:.1e}, plain torch {usual:.1e}"


@pytest.mark.usefixtures("in_float64")
def test_stand_ins_change_no_row_and_no_gradient(lab, stand_ins):
    expected = rows_and_gradients(lab.packed, mixed_groups(lab))
    vlm = PackedVLM(copy.deepcopy(lab.own))
    assert stand_ins.fuse_layers(vlm.model) == stand_ins.fuse_layers(vlm.model) == LAYERS
    assert_equal_gradients(rows_and_gradients(vlm, mixed_groups(lab)), expected, 1e-12)
    vlm.model.train()
    for kind in ("full", "selective"):  # what is kept is not written over
        vlm.checkpoint_layers(kind)
        assert_equal_gradients(rows_and_gradients(vlm, mixed_groups(lab)), expected, 1e-12)


@pytest.mark.parametrize("compute_dtype", [torch.float32, HALF])
@pytest.mark.parametrize("layers", ["stand_ins", "kernels"])
def test_rows_and_gradients_are_as_true_as_those_of_transformers(lab, layers, compute_dtype, request):
    """Weights in float32, computed in either dtype, with gradient checkpointing."""
    module = request.getfixturevalue(layers)
    plain = PackedVLM(model_like(lab), compute_dtype, liger=False)
    plain_found = rows_and_gradients(plain, few(lab))
    vlm = PackedVLM(model_like(lab), compute_dtype, liger=False)
    assert module.fuse_layers(vlm.model) == LAYERS
    vlm.checkpoint_layers("full")
    vlm.model.train()
    found = rows_and_gradients(vlm, few(lab))
    assert found["rows"].dtype == compute_dtype
    assert {value.dtype for name, value in found.items() if name != "rows"} == {torch.float32}
    assert_as_true_as(found, plain_found, rows_and_gradients(lab.packed, few(lab)))


def test_kernels_without_gradients_and_with_a_frozen_tower(qwen2_5_vl, kernels):
    batch = pack(*few(qwen2_5_vl), DEVICE)
    vlm = PackedVLM(model_like(qwen2_5_vl), liger=False)
    vlm.model.model.visual.requires_grad_(False)
    plain = rows_and_gradients(vlm, few(qwen2_5_vl))
    kernels.fuse_layers(vlm.model)
    with torch.no_grad():
        assert relative_error(vlm.loss_rows(batch), plain["rows"]) < 1e-4
    found = rows_and_gradients(vlm, few(qwen2_5_vl))
    assert not any("visual" in name for name in found)
    assert_equal_gradients(found, plain, 1e-4)


def test_only_the_model_handed_over_changes(qwen2_5_vl, stand_ins):
    fused, other = (copy.deepcopy(qwen2_5_vl.own) for _ in range(2))
    classes = {type(module): type(module).forward for module in other.modules()}
    stand_ins.fuse_layers(fused)
    assert all(cls.forward is forward for cls, forward in classes.items())
    assert not any("forward" in vars(module) for module in other.modules())
    changed = {name: module for name, module in fused.named_modules() if "forward" in vars(module)}
    text, vision = len(fused.model.language_model.layers), len(fused.model.visual.blocks)
    assert len(changed) == 4 * text + 1 + 4 * vision + 1  # norms, SwiGLU and attention, and the last norms
    twin = copy.deepcopy(fused)
    assert all(twin.get_submodule(name).forward.__self__ is twin.get_submodule(name) for name in changed)


def test_another_activation_stays(qwen2_5_vl, stand_ins):
    model = copy.deepcopy(qwen2_5_vl.own)
    for layer in model.model.language_model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    stand_ins.fuse_layers(model)
    assert not any("forward" in vars(layer.mlp) for layer in model.model.language_model.layers)
    assert all("forward" in vars(block.mlp) for block in model.model.visual.blocks)


@pytest.mark.parametrize("part", ["language_model", "visual"])
def test_another_way_to_rotate_stays_and_is_named(qwen2_5_vl, stand_ins, monkeypatch, part):
    """As in transformers 5.16, whose text attention calls another function."""
    monkeypatch.setattr(geo_r1.models.qwen_vl, "find_spec", lambda name: name)
    model = copy.deepcopy(qwen2_5_vl.own).float().to("cpu")
    rotary = "rotary" if part == "language_model" else "vision_rotary"
    monkeypatch.setattr(attention_of(model, part), "forward", lambda self, *args, **options: None)
    vlm = PackedVLM(model, device="cuda")
    assert vlm.fused_layers == tuple(name for name in LAYERS if name != rotary)
    assert vlm.unfused == f"not {rotary}: unknown in transformers {transformers.__version__}"


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("part", ["language_model", "visual"])
def test_decorated_attention_rotates_by_liger(lab, stand_ins, monkeypatch, part):
    """As in transformers 5.24, which accepts an argument by its old name."""
    expected = rows_and_gradients(lab.packed, few(lab))
    model, rotated = copy.deepcopy(lab.own), []
    attention = attention_of(model, part)
    forward, rotate = attention.forward, stand_ins.LigerRopeFunction.apply

    @functools.wraps(forward)
    def decorated(*args, **options):
        return forward(*args, **options)

    def spy(*args):
        rotated.append(1)
        return rotate(*args)

    monkeypatch.setattr(attention, "forward", decorated)
    monkeypatch.setattr(stand_ins.LigerRopeFunction, "apply", spy)
    assert stand_ins.fuse_layers(model) == LAYERS
    assert_equal_gradients(rows_and_gradients(PackedVLM(model), few(lab)), expected, 1e-12)
    assert len(rotated) == len(model.model.language_model.layers) + len(model.model.visual.blocks)


def attention_of(model, part):
    parts = {
        "language_model": lambda text: text.layers[0].self_attn,
        "visual": lambda tower: tower.blocks[0].attn,
    }
    return type(parts[part](getattr(model.model, part)))


def test_a_model_says_who_computes_its_layers(qwen2_5_vl, stand_ins, monkeypatch):
    here = PackedVLM(copy.deepcopy(qwen2_5_vl.own).to("cpu"))
    assert (here.fused_layers, here.unfused) == ((), "the model is on the CPU")
    assert not any("forward" in vars(module) for module in here.model.modules())
    monkeypatch.setattr(PackedVLM, "device", torch.device("cuda"))
    monkeypatch.setattr(geo_r1.models.qwen_vl, "find_spec", lambda name: None)
    model = copy.deepcopy(qwen2_5_vl.own)
    assert PackedVLM(model).unfused == "it does not compute in torch.float64"
    model.float()
    assert PackedVLM(model, liger=False).unfused == "it is turned off"
    assert PackedVLM(model).unfused == "liger-kernel is not installed"
    monkeypatch.setattr(geo_r1.models.qwen_vl, "find_spec", lambda name: name)
    there = PackedVLM(model, torch.bfloat16)
    assert (there.fused_layers, there.unfused) == (LAYERS, "")


def test_a_model_that_is_going_to_a_gpu_is_fused_before(lab, stand_ins, monkeypatch):
    monkeypatch.setattr(geo_r1.models.qwen_vl, "find_spec", lambda name: name)
    model = copy.deepcopy(lab.own).float().to("cpu")
    vlm = PackedVLM(model, device="cuda")
    assert vlm.fused_layers == LAYERS and vlm.device == torch.device("cuda")
    assert vlm.skeleton().fused_layers == LAYERS
    assert vlm.skeleton(device="cpu").unfused == "the model is on the CPU"
    assert PackedVLM(model, liger=False, device="cuda").skeleton().unfused == "it is turned off"
