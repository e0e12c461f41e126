"""Decoding by CUDA graphs says what decoding without them says."""

import copy

import pytest
import torch
from native_sampling import sample_natively
from vlm_cases import Lab

from geo_r1.models import PackedVLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}])
def test_graphs_say_the_same(sampling):
    lab = Lab()
    vlm = PackedVLM(copy.deepcopy(lab.own).float().cuda())
    prompts = [lab.prompt((84, 56), "north " * (i % 3 + 1), seed=i) for i in range(6)]

    def said(cuda_graphs: bool, max_tokens: int = 65536) -> list[list[list[int]]]:
        options = {"max_new_tokens": 24, "max_tokens": max_tokens, "cuda_graphs": cuda_graphs} | sampling
        groups = sample_natively(vlm, prompts, 4, "3", range(60, 90), **options)
        return [[completion.token_ids for completion in group] for group in groups]

    expected = said(False)
    assert said(True) == expected
    longest = max(len(prompt.token_ids) for prompt in prompts)
    assert said(True, 2 * longest + 5 * 24) == expected
