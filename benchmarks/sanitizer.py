"""The CUDA kernels of csrc/ under NVIDIA's compute-sanitizer: `python3 -m benchmarks.sanitizer RECORD`.

memcheck finds reads and writes out of bounds, racecheck finds races between threads in shared memory. Each
watches `work`: every kernel on small inputs of awkward sizes. Only our kernels are watched; the tests check
their results. Torch's memory cache is off, so that each tensor has its own memory, followed by a margin that
nothing may touch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lines import die_with_parent, read_stage, settled, stage_options, write_line
from geo_r1.kernels import (
    GRPOLossConfig,
    PackedLayout,
    available_impls,
    extension,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    packed_attention,
)

HOMES = ("CUDA_HOME", "CUDA_PATH")
TOOLS = {"memcheck": ("--padding", "256", "--report-api-errors", "no"), "racecheck": ()}
# Only kernels whose mangled name holds our namespace; one finding, since others tend to follow from it.
OPTIONS = ("--kernel-name", "kns=geo_r1", "--print-limit", "1", "--error-exitcode", "1")
REFUSED = "Device not supported"  # its message if, say, a virtual machine keeps it from the GPU
ALL = GRPOLossConfig(beta=0.1, entropy_coef=0.1, delta=2.0, temperature=0.9)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = stage_options(__doc__, argv)
    program = find_program()
    if options.device == "cpu":
        write_line(options.record, skipped="no GPU to run on")
    elif program is None:
        write_line(options.record, skipped="no compute-sanitizer on PATH nor where CUDA is")
    elif (reason := extension.why_not(torch.device("cuda"))) is not None:
        write_line(options.record, skipped=reason)
    else:
        return watch(program, options.record)
    return 0


def find_program() -> str | None:
    """The toolkit's compute-sanitizer."""
    homes = [os.environ[name] for name in HOMES if os.environ.get(name)]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def watch(program: str, record: Path) -> int:
    """Run each tool, and write its line as `recorder.py` does for a test; returns the exit code."""
    target = (sys.executable, "-c", "from benchmarks.sanitizer import work; work('cuda')")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed, before = False, settled(read_stage(record))
    for tool, more in TOOLS.items():
        if tool in before:
            continue
        write_line(record, begun=tool)
        command = [program, "--tool", tool, *OPTIONS, *more, *target]
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=die_with_parent,
        )
        print(done.stdout, flush=True)
        if REFUSED in done.stdout:
            result = {"outcome": "skipped", "reason": f"compute-sanitizer: {REFUSED}"}
        elif done.returncode != 0:
            result = {"outcome": "failed", "reason": finding(done.stdout) or f"exit code {done.returncode}"}
            failed = True
        else:
            result = {"outcome": "passed"}
        write_line(record, test=tool, **result)
    return int(failed)


def finding(said: str) -> str | None:
    """The first line of the tool's report, after the one that names the tool."""
    lines = [line.lstrip("= ") for line in said.splitlines() if line.startswith("=========")]
    return next((line for line in lines if line and line != "COMPUTE-SANITIZER"), None)


def work(device: str) -> None:
    """Every CUDA kernel that runs on a device, forward and backward."""
    available = available_impls()
    for op, run in (("group_advantage", advantages), ("grpo_loss", losses), ("packed_attention", attention)):
        if "cuda" in available[op]:
            torch.manual_seed(0)
            run(torch.device(device))
            print(f"{op} ran", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def advantages(device: torch.device) -> None:
    """Ragged groups: one empty, one of a single member, one wider than a block of 64; members and tokens."""
    lengths = (3, 0, 1, 130)
    num = sum(lengths)
    tokens = [i % 4 for i in range(num)]
    cu_group, cu_completion = (
        torch.tensor([0, *x], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        for x in (lengths, tokens)
    )
    reward, valid = torch.rand(num).to(device), (torch.rand(num) > 0.3).to(device)
    for scale in ("group", "batch"):
        for spread in ({}, {"cu_completion": cu_completion, "num_rows": sum(tokens)}):
            group_advantage(reward, cu_group, valid_N=valid, scale=scale, **spread, impl="cuda")


def losses(device: torch.device) -> None:
    """Rows that are aligned to 16 bytes and rows that are not; over the logits, and beside them."""
    num_rows = 5
    old, ref, advantage, weight = (torch.rand(num_rows).to(device) for _ in range(4))
    given = {"advantage_R": advantage, "token_weight_R": weight, "old_logp_R": old - 8, "ref_logp_R": ref - 8}
    rows = {**given, "config": ALL, "impl": "cuda"}
    for vocab in (1000, 5003):
        target = torch.randint(0, vocab, (num_rows,)).to(device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            hidden, head = (torch.randn(n, 16).to(device, dtype).requires_grad_() for n in (num_rows, vocab))
            logits = (hidden @ head.T).detach().requires_grad_()
            grpo_loss(logits, target, **rows).loss.backward()
            linear_grpo_loss(hidden, head, target, **rows).loss.backward()
            logp, entropy = linear_logprob(hidden, head, target, impl="cuda")
            (logp + entropy).sum().backward()


def attention(device: torch.device) -> None:
    """Text: segments around a tile and its half, one empty, heads that share keys. Images: windows, whole."""
    shared = ((150, 3), ((0, 1, 63, 130), (7,)))
    windows = ((64, 64, 48, 0, 64, 16, 1), None)
    for lengths, heads, head_size, causal, dtype in (
        (shared, (2, 1), 128, True, torch.bfloat16),
        (windows, (2, 2), 80, False, torch.float16),
        (((200, 70), None), (1, 1), 80, False, torch.bfloat16),
    ):
        layout = PackedLayout.from_lengths(*lengths, device)
        q, k, v = (
            torch.randn(layout.num_tokens, n, head_size).to(device, dtype).requires_grad_()
            for n in (heads[0], heads[1], heads[1])
        )
        packed_attention(q, k, v, layout, causal=causal, impl="cuda").sum().backward()


if __name__ == "__main__":
    sys.exit(main())
