"""Parameters and operations from a config, against models that transformers builds and runs."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    vision_utils,
)

from geo_r1.models.cost import ModelCost

FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
TEXT = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}  # fmt: skip
BLOCKS = {"depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "out_hidden_size": 48}
VISION = {
    "qwen2_vl": {"depth": 3, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 3, "num_heads": 4},
    # windows of two merged patches
    "qwen2_5_vl": {**BLOCKS, "window_size": 56, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**BLOCKS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
}
IMAGE = 200
# One merged patch, whole windows, windows cut off on both sides.
GRIDS = ((1, 2, 2), (1, 8, 4), (1, 6, 10))
# The real ones' shapes, and how many parameters their model cards and indices give them.
PUBLISHED = {
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        8_292_166_656,
    ),
    "Qwen2-VL-2B": (
        "qwen2_vl",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        {"hidden_size": 1536},
        2_208_985_600,
    ),
}  # fmt: skip


def small(family: str, tied: bool = False, **text):
    config_class, _ = FAMILIES[family]
    head = {"head_dim": 12} if family == "qwen3_vl" else {}
    return config_class(
        text_config=TEXT | head | text,
        vision_config=VISION[family],
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
        tie_word_embeddings=tied,
    )


def build(config, device: str):
    with torch.device(device):
        return FAMILIES[config.model_type][1](config)


def parts_of(model) -> dict[str, int]:
    counts = dict.fromkeys(("vision", "projector", "embeddings", "text_layers", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        if "visual" in name:
            part = "projector" if "merger" in name else "vision"
        elif "norm" in name:
            part = "norms"
        elif "layers." in name:
            part = "text_layers"
        else:
            part = "head" if "lm_head" in name else "embeddings"
        counts[part] += parameter.numel()
    return counts


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("tied", [False, True])
def test_counts_every_parameter(family, tied):
    config = small(family, tied)
    cost = ModelCost.of(config)
    assert cost.parameters == parts_of(build(config, "meta"))
    assert (cost.parameters["head"] == 0) == tied


def test_counts_what_only_one_family_has():
    wide = small("qwen3_vl", head_dim=20, attention_bias=True)  # heads wider than the hidden state
    assert ModelCost.of(wide).parameters == parts_of(build(wide, "meta"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_published_models(name):
    family, text, vision, parameters = PUBLISHED[name]
    config = FAMILIES[family][0](text_config=text, vision_config=vision)
    cost = ModelCost.of(config)
    assert cost.num_parameters == parameters
    assert cost.parameters == parts_of(build(config, "meta"))


def test_other_families_are_named():
    config = copy.copy(small("qwen2_vl"))
    config.model_type = "llava"
    with pytest.raises(ValueError, match="cannot count a llava; supported: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        ModelCost.of(config)


def visible_pairs(prompt: int, completions: tuple[int, ...]) -> int:
    """Counted from the mask: j <= i, and j in the prompt or in i's own completion."""
    owner = torch.tensor([-1] * prompt + [n for n, length in enumerate(completions) for _ in range(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return int((causal & ((owner == -1) | (owner == owner[:, None]))).sum())


def vision_pairs(config, grids) -> tuple[int, int]:
    """Pairs of (whole images, windows) from transformers' own boundaries."""
    grid, vision = torch.tensor(grids), config.vision_config
    whole = vision_utils.get_vision_cu_seqlens(grid).diff().square().sum()
    _, cu = vision_utils.get_vision_window_index(grid, vision.spatial_merge_size, 56, vision.patch_size)
    return int(whole), int(cu.diff().square().sum())


def patches_of(grids) -> int:
    return sum(t * h * w for t, h, w in grids)


PRODUCTS = ("mm", "addmm", "convolution", "convolution_backward")


class Measured:
    """Operations of the matrix products (attention's aside) of transformers' own pass over one prompt."""

    def __init__(self, family: str, frozen: tuple[str, ...] = ()) -> None:
        self.config = small(family)
        model = build(self.config, "cpu")
        for name, parameter in model.named_parameters():
            vision = "projector" if "merger" in name else "vision"
            parameter.requires_grad_((vision if "visual" in name else "text") not in frozen)
        vision = self.config.vision_config
        self.patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = [IMAGE] * (patches_of(GRIDS) // 4)
        self.own = 5
        tokens = torch.tensor([[1, *images[:1], 2, *images[1:9], 3, *images[9:], 4, 5, 6, 7, 8, 9]])
        self.prompt = tokens.shape[1] - self.own
        forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with both:
            with forward:
                hidden = model.model(
                    input_ids=tokens,
                    mm_token_type_ids=(tokens == IMAGE).int(),
                    pixel_values=torch.randn(patches_of(GRIDS), self.patch),
                    image_grid_thw=torch.tensor(GRIDS),
                    use_cache=False,
                ).last_hidden_state
                logits = hidden[0, -self.own :] @ model.lm_head.weight.T
            logits.sum().backward()
        self.forward, self.both = self._products(forward), self._products(both)

    @staticmethod
    def _products(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if str(op).split(".")[-1] in PRODUCTS)

    @property
    def embedding(self) -> int:
        """Forward operations of the patch embedding, which has no gradient of its input."""
        return 2 * patches_of(GRIDS) * self.patch * 32


def attention_flops(config, prompt: int, completions: tuple[int, ...], grids) -> dict[str, int]:
    """4 H D a pair, by part, with every number written out from the small shapes above."""
    whole, windows = vision_pairs(config, grids) if grids else (0, 0)
    vision = whole + 2 * windows if config.model_type == "qwen2_5_vl" else 3 * whole
    return {"vision": 4 * 32 * vision, "text": 4 * 48 * 3 * visible_pairs(prompt, completions)}


def test_forward_is_what_transformers_computes(family):
    measured = Measured(family)
    cost = ModelCost.of(measured.config)
    attention = attention_flops(measured.config, measured.prompt, (measured.own,), GRIDS)
    got = cost.flops(measured.prompt, (measured.own,), GRIDS)
    assert got == measured.forward + sum(attention.values())
    head = 2 * measured.own * 48 * 211
    assert cost.flops(measured.prompt, (measured.own,), GRIDS, head=False) == got - head


@pytest.mark.parametrize(
    "frozen", [(), ("vision",), ("vision", "projector"), ("text",), ("projector", "text"), ("projector",)]
)
def test_backward_is_what_transformers_computes(family, frozen):
    measured = Measured(family, frozen)
    cost = ModelCost.of(measured.config)
    attention = attention_flops(measured.config, measured.prompt, (measured.own,), GRIDS)
    seen = 3 * attention["text"] + (1 if "vision" in frozen else 3) * attention["vision"]
    # counted here, skipped there: the gradient of the pixels
    pixels = 0 if "vision" in frozen else measured.embedding
    got = cost.flops(measured.prompt, (measured.own,), GRIDS, backward=True, frozen=frozen)
    assert got == measured.both + pixels + seen


def test_completions_share_their_prompt(family):
    config = small(family)
    cost = ModelCost.of(config)
    prompt, lengths = 37, (5, 0, 11)
    shared = cost.flops(prompt, lengths, GRIDS)
    alone = [cost.flops(prompt, (n,), GRIDS) for n in lengths]
    # a repeated prompt is the whole difference
    assert shared == sum(alone) - 2 * cost.flops(prompt, (), GRIDS)
    alone = [cost.flops(prompt, (n,), GRIDS, backward=True) for n in lengths]
    repeated = 2 * cost.flops(prompt, (), GRIDS, backward=True)
    assert cost.flops(prompt, lengths, GRIDS, backward=True) == sum(alone) - repeated
    attention = attention_flops(config, prompt, lengths, GRIDS)["text"]
    layers = ModelCost.of(small(family)).parameters["text_layers"]
    biases = 3 * (48 + 2 * 24) if family != "qwen3_vl" else 0
    text = 2 * (layers - biases) * (prompt + 16) + 2 * 48 * 211 * 16 + attention
    assert cost.flops(prompt, lengths) == text


def test_frames_see_their_own_frame(family):
    cost = ModelCost.of(small(family))
    assert cost.flops(0, (), ((3, 6, 4),)) == cost.flops(0, (), ((1, 6, 4),) * 3)
    assert cost.flops(0) == 0.0


def test_unknown_part_is_named(family):
    with pytest.raises(ValueError, match="frozen: there is no part 'head'; parts are vision, projector"):
        ModelCost.of(small(family)).flops(3, (1,), frozen=("head",))
