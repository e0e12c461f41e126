"""Models without weights have the names, shapes, dtypes and settings of those that have them."""

import copy

import pytest
import torch
from vlm_cases import TEXTS, Lab, few, gradients

from geo_r1.models import PackedVLM, load_model, pack
from geo_r1.models.tiny import build_tiny

META = torch.device("meta")


@pytest.fixture
def folder(lab, tmp_path):
    for piece in (copy.deepcopy(lab.own).float(), lab.tokenizer, lab.image_processor):
        piece.save_pretrained(tmp_path)
    return tmp_path


def described(model):
    """Name, shape and dtype of every parameter and buffer, and which are one and the same."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    first = {}
    return [(name, tuple(x.shape), x.dtype, first.setdefault(id(x), name)) for name, x in tensors]


def filled(empty: PackedVLM, model) -> PackedVLM:
    """Give a model without weights those of another, buffers too."""
    empty.model.load_state_dict(model.state_dict(), assign=True)
    empty.model.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, key = name.rpartition(".")
        setattr(empty.model.get_submodule(owner), key, buffer)
    return empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_without_its_weights(folder, dtype):
    loaded, tokenizer, image_processor = load_model(folder, dtype)
    (folder / "model.safetensors").unlink()
    random = torch.get_rng_state()
    empty, same_tokenizer, same_processor = load_model(folder, dtype, torch.bfloat16, weights=False)
    assert torch.equal(torch.get_rng_state(), random)
    tensors = [*empty.model.parameters(), *empty.model.buffers()]
    assert {x.device for x in tensors} == {META} and empty.device == torch.device("cpu")
    assert described(empty.model) == described(loaded.model)
    assert empty.model.get_input_embeddings().weight is empty.lm_head
    assert (empty.compute_dtype, loaded.compute_dtype) == (torch.bfloat16, dtype)
    assert empty.end_token_ids == loaded.end_token_ids and empty.vision_token_ids == loaded.vision_token_ids
    assert empty.model.training == loaded.model.training == False  # noqa: E712
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert same_processor.to_dict() == image_processor.to_dict()


def test_end_tokens_come_from_the_checkpoints_generation_config(folder):
    loaded, *_ = load_model(folder)
    loaded.model.generation_config.eos_token_id = [2, 7]
    loaded.model.generation_config.save_pretrained(folder)
    assert load_model(folder, weights=False)[0].end_token_ids == [2, 7]
    (folder / "generation_config.json").unlink()
    expected = load_model(folder)[0].end_token_ids
    assert load_model(folder, weights=False)[0].end_token_ids == expected


def test_weights_may_wait_elsewhere(folder):
    vlm, *_ = load_model(folder, device="cuda", weights_on="cpu", liger=False)
    assert vlm.device == torch.device("cuda") and vlm.model.device == torch.device("cpu")


def test_a_skeleton_with_the_weights_is_the_model(lab):
    empty = lab.packed.skeleton()
    assert described(empty.model) == described(lab.packed.model)
    assert {x.device for x in (*empty.model.parameters(), *empty.model.buffers())} == {META}
    assert empty.device == lab.packed.device and empty.compute_dtype == torch.float64
    batch = pack(*few(lab))
    with torch.no_grad():
        assert torch.equal(filled(empty, lab.packed.model).loss_rows(batch), lab.packed.loss_rows(batch))


def test_a_skeleton_of_another_dtype(qwen2_5_vl):
    vlm = PackedVLM(copy.deepcopy(qwen2_5_vl.own).float(), torch.bfloat16)
    narrow = vlm.skeleton(torch.bfloat16)
    assert narrow.model.dtype == narrow.compute_dtype == torch.bfloat16
    assert {x.dtype for x in narrow.model.buffers()} == {torch.float32}
    wide = vlm.skeleton()
    assert (wide.model.dtype, wide.compute_dtype) == (torch.float32, torch.bfloat16)


def test_a_tiny_model_without_weights():
    real, *companions = build_tiny(TEXTS, hidden_size=64, num_layers=1)
    empty, *others = build_tiny(TEXTS, hidden_size=64, num_layers=1, weights=False)
    assert described(empty) == described(real) and empty.device == META
    assert others[0].get_vocab() == companions[0].get_vocab()


PART_OF = {
    "model.visual.patch_embed.proj.weight": "vision",
    "model.visual.blocks.0.attn.qkv.weight": "vision",
    "model.visual.merger.{}.weight": "projector",
    "model.language_model.embed_tokens.weight": "text",
    "model.language_model.layers.0.mlp.up_proj.weight": "text",
    "model.language_model.norm.weight": "text",
}


@pytest.mark.parametrize(
    "parts", [(), ("vision",), ("projector", "text"), ("vision", "projector"), ("text",)]
)
def test_frozen_parts_get_no_gradient_and_the_others_do(lab, parts):
    part_of = {
        **PART_OF,
        **dict.fromkeys([n for n, _ in lab.own.named_parameters() if "deepstack" in n], "projector"),
        **({"model.visual.pos_embed.weight": "vision"} if hasattr(lab.own.model.visual, "pos_embed") else {}),
    }
    inner = "linear_fc1" if hasattr(lab.own.model.visual.merger, "linear_fc1") else "mlp.0"
    vlm = PackedVLM(copy.deepcopy(lab.own))
    vlm.freeze({"vision", "projector", "text"})
    assert not any(p.requires_grad for p in vlm.model.parameters())
    vlm.freeze(parts)
    vlm.loss_rows(pack(*few(lab))).sum().backward()
    found = gradients(vlm.model)
    for name, part in part_of.items():
        assert (name.format(inner) in found) == (part not in parts), name


def test_an_unknown_part_is_an_error(qwen2_5_vl: Lab):
    with pytest.raises(ValueError, match="cannot freeze 'head'; the parts are vision, projector, text"):
        qwen2_5_vl.packed.freeze(["vision", "head"])
    assert all(p.requires_grad for p in qwen2_5_vl.packed.model.parameters())
