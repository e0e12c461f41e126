"""Tries other launch rows of the Triton kernels on this GPU: `python3 -m benchmarks.sweep RECORD`.

For each row of the launch tables that a piece of work chooses, its neighbours are tried: one value halved or
doubled, a stage more or fewer. A trial stands in for the row (`Launch.replaced`), is compared with the row's
own result, and is timed. Other processes compile the next trials into Triton's cache meanwhile. A trial that
fails or is wrong is a line too; `gpu.py` names the fastest of each row, in the words of the tables.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from benchmarks.bench_attention import SIZES, AttentionSize, Inputs, with_gradients
from benchmarks.device import median_ms
from benchmarks.lines import LOST, die_with_parent, read_stage, settled, stage_options, write_line
from benchmarks.losses import CONFIG, LossSize, gradients, loss_inputs
from benchmarks.measure import DTYPE, ON_GPU, device_lost, for_json, relative_errors
from geo_r1.kernels import PackedLayout, available_impls, grpo_loss, linear_logprob, packed_attention
from geo_r1.kernels.launch import Launch

TOLERANCE = 2e-2  # of bfloat16 results, against those of the table's own row
MOST_WARPS, LEAST_BLOCK = 16, 16
TIMED_MS = 50  # of repetitions for each trial
Work = Callable[[], Sequence[Tensor]]
Trial = tuple[str, str, dict[str, int]]  # the work, the row's name, the options that differ


def losses(num_rows: int) -> Work:
    inputs = loss_inputs(LossSize(num_rows, 64, 152064 if ON_GPU else 1003), DTYPE, device())
    logits = (inputs.hidden_RC @ inputs.head_VC.T).detach().requires_grad_()
    finish = gradients(logits)
    return lambda: finish(grpo_loss(logits, **inputs.rows(), config=CONFIG, impl="triton").loss)


def logprobs(num_rows: int) -> Work:
    inputs = loss_inputs(LossSize(num_rows, 64, 152064 if ON_GPU else 1003), DTYPE, device())
    hidden, head = inputs.hidden_RC.detach(), inputs.head_VC.detach()
    return lambda: linear_logprob(hidden, head, inputs.target_R, impl="triton")


def attention(size: AttentionSize, _: int) -> Work:
    inputs = Inputs(size, device())
    q, k, v, _ = inputs.packed

    def attend() -> Tensor:  # other rows may need other tiles, which a layout keeps
        layout = PackedLayout.from_lengths(size.prompts, size.completions, device())
        return packed_attention(q, k, v, layout, causal=size.causal, impl="triton")

    return with_gradients(attend, inputs.packed)


LOSS_ROWS, FEW_ROWS = 4096 if ON_GPU else 8, 8  # the kernels are the same
TEXT, *VISION = (SIZES[0], *SIZES[3:]) if ON_GPU else (AttentionSize("causal", (9, 3), None, 2, 1, 32),)
# A row that several works choose is tried with the first.
WORKS: dict[str, Callable[[int], Work]] = {
    "log-probabilities": logprobs,
    "loss and gradient": losses,
    **{f"attention, {size}": partial(attention, size) for size in (TEXT, *VISION)},
}


def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@cache
def rows() -> dict[str, Launch]:
    """All rows of the launch tables by name: family, table and key."""
    found = {}
    for family in ("attention", "loss"):
        module = import_module(f"geo_r1.kernels.{family}.triton")
        for name, table in vars(module).items():
            if isinstance(table, dict):
                pairs = ((key, row) for key, row in table.items() if isinstance(row, Launch))
                found |= {f"{family} {name}[{key!r}]": row for key, row in pairs}
    return found


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Yields the rows that are launched within the block."""
    launched: list[Launch] = []
    options = Launch.__dict__["options"].fget

    def noted(self: Launch) -> dict[str, int]:
        launched.append(self)
        return options(self)

    with mock.patch.object(Launch, "options", property(noted)):
        yield launched


