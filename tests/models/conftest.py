"""transformers kept in float64, and the model families."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from vlm_cases import Lab


@pytest.fixture
def in_float64(monkeypatch):
    """Lift the casts to float32 in norms, rotary embeddings and (`.float()`) everywhere else to float64."""

    def rms_norm(self, hidden):
        return (
            self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for norm in (Qwen2_5_VLRMSNorm, Qwen2VLRMSNorm, Qwen3VLTextRMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm)


@pytest.fixture(scope="module")
def qwen2_5_vl() -> Lab:
    return Lab("qwen2_5_vl")


@pytest.fixture(scope="module")
def qwen2_vl() -> Lab:
    return Lab("qwen2_vl")


@pytest.fixture(scope="module")
def qwen3_vl() -> Lab:
    return Lab("qwen3_vl")


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def lab(request) -> Lab:
    return request.getfixturevalue(request.param)
