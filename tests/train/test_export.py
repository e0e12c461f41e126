"""An exported stage is a transformers folder of its own: whole, finite, and as its base was published."""

import json
import re
import subprocess
import sys
from pathlib import Path

import option_runs
import pytest
import small_runs as runs
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from geo_r1.data import World, exemplars
from geo_r1.models import load_model, pack
from geo_r1.train.__main__ import main
from geo_r1.train.state.export import export_model

sys.path.append(str(Path(__file__).parent.parent / "models"))
from vlm_cases import qwen2_vl_config, qwen3_vl_config


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_transformers_loads_the_trained_policy(stage, tmp_path, monkeypatch):
    policies = option_runs.watch_exports(monkeypatch)
    folder = runs.train(tmp_path / "run", stage) / "models" / stage
    sample = exemplars.chain_of_thought(World(), "test", 3)
    prompt, response, logits_RV = option_runs.as_transformers_reads(folder, sample)
    policy = policies[-1].vlm
    with torch.no_grad():
        own_RV = policy.loss_rows(pack([prompt], [[response]])) @ policy.lm_head.T
    torch.testing.assert_close(logits_RV, own_RV, rtol=1e-4, atol=1e-4)
    assert own_RV.std() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(response, skip_special_tokens=True) == sample.response


FAMILIES = {
    "qwen2_vl": (qwen2_vl_config, Qwen2VLForConditionalGeneration),
    "qwen3_vl": (qwen3_vl_config, Qwen3VLForConditionalGeneration),
}


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", *FAMILIES])
def test_every_family_opens_in_transformers(family, dtype, lora, tiny_model, tmp_path):
    vlm, tokenizer, image_processor = load_model(tiny_model)
    model, base = vlm.model, tmp_path / "base"
    if family in FAMILIES:
        config, kind = FAMILIES[family]
        model = kind(config(model.config))
        patch = model.config.vision_config.patch_size
        image_processor.patch_size = patch
        image_processor.size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(base)
    changes = {"model__path": base, "model__export_dtype": dtype, "lora__rank": lora, "sft__steps": 1}
    folder = runs.train(tmp_path / "run", "sft", **changes) / "models" / "sft"
    sample = exemplars.chain_of_thought(World(), "test", 3)
    prompt, response, logits_RV = option_runs.as_transformers_reads(folder, sample)
    found = load_model(folder, getattr(torch, dtype))[0]
    with torch.no_grad():
        own_RV = found.loss_rows(pack([prompt], [[response]])) @ found.lm_head.T
    limit = {"bfloat16": 0.05, "float32": 1e-4}[dtype]
    assert logits_RV.dtype == getattr(torch, dtype)
    assert (logits_RV.float() - own_RV.float()).abs().max() < limit * logits_RV.float().abs().max()


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    """The base model as others publish theirs: in bfloat16, with a generation config that cannot be saved."""
    folder = tmp_path_factory.mktemp("published") / "base"
    vlm, tokenizer, image_processor = load_model(tiny_model, torch.bfloat16)
    for part in (vlm.model, tokenizer, image_processor):
        part.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 1e-06}')
    (folder / "video_preprocessor_config.json").write_text('{"max_frames": 7}')
    return folder


EXPORTS = {
    "as the base": ({}, torch.bfloat16),
    "float32": ({"model__export_dtype": "float32"}, torch.float32),
    "adapters": ({"lora__rank": 2}, torch.bfloat16),
    "adapters, float32": ({"lora__rank": 2, "model__export_dtype": "float32"}, torch.float32),
    "fsdp2": ({"parallel__strategy": "fsdp2"}, torch.bfloat16),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_published_as_its_base_was(kind, published, tmp_path, monkeypatch):
    changes, dtype = EXPORTS[kind]
    policies = option_runs.watch_exports(monkeypatch)
    changes = {"sft__steps": 2, "data__max_pixels": 3000, "model__path": published} | changes
    folder = runs.train(tmp_path / "run", "sft", **changes) / "models" / "sft"
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    if "lora__rank" not in changes and "parallel__strategy" not in changes:
        own = dict(policies[-1].vlm.model.named_parameters())
        found = dict(load_model(folder, dtype)[0].model.named_parameters())
        assert all(torch.equal(found[name], p.to(dtype)) for name, p in own.items())
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.do_sample, generation.temperature) == (False, 1e-6)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((published / name).read_text())


def test_the_snippet_of_the_model_card_runs(tmp_path):
    folder = runs.train(tmp_path / "run", "sft", sft__steps=1) / "models" / "sft"
    card = (folder / "README.md").read_text()
    assert "sft.batch_size" not in card and "batch_size = 4" in card  # the recipe
    assert re.search(r"^\| loss \| [\d.]+ \|$", card, re.M) and "| time/step |" not in card
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.S)
    Image.new("RGB", (70, 50), "green").save(tmp_path / "photo.jpg")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20


def test_an_export_appears_whole(tmp_path):
    class Piece(torch.nn.Linear):
        generation_config = None

        def save_pretrained(self, folder):
            assert runs.files_under(folder.parent) == {".sft.partial"}
            (folder / "weights").write_text("7")

    stale, folder = tmp_path / "models" / ".sft.partial", tmp_path / "models" / "sft"
    stale.mkdir(parents=True)
    (stale / "half").write_text("")
    export_model(folder, Piece(2, 2), [], str(tmp_path), {"a.txt": "b"})
    assert runs.files_under(folder) == {"weights", "a.txt", "generation_config.json"}
    with pytest.raises(AssertionError, match="there already"):
        export_model(folder, Piece(2, 2), [], str(tmp_path), {})
    assert (folder / "a.txt").read_text() == "b"


def test_weights_that_are_not_finite_are_not_exported_and_cost_no_step(tmp_path, capfd, monkeypatch):
    whole = runs.train(tmp_path / "whole", "sft")
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("geo_r1.train.state.export.torch.isfinite", lambda tensor: torch.zeros(1, dtype=bool))
        assert main(runs.arguments(run_dir, "sft")) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("geo_r1: the model has weights that are not finite, the first is model.")
    assert runs.files_under(run_dir / "checkpoints") >= {"sft-000005"}
    runs.train(run_dir, "sft")
    assert runs.weights(run_dir, "sft") == runs.weights(whole, "sft")


@pytest.mark.parametrize("key", ["sft.optim.lr", "sft.optim.weight_decay", "lora.alpha", "grpo.loss.beta"])
def test_numbers_of_a_recipe_are_finite(key, tmp_path, capfd):
    assert main(runs.arguments(tmp_path / "run", "sft", **{key.replace(".", "__"): "inf"})) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert key in line and "finite" in line
