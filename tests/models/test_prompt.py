"""Prompts as the model takes them, against transformers; and checkpoints that come and go whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2_5_VLForConditionalGeneration
from vlm_cases import SIZES, TEXTS, make_image, redraw, relative_error, sample

from geo_r1.data import PromptEncoder, Sample
from geo_r1.data.prompt import expand_images, mrope_positions
from geo_r1.models import PackedVLM, load_model, pack
from geo_r1.models.tiny import SPECIAL_TOKENS, build_tiny

IMAGE = SPECIAL_TOKENS.index("<|image_pad|>")
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encoder(**options) -> PromptEncoder:
    _, tokenizer, image_processor = build_tiny(TEXTS, hidden_size=64, num_layers=1)
    return PromptEncoder(tokenizer, image_processor, IMAGE, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint, saved from a model that was packed before."""
    model, *companions = build_tiny(TEXTS, hidden_size=64, num_layers=2)
    for piece in (PackedVLM(redraw(model.float(), 0).float()).model, *companions):
        piece.save_pretrained(tmp_path)
    return tmp_path


def test_positions_equal_those_of_transformers(qwen2_5_vl, qwen2_vl, qwen3_vl):
    draw = np.random.default_rng(0)
    for trial in range(60):
        token_ids, grids = [], []
        for part in range(draw.integers(0, 7) if trial else 6):
            text = draw.integers(7, 200, draw.integers(0, 4)).tolist()  # none: two images side by side
            token_ids += [*text, 3, IMAGE, 4] if part or trial % 2 else [3, IMAGE, 4]
            grids.append((1, *(2 * draw.integers(1, 8, 2)).tolist()))
        token_ids += draw.integers(7, 200, draw.integers(0 if grids else 1, 5)).tolist()
        if grids and trial % 3 == 0:
            token_ids, grids = [IMAGE, 4, *token_ids, 3, IMAGE], [(1, 2, 14), *grids, (1, 10, 6)]
        expanded, rows = expand_images(token_ids, IMAGE, grids, 2)
        assert rows == [row for row, token in enumerate(expanded) if token == IMAGE]
        assert len(rows) == sum(height * width // 4 for _, height, width in grids)
        assert [t for t in expanded if t != IMAGE] == [t for t in token_ids if t != IMAGE]
        input_ids = torch.tensor([expanded])
        got = mrope_positions(expanded, IMAGE, grids, 2)
        for lab in (qwen2_5_vl, qwen2_vl, qwen3_vl):
            expected, _ = lab.own.model.get_rope_index(
                input_ids, (input_ids == IMAGE).int(), torch.tensor(grids) if grids else None
            )
            assert got.dtype == torch.int64 and torch.equal(got, expected[:, 0]), (trial, grids)
    assert mrope_positions([], IMAGE, [], 2).shape == (3, 0)


def test_adjacent_images_without_markers_keep_their_own_positions():
    tokens, rows = expand_images([IMAGE, IMAGE], IMAGE, [(1, 2, 4), (1, 4, 2)], 2)
    assert tokens == [IMAGE] * 4 and rows == [0, 1, 2, 3]
    expected = [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]
    assert mrope_positions(tokens, IMAGE, [(1, 2, 4), (1, 4, 2)], 2).tolist() == expected


def test_a_prompt_is_its_chat_text_with_every_image_spelled_out(qwen2_5_vl):
    prompt = qwen2_5_vl.prompt("at", *SIZES[:3], "or", SIZES[3], "?", name="here")
    decoded = qwen2_5_vl.tokenizer.decode(prompt.token_ids)
    runs = ["<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (1, 6, 20, 10)]
    assert decoded == USER.format(f"at{''.join(runs[:3])}or{runs[3]}?")
    assert prompt.sample_id == "here"
    assert prompt.image_grids == ((1, 2, 2), (1, 4, 6), (1, 8, 10), (1, 10, 4))
    assert [prompt.token_ids[row] for row in prompt.image_rows] == [IMAGE] * 37
    assert prompt.token_ids.count(IMAGE) == 37
    assert prompt.next_position == prompt.position_ids.max().item() + 1
    text_only = qwen2_5_vl.prompt("north?")
    assert text_only.pixel_values is None and text_only.image_grids == () and text_only.image_rows == []
    assert torch.equal(text_only.position_ids, torch.arange(len(text_only.token_ids)).expand(3, -1))


def test_pixels_equal_the_processor_and_the_formula(qwen2_5_vl):
    prompt = qwen2_5_vl.prompt((84, 56), "and", (56, 140), seed=4)
    images = sample((84, 56), "and", (56, 140), seed=4).images
    expected = qwen2_5_vl.image_processor(list(images), return_tensors="pt")
    assert prompt.image_grids == ((1, 4, 6), (1, 10, 4))
    assert torch.equal(prompt.pixel_values, expected["pixel_values"])

    processor = qwen2_5_vl.image_processor
    for image, rows in zip(images, prompt.pixel_values.split([24, 40]), strict=True):
        pixels = np.asarray(image, dtype=np.float64) / 255
        pixels = (pixels - processor.image_mean) / processor.image_std
        height, width = pixels.shape[0] // 14, pixels.shape[1] // 14
        order = [  # merged patches in reading order, and the four patches of each in reading order
            (2 * y + dy, 2 * x + dx)
            for y in range(height // 2)
            for x in range(width // 2)
            for dy in range(2)
            for dx in range(2)
        ]
        patches = [pixels[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].transpose(2, 0, 1) for y, x in order]
        both_frames = np.stack([np.stack([patch, patch], 1).ravel() for patch in patches])
        np.testing.assert_allclose(rows.numpy(), both_frames, atol=2e-6)


def test_max_pixels_shrinks_images_and_leaves_small_ones():
    shrunk = encoder(max_pixels=4 * 28 * 28).encode(sample((280, 280), (28, 28), (112, 28)))
    assert shrunk.image_grids == ((1, 4, 4), (1, 2, 2), (1, 2, 8))
    assert len(shrunk.pixel_values) == 16 + 4 + 16
    whole = encoder().encode(sample((140, 140)))
    assert whole.image_grids == ((1, 10, 10),)
    # A limit under the processor's smallest size lowers that too.
    assert encoder(max_pixels=500).image_processor.size == {"shortest_edge": 500, "longest_edge": 500}


def test_response_ends_with_the_end_token(qwen2_5_vl):
    response = qwen2_5_vl.encoder.encode_response("north <think>")
    assert qwen2_5_vl.tokenizer.decode(response) == "north <think><|im_end|>"
    assert response[-1] == qwen2_5_vl.tokenizer.eos_token_id == SPECIAL_TOKENS.index("<|im_end|>")
    assert qwen2_5_vl.encoder.encode_response("") == [qwen2_5_vl.tokenizer.eos_token_id]


def test_prompt_over_budget_names_the_sample():
    case = sample("where?", (84, 56), name="row 7")
    length = len(encoder().encode(case).token_ids)
    assert len(encoder(max_prompt_tokens=length).encode(case).token_ids) == length
    with pytest.raises(ValueError, match=f"sample row 7: the prompt has {length} tokens, 6 of them images"):
        encoder(max_prompt_tokens=length - 1).encode(case)


def test_text_with_an_image_token_of_its_own_is_an_error():
    with pytest.raises(ValueError, match="sample odd: 1 images but 2 image tokens"):
        encoder().encode(sample("what is <|image_pad|> in", (28, 28), name="odd"))
    with pytest.raises(ValueError, match="sample odd: 0 images but 1 image tokens"):
        encoder().encode(sample("<|image_pad|>", name="odd"))


def test_broken_images_name_the_sample_and_the_file(tmp_path):
    message = ({"role": "user", "content": [{"type": "image"}]},)
    with pytest.raises(ValueError, match=r"sample a: image .*nowhere\.png does not exist"):
        encoder().encode(Sample("a", message, (tmp_path / "nowhere.png",)))
    jpeg = io.BytesIO()
    make_image(140, 112).save(jpeg, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    for source, name in ((cut, r"cut\.jpg"), (cut.read_bytes(), f"{cut.stat().st_size} bytes")):
        with pytest.raises(ValueError, match=f"sample b: image .*{name}.* cannot be read: .*truncated"):
            encoder().encode(Sample("b", message, (source,)))
    with pytest.raises(ValueError, match=r"sample c: its images cannot be encoded: .*aspect ratio"):
        encoder().encode(Sample("c", message, (Image.new("RGB", (4, 1000)),)))


def test_a_checkpoint_comes_back_as_it_went(folder):
    model, tokenizer, image_processor = build_tiny(TEXTS, hidden_size=64, num_layers=2)
    vlm = PackedVLM(redraw(model, 0).float())
    loaded, loaded_tokenizer, loaded_processor = load_model(folder)
    for text in ("north of the tower?\n", USER.format("  <think> ünï </think>")):
        assert loaded_tokenizer.encode(text) == tokenizer.encode(text)
        assert loaded_tokenizer.decode(tokenizer.encode(text)) == text
    case = sample("here", (84, 56), "and", (140, 112))
    prompts = [
        PromptEncoder(t, i, IMAGE).encode(case)
        for t, i in ((tokenizer, image_processor), (loaded_tokenizer, loaded_processor))
    ]
    assert prompts[1].token_ids == prompts[0].token_ids
    assert torch.equal(prompts[1].pixel_values, prompts[0].pixel_values)
    batch = pack(prompts[:1], [[[9, 10], [11]]])
    assert torch.equal(loaded.loss_rows(batch), vlm.loss_rows(batch))
    assert loaded.lm_head.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    assert loaded.vision_token_ids == [
        SPECIAL_TOKENS.index(f"<|{n}|>") for n in ("image_pad", "video_pad", "vision_start", "vision_end")
    ]
    assert (loaded_tokenizer.eos_token, loaded_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_checkpoint_is_an_ordinary_one_to_transformers(folder):
    own = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    assert own.config._attn_implementation == "sdpa"
    loaded, tokenizer, image_processor = load_model(folder, torch.float64)
    assert loaded.model.dtype == loaded.lm_head.dtype == torch.float64
    prompt = PromptEncoder(tokenizer, image_processor, IMAGE).encode(sample("north of the tower"))
    answer = tokenizer.encode("east")
    hidden = own.model(input_ids=torch.tensor([prompt.token_ids + answer])).last_hidden_state[0]
    rows = loaded.loss_rows(pack([prompt], [[answer]]))
    assert relative_error(rows, hidden[len(prompt.token_ids) - 1 : -1]) < 1e-5  # norms in float32


DAMAGE = {
    "json": (lambda at: (at / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown": (
        lambda at: (at / "config.json").write_text('{"model_type": "strange"}'),
        "it is a strange; supported",
    ),
    "llama": (LlamaConfig().save_pretrained, "it is a llama; supported: qwen2_5_vl, qwen2_vl, qwen3_vl"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut": (lambda at: (at / "model.safetensors").write_bytes(b"short"), "header"),
    "missing": (
        lambda at: edit_weight(at, None),
        "1 weights are missing or of another shape, .*1.mlp.up_proj",
    ),
    "shape": (lambda at: edit_weight(at, 3), "1 weights are missing or of another shape, .*1.mlp.up_proj"),
    "tokenizer": (
        lambda at: [file.unlink() for file in at.glob("tokenizer*")],
        "its tokenizer: it has 1 tokens, but images are 5",
    ),
    "image processor": (lambda at: (at / "preprocessor_config.json").unlink(), "image processor"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"model {folder} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"model .*/nowhere cannot be loaded: there is no such folder"):
        load_model(tmp_path / "nowhere")


def edit_weight(folder: Path, rows: int | None) -> None:
    """Drop a weight, or all but its first rows."""
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    weight = weights.pop(name)
    if rows is not None:
        weights[name] = weight[:rows].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