def neighbours(row: Launch) -> list[dict[str, int]]:
    """Options to try in place of a row's: none (the row itself), one changed, a block with its warps."""
    found: list[dict[str, int]] = [{}]
    for name, value in row.options.items():
        if isinstance(value, bool):  # the same for every row
            continue
        if name in row.blocks and value <= 1:  # a switch
            values = [1 - value]
        elif name == "num_warps" or value >= LEAST_BLOCK:
            values = [value // 2, value * 2]
        else:  # a depth
            values = [value - 1, value + 1]
        least = LEAST_BLOCK if value >= LEAST_BLOCK and name in row.blocks else int(name not in row.blocks)
        found += [{name: x} for x in values if x >= least]
        if name in row.blocks and value >= LEAST_BLOCK:
            found.append({name: value * 2, "num_warps": row.options["num_warps"] * 2})
    fitting = [options for options in found if options.get("num_warps", 1) <= MOST_WARPS]
    return fitting if ON_GPU else fitting[:2]


@cache
def work_of(name: str, num_rows: int = LOSS_ROWS) -> Work:
    return WORKS[name](num_rows)


def compile_trial(trial: Trial) -> None:
    """Put a trial's kernels into Triton's cache without running them."""
    from triton.runtime.jit import JITFunction

    name, row, options = trial
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(JITFunction, "run", compiled), rows()[row].replaced(**options):
        try:
            work_of(name, FEW_ROWS)()
        except Exception as error:  # whatever a compiler raises; the trial itself will record it
            print(f"{row}, {options}: {type(error).__name__}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = stage_options(__doc__, argv)
    if "triton" not in available_impls()["grpo_loss"]:
        write_line(options.record, skipped="Triton's kernels do not run here")
        return 0
    num_workers = max(1, (os.cpu_count() or 1) - 2)
    # They leave two cores to this process.
    pool = multiprocessing.get_context("spawn").Pool(num_workers, die_with_parent) if ON_GPU else None
    seen: set[str] = set()
    for name in WORKS:
        with noting() as launched:
            expected = [x.detach().double() for x in work_of(name)()]
        chosen = [row for row, launch in rows().items() if any(launch is x for x in launched)]
        trials = [
            (name, row, other) for row in chosen if row not in seen for other in neighbours(rows()[row])
        ]
        seen |= set(chosen)
        before = settled(read_stage(options.record))
        trials = [trial for trial in trials if label(trial) not in before]
        compiled = pool.imap(compile_trial, trials) if pool else trials
        for trial, _ in zip(trials, compiled, strict=True):
            write_line(options.record, begun=label(trial))
            write_line(options.record, test=label(trial), **try_out(trial, expected))
            if device_lost():
                return LOST
    return 0


def label(trial: Trial) -> str:
    name, row, options = trial
    return f"{row}, {name}: {', '.join(f'{key}={x}' for key, x in options.items()) or 'as it is'}"


def try_out(trial: Trial, expected: Sequence[Tensor]) -> dict[str, object]:
    """A line's outcome, its reason, and the trial with its time. Only a row as it is can fail."""
    name, row, options = trial
    launch, work = rows()[row], work_of(name)
    values = {**launch.options, **options}.items()
    text = ", ".join(f"{key}={x}" for key, x in values if not isinstance(x, bool))
    found: dict[str, object] = {"row": f"{row}, {name}", "launch": text, "own": not options}
    try:
        with launch.replaced(**options):
            error = max(relative_errors(work(), expected))
            if error <= TOLERANCE:
                found["ms"] = median_ms(ON_GPU, work, TIMED_MS)
                return {"outcome": "passed", "trial": for_json(found)}
            reason = f"error {error:.1e}"
    except Exception as error:  # a compiler's, or the launch's: that these options do not work is a result
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    outcome = "skipped" if options else "failed"
    return {"outcome": outcome, "reason": reason, "trial": {**found, "reason": reason}}


if __name__ == "__main__":
    sys.exit(main())
