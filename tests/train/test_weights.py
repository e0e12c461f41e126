"""How a step's completions are weighed: only those that were scored count."""

from types import SimpleNamespace

import pytest
import torch

from geo_r1.models import EncodedPrompt
from geo_r1.rollout import Completion
from geo_r1.train.config import GRPOConfig
from geo_r1.train.distributed import Ranks
from geo_r1.train.grpo import Scored, _micro_batches


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("max_tokens", [16384, 9])
def test_unscored_completions_do_not_dilute_the_loss(loss_type, max_tokens):
    prompt = EncodedPrompt("p", [1, 2, 3], torch.arange(3).expand(3, -1), [], None, ())
    group = [Completion([5] * length, [0.0] * length, True) for length in (4, 2, 6, 1)]
    valid = torch.tensor([[True, False, True, False]])
    scored = Scored([prompt], [group], torch.tensor([[1.0, 9.0, -1.0, 9.0]]), valid)
    engine = SimpleNamespace(
        ranks=Ranks(0, 1, torch.device("cpu")),
        recipe=SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=8)),
    )
    config = GRPOConfig(steps=1, loss={"type": loss_type}, optim={"max_tokens": max_tokens})
    micro_batches, plan = _micro_batches(engine, config, scored)
    assert len(micro_batches) == (1 if max_tokens > 9 else 3)
    assert plan.repeated_tokens == 3 * (len(micro_batches) - 1)
    weight = torch.cat([micro.weight for micro in micro_batches])
    advantage = torch.cat([micro.advantage for micro in micro_batches])
    assert weight.sum().item() == pytest.approx(1.0)
    assert (weight[advantage == 9.0] == 0).all() and (weight[advantage != 9.0] > 0).all()
