"""An exported stage is a transformers folder of its own."""

import option_runs
import pytest
import small_runs as runs
import torch
from transformers import AutoTokenizer

from geo_r1.data import World, exemplars
from geo_r1.models import pack


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
