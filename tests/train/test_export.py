"""An exported stage is a transformers folder of its own."""

import pytest
import small_runs as runs
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from geo_r1.data import PromptEncoder, World, exemplars
from geo_r1.models import pack
from geo_r1.train.loop import Engine


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_transformers_loads_the_trained_policy(stage, tmp_path, monkeypatch):
    trained = []
    export = Engine.export
    monkeypatch.setattr(
        Engine, "export", lambda self, *args: (trained.append(args[-1].vlm), export(self, *args))
    )
    folder = runs.train(tmp_path / "run", stage) / "models" / stage
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    sample = exemplars.chain_of_thought(World(), "test", 3)
    encoder = PromptEncoder(tokenizer, image_processor, model.config.image_token_id)
    prompt, response = encoder.encode(sample), encoder.encode_response(sample.response)
    policy = trained[-1]
    with torch.no_grad():
        own_RV = policy.loss_rows(pack([prompt], [[response]])) @ policy.lm_head.T
        token_ids = torch.tensor([[*prompt.token_ids, *response]])
        logits_TV = model(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            mm_token_type_ids=(token_ids == model.config.image_token_id).int(),
            pixel_values=prompt.pixel_values,
            image_grid_thw=torch.tensor(prompt.image_grids),
        ).logits[0]
    torch.testing.assert_close(logits_TV[len(prompt.token_ids) - 1 : -1], own_RV, rtol=1e-4, atol=1e-4)
    assert own_RV.std() > 0.01
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(response, skip_special_tokens=True) == sample.response
