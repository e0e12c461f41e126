"""What only Qwen3-VL has; the law that holds for all families is in test_packed_law.py."""

import copy
import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_cases import gradients, mixed_groups, sample

from geo_r1.data import PromptEncoder
from geo_r1.models import load_model, pack
from geo_r1.rollout import SamplingConfig, generate

# As in the published checkpoints.
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip


def test_greedy_sampling_equals_transformers_token_by_token(qwen3_vl):
    """Features from inside the tower reach the prompt's image rows at prefill, and no later token."""
    lab = qwen3_vl
    prompts, _ = mixed_groups(lab)
    got = generate(
        lab.packed,
        prompts,
        1,
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=16),
        eos_token_id=-1,
        streams=[str(i) for i in range(len(prompts))],
    )
    said = set()
    for prompt, [completion] in zip(prompts, got, strict=True):
        expected = copy.deepcopy(lab.own).generate(
            **lab.own_inputs(prompt),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=lab.packed.vision_token_ids,
        )
        assert completion.token_ids == expected[0, len(prompt.token_ids) :].tolist()
        said |= set(completion.token_ids)
    assert len(said) > 10


class Rows(TorchDispatchMode):
    """Notes the operators that find rows by a mask, whose number the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.waits, self.added = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        indices = args[1] if op.name().startswith(("aten::index.", "aten::index_put")) else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or op.name().startswith(("aten::nonzero", "aten::masked_select", "aten::masked_scatter")):
            self.waits.append(op.name())
        self.added += op.name() == "aten::index_add"
        return op(*args, **(kwargs or {}))


def test_no_mask_is_searched_for_image_rows(qwen3_vl):
    batch = pack(*mixed_groups(qwen3_vl))
    with Rows() as seen, torch.no_grad():
        qwen3_vl.packed.loss_rows(batch)
    assert seen.waits == [] and seen.added == 2  # behind the first two text layers
    with Rows() as seen:
        qwen3_vl.packed.loss_rows(batch).sum().backward()
    assert seen.waits == []
    gradients(qwen3_vl.packed.model)


def test_a_checkpoint_comes_back_with_its_own_preprocessing(qwen3_vl, tmp_path):
    model = copy.deepcopy(qwen3_vl.own).float()
    for piece in (model, qwen3_vl.tokenizer):
        piece.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    vlm, tokenizer, image_processor = load_model(tmp_path)
    assert vlm.model.config.model_type == "qwen3_vl" and vlm.device == torch.device("cpu")
    encoder = PromptEncoder(tokenizer, image_processor, vlm.model.config.image_token_id)
    [tile, view] = [encoder.encode(sample(size, "here")) for size in ((320, 288), (64, 64))]
    assert tile.image_grids == ((1, 18, 20),) and len(tile.image_rows) == 9 * 10
    assert view.image_grids == ((1, 16, 16),)  # never under 256 x 256 pixels
    pixel = sample((320, 288), "here").images[0].getpixel((0, 0))
    first = tile.pixel_values[0].unflatten(0, (3, 2, 16, 16))[:, 0, 0, 0]
    torch.testing.assert_close(first, torch.tensor(pixel) / 127.5 - 1)
    batch = pack([tile], [[[9, 10], [11]]])
    with torch.no_grad():
        rows, expected = vlm.loss_rows(batch), qwen3_vl.packed.loss_rows(batch)
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=1e-4)
