"""Input for vLLM is whole, and mistakes in it are named; these tests need no vLLM."""

import json

import pytest
import torch
from engine_lab import END
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vlm_cases import Lab as Family
from vlm_cases import sample

from geo_r1.data import PromptEncoder
from geo_r1.rollout import Completion, SamplingConfig
from geo_r1.rollout.vllm.requests import (
    FORBIDDEN,
    read_completions,
    sampling_params,
    seed_of,
    write_engine_folder,
)
from geo_r1.rollout.vllm.weights import CheckedWeights, expected_weights


def test_a_folder_holds_all_but_weights_and_is_replaced_whole(lab):
    (lab.folder / "model.safetensors").write_bytes(b"old")
    write_engine_folder(lab.folder, lab.vlm.model.config, lab.tokenizer, lab.image_processor)
    names = {path.name for path in lab.folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
    assert "chat_template.jinja" in names and "model.safetensors" not in names
    assert [path.name for path in lab.folder.parent.iterdir()] == [lab.folder.name]
    config = json.loads((lab.folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert json.loads((lab.folder / "generation_config.json").read_text())["eos_token_id"] == END
    text = "Which way is north?"
    assert AutoTokenizer.from_pretrained(lab.folder).encode(text) == lab.tokenizer.encode(text)
    assert lab.vlm.model.config.architectures is None  # what was written was a copy


@pytest.mark.parametrize("max_pixels", [28 * 28, 28 * 28 * 9, 28 * 28 * 64])
def test_no_image_that_the_encoder_makes_is_over_the_folders_limits(lab, tmp_path, max_pixels):
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": max_pixels}
    processor = Qwen2VLImageProcessorPil(patch_size=14, size=size)
    encoder = PromptEncoder(
        lab.tokenizer, processor, lab.vlm.model.config.image_token_id, max_pixels, keep_images=True
    )
    write_engine_folder(tmp_path / "model", lab.vlm.model.config, lab.tokenizer, processor)
    limits = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "model").size
    assert limits["shortest_edge"] == 28 * 28
    for shape in ((1, 200), (30, 6000), (29, 29), (300, 31), (700, 500), (5, 1000)):
        [pixels] = encoder.encode(sample(shape)).images
        assert 28 * 28 <= pixels.shape[0] * pixels.shape[1] <= limits["longest_edge"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_expected_weights_are_those_of_the_policy(family):
    model = Family(family).own
    expected = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert expected_weights(model.config) == expected


def test_weights_that_fit_pass_and_the_others_are_named():
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([])}
    tensors = [("a", torch.ones(2)), ("d", torch.ones(1)), ("b", torch.ones(2)), ("a", torch.zeros(2))]
    weights = CheckedWeights(tensors, expected)
    assert [(name, tensor.tolist()) for name, tensor in weights] == [("a", [1.0, 1.0])]
    named = r"4 weights .*: d is no weight of this model; b has shape \[2\], not \[3\]; a came twice"
    with pytest.raises(ValueError, match=named):
        weights.check()
    whole = CheckedWeights({name: torch.zeros(shape) for name, shape in expected.items()}.items(), expected)
    assert len(list(whole)) == 3
    whole.check()


def test_a_request_says_all_that_matters():
    fields = sampling_params(SamplingConfig(0.7, 0.9, 20, 64), 8, "7/5", {7, END}, [4, 3])
    assert fields["n"] == 8 and fields["seed"] == seed_of("7/5") and fields["max_tokens"] == 64
    assert (fields["temperature"], fields["top_p"], fields["top_k"]) == (0.7, 0.9, 20)
    assert fields["stop_token_ids"] == [END, 7] and fields["ignore_eos"]
    assert fields["logit_bias"] == {3: FORBIDDEN, 4: FORBIDDEN}
    assert json.loads(json.dumps(fields))["logit_bias"] == {"3": FORBIDDEN, "4": FORBIDDEN}
    assert sampling_params(SamplingConfig(0.0), 8, "7/5", [END], [])["n"] == 1
    for temperature in (0.001, 2.1):
        with pytest.raises(ValueError, match=rf"0 or 0\.01 to 2\.0, not {temperature}"):
            sampling_params(SamplingConfig(temperature), 8, "7/5", [END], [])


def test_seeds_leave_room_for_the_completions_index():
    seeds = {seed_of(f"7/{index}") for index in range(1000)}
    assert len(seeds) == len({seed % 2**32 for seed in seeds}) == 1000
    assert max(seeds) < 2**62 and max(seeds) > 2**61
    assert seed_of("7/0") == seed_of("7/0")


def test_completions_are_read_and_judged():
    warm, greedy = SamplingConfig(), SamplingConfig(0.0)
    said = [([5, END], [-1.0, -0.5], "stop"), ([5, 6], [-1.0, -2.0], "length")]
    expected = [Completion([5, END], [-1.0, -0.5], True), Completion([5, 6], [-1.0, -2.0], False)]
    assert read_completions(said, 2, warm, [3]) == expected
    assert read_completions(said[:1], 3, greedy, [3]) == [Completion([5, END], [0.0, 0.0], True)] * 3
    for wrong in ([([5, 3], [-1.0, -0.5], "stop")], [([5], [-1.0], "abort")], [([], [], "stop")], []):
        with pytest.raises(AssertionError):
            read_completions(wrong, 1, warm, [3])
