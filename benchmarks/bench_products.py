"""The bare product of a chunk's dlogits and the head, at the numbers of rows that a chunk may have.

Operations: 2 R C V. Sums of V products end in waves of tiles, so the rate depends on how many rows there are;
`linear_grpo_loss` chooses its chunks by it. The floor has no truth: `check_suspects.py` looks at its error.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.losses import LossSize
from benchmarks.measure import DTYPE, ON_GPU, Case, floor

if ON_GPU:
    SIZES = [LossSize(rows, 3584, 152064) for rows in (2560, 2816, 3584, 4096, 8192)]
else:
    SIZES = [LossSize(rows, 64, 5003) for rows in (40, 44, 56, 64, 128)]


def product_case(size: LossSize, device: torch.device) -> Case:
    g = torch.Generator(device).manual_seed(0)
    d_logits_RV, head_VC = (
        torch.randn(*shape, generator=g, device=device, dtype=DTYPE)
        for shape in ((size.rows, size.vocab), (size.vocab, size.hidden))
    )
    d_hidden_RC = d_logits_RV.new_empty(size.rows, size.hidden)
    matrices = (d_logits_RV, head_VC, d_hidden_RC)
    return Case(
        "dhidden product",
        str(size),
        DTYPE,
        0.0,
        {"bare product": floor(lambda: (torch.mm(d_logits_RV, head_VC, out=d_hidden_RC),))},
        truth=None,
        flops=2.0 * size.rows * size.hidden * size.vocab,
        bytes=float(sum(x.nbytes for x in matrices)),
    )


@pytest.mark.parametrize("provider", ["bare product"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dhidden_product(measure, size, provider):
    measure(product_case, size)
