"""Small models whose every weight matters, prompts with images, and transformers' own way to run them."""

import copy

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.data import PromptEncoder, Sample
from geo_r1.models import EncodedPrompt, PackedVLM, pack
from geo_r1.models.tiny import build_tiny

TEXTS = ("Which street view shows this tile?", "north, south, east and west of the tower", "<think> </think>")
# Width and height: one merged patch, a partial window, four windows of which three are partial.
SIZES = ((28, 28), (84, 56), (140, 112), (56, 140), (56, 56), (112, 28))


class Lab:
    """A model in float64 to pack, transformers' own copy of it with the same weights, and its prompt encoder.

    Weights are redrawn: with transformers' small ones attention is nearly uniform, and biases are zero.
    """

    def __init__(self, family: str = "qwen2_5_vl", seed: int = 0) -> None:
        model, self.tokenizer, self.image_processor = build_tiny(TEXTS, hidden_size=64, num_layers=3)
        if family == "qwen2_vl":
            model = Qwen2VLForConditionalGeneration(qwen2_vl_config(model.config))
        if family == "qwen3_vl":
            model = Qwen3VLForConditionalGeneration(qwen3_vl_config(model.config))
            self.image_processor = Qwen2VLImageProcessorPil(
                patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}
            )
        self.own = redraw(model.double(), seed)
        self.packed = PackedVLM(copy.deepcopy(self.own))
        self.encoder = PromptEncoder(self.tokenizer, self.image_processor, model.config.image_token_id)

    def prompt(self, *parts: str | tuple[int, int], seed: int = 0, name: str = "s") -> EncodedPrompt:
        """Encode one user message; a part is a text, or the width and height of an image."""
        return self.encoder.encode(sample(*parts, seed=seed, name=name))

    def tokens(self, *lengths: int, seed: int = 0) -> list[list[int]]:
        """Completions of random text tokens."""
        draw = np.random.default_rng(seed)
        return [draw.integers(7, len(self.tokenizer), length).tolist() for length in lengths]

    def own_inputs(self, prompt: EncodedPrompt, completion: list[int] = ()) -> dict[str, Tensor]:
        """What transformers' forward takes for a prompt and a completion; it makes the positions itself."""
        input_ids = torch.tensor([[*prompt.token_ids, *completion]])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        inputs["mm_token_type_ids"] = (input_ids == self.own.config.image_token_id).int()
        if prompt.pixel_values is not None:
            inputs["pixel_values"] = prompt.pixel_values
            inputs["image_grid_thw"] = torch.tensor(prompt.image_grids)
        return inputs

    def own_rows(self, prompt: EncodedPrompt, completion: list[int]) -> Tensor:
        """[length, C] hidden states that predict a completion standing alone behind its own prompt."""
        hidden = self.own.model(**self.own_inputs(prompt, completion), use_cache=False).last_hidden_state[0]
        start = len(prompt.token_ids) - 1
        return hidden[start : start + len(completion)]


def redraw(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights of a size that keeps activations of order one, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data = noise * 1.5 * fan_in**-0.5 + (parameter.ndim == 1) * parameter.detach().clone()
    return model.eval()


def special_tokens(like) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(like, name) for name in names}


def qwen2_vl_config(like) -> Qwen2VLConfig:
    """The older family, whose vision tower has no windows, with the tokens and text layers of `like`."""
    text = like.text_config.to_dict()
    return Qwen2VLConfig(
        text_config={key: value for key, value in text.items() if key not in ("model_type", "layer_types")},
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": text["hidden_size"], "num_heads": 4},
        **special_tokens(like),
        tie_word_embeddings=True,
    )


def qwen3_vl_config(like) -> Qwen3VLConfig:
    """The newer family: interpolated position embeddings, features of two blocks for the text layers."""
    text = like.text_config.to_dict()
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")
    return Qwen3VLConfig(
        text_config={
            **{key: text[key] for key in same},
            "head_dim": 2 * head_dim,  # as in the 2B model, heads are wider than their share
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2, head_dim // 4, head_dim // 4],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1],
        },
        **special_tokens(like),
        tie_word_embeddings=True,
    )


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def sample(*parts: str | tuple[int, int], seed: int = 0, name: str = "s") -> Sample:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    images = [make_image(*p, seed=1000 * seed + i) for i, p in enumerate(parts) if not isinstance(p, str)]
    return Sample(name, ({"role": "user", "content": content},), tuple(images))


def mixed_groups(lab: Lab) -> tuple[list[EncodedPrompt], list[list[list[int]]]]:
    """Prompts of 0, 1 and 6 images with 5, 0, 2 and 1 completions, some of them empty."""
    six = [part for i, size in enumerate(SIZES) for part in (f"view {i}", size)]
    prompts = [
        lab.prompt("Which way is north?", name="text"),
        lab.prompt((84, 56), "What is this?", seed=1, name="silent"),
        lab.prompt(*six, "Which one?", seed=2, name="six"),
        lab.prompt((140, 112), "Where?", seed=3, name="first"),
    ]
    lengths = [(3, 0, 1, 7, 2), (), (5, 1), (4,)]
    return prompts, [lab.tokens(*lengths_, seed=i) for i, lengths_ in enumerate(lengths)]


def few(lab: Lab, longer: int = 0) -> tuple[list[EncodedPrompt], list[list[list[int]]]]:
    """Not many tokens: interpreted kernels and compilers take their time."""
    prompts = [lab.prompt("north?"), lab.prompt((56, 84 + 28 * longer), "where?", seed=1)]
    return prompts, [lab.tokens(2 + longer), lab.tokens(3, 1, seed=1)]


def rows_and_gradients(vlm: PackedVLM, groups, loss_rows=None) -> dict[str, Tensor]:
    """The loss rows of some groups, and all gradients of a fixed random functional of them."""
    rows = (loss_rows or vlm.loss_rows)(pack(*groups, vlm.device))
    return {"rows": rows.detach(), **backward(rows, vlm.model)}


def backward(rows: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the loss rows, which reaches every parameter."""
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (rows * weight.to(rows)).sum().backward()
    return gradients(model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter's gradient, taken away from the model."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient is there, is not zero, and differs by at most `tolerance` of its largest entry."""
    assert got.keys() == expected.keys()
    error = {name: relative_error(got[name], expected[name]) for name in expected}
    worst = max(error, key=error.__getitem__)
    assert error[worst] <= tolerance, f"{worst}: {error[worst]:.1e}"


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype and expected.abs().max() > 0
    return ((got - expected).abs().max() / expected.abs().max()).item()
