"""What only a GPU can show, each suspect with a test of its own; on a CPU the tests rehearse.

The CUDA kernels' asynchronous copies are also watched by `sanitizer.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.check_ops import CHECKS, leaves, names
from benchmarks.measure import DTYPE, ON_GPU, relative_errors
from benchmarks.records import ROOT
from geo_r1.kernels import PackedLayout, available_impls, packed_attention

SLEEP_CYCLES = 200_000_000  # a tenth of a second at 2 GHz
REPEATS = 20


@pytest.mark.parametrize("impl", names("packed_attention"))
def test_layout_tables_made_on_another_stream(impl, device):
    """A layout keeps the tables that its first call makes; a second stream must wait for them.

    The first call waits behind a sleep, in memory that holds zeros: tables of zeros are empty tiles, so that
    reading them too early gives wrong numbers and no illegal address.
    """
    lengths = ((700, 300), ((200, 100, 50), (150,))) if ON_GPU else ((7, 3), ((2, 1), (3,)))
    layout, shared = (PackedLayout.from_lengths(*lengths, device) for _ in range(2))
    q, k, v = leaves(1, DTYPE, *((layout.num_tokens, n, 64) for n in (4, 2, 2)))
    with torch.no_grad():
        expected = packed_attention(q, k, v, layout, impl=impl)  # compiles, too
        if ON_GPU:
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                scraps = [torch.zeros(2**17, dtype=torch.int32, device=device) for _ in range(16)]
                del scraps
                torch.cuda._sleep(SLEEP_CYCLES)
                first = packed_attention(q, k, v, shared, impl=impl)
        else:
            first = packed_attention(q, k, v, shared, impl=impl)
        poison = torch.full_like(q, torch.nan)
        del poison
        at_once = packed_attention(q, k, v, shared, impl=impl)
        if ON_GPU:
            torch.cuda.synchronize()
    assert torch.equal(first, expected), "the stream that made the tables reads others"
    assert torch.equal(at_once, expected), "another stream reads the tables before they are made"


@pytest.mark.parametrize("rows", [128, 2560, 2816] if ON_GPU else [16])
def test_dhidden_sums_partial_products_in_full_precision(rows, device, record_property):
    """A product of few tiles may be cut along V, with partial sums that torch lets cuBLAS round."""
    vocab, hidden = (152064, 3584) if ON_GPU else (5003, 64)
    g = torch.Generator(device).manual_seed(0)
    shapes = (rows, vocab), (vocab, hidden)
    d_logits, head = (torch.randn(s, generator=g, device=device, dtype=DTYPE) for s in shapes)
    expected = d_logits.double() @ head.double()
    matmul, errors = torch.backends.cuda.matmul, {}
    kept = matmul.allow_bf16_reduced_precision_reduction
    try:
        for reduced in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = reduced
            (errors[f"reduced={reduced}"],) = relative_errors([d_logits @ head], [expected])
    finally:
        matmul.allow_bf16_reduced_precision_reduction = kept
    record_property("found", errors)
    assert errors["reduced=True"] <= 1.1 * errors["reduced=False"], errors


def test_every_kernel_passes_the_gate_of_this_triton(tmp_path, record_property):
    """Spills depend on the ptxas of Triton's release. A rehearsal builds the smallest family."""
    report = tmp_path / "gate.json"
    command = [sys.executable, "-m", "geo_r1.kernels.aot", "--arch", "90", "--json", str(report)]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *(() if ON_GPU else ("advantage",))],
        cwd=ROOT,
        env=compiled,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stderr[-2000:]
    gate = json.loads(report.read_text())
    record_property("found", {"triton": gate["triton"], "faults": gate["faults"]})
    assert not gate["faults"], f"{len(gate['faults'])} faults: {gate['faults'][0]}"


@pytest.mark.parametrize(("op", "case"), CHECKS)
def test_cuda_kernels_repeat_every_bit(op, case, device):
    """Beside products on another stream, which change when copies arrive."""
    if not ON_GPU or "cuda" not in available_impls()[op]:
        pytest.skip("the CUDA kernels do not run here")
    busy = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    other, first = torch.cuda.Stream(), None
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            busy @ busy
        results = CHECKS[op, case](torch.bfloat16, "cuda")
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))
