"""How long a kernel takes on an H200 at least, from its machine code: a model, which measures nothing.

    time  = the longest of  instructions / issue slots,  exponentials / MUFU,  multiply-adds / tensor cores,
            bytes / bandwidth
    floor = the longer of   bytes / bandwidth,  multiply-adds / tensor cores at their full rate

What a kernel spends is that of its main loops, see `sass.py`. Whatever is outside them or waits is not
counted, so a kernel can be slower than this but not faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geo_r1.kernels.sass import Pace, Work

# 132 SMs at 1.98 GHz. An SM issues to 4 x 32 lanes a cycle, and its MUFU gives 16 results: CUDA C++
# Programming Guide, "Arithmetic Instructions", compute capability 9.0.
_CYCLES = 132 * 1.98e9
ISSUE_SLOTS = _CYCLES * 4 * 32  # instructions of a thread, a second
MUFU = _CYCLES * 16  # exponentials a second
# Measured on an H200: an 8192 x 8192 x 8192 product in bfloat16; a copy, whose reads and writes both count.
TENSOR_CORES = 788e12 / 2  # multiply-adds a second
BANDWIDTH = 4.3e12  # bytes a second
# What else is reached of TENSOR_CORES. mma.sync gets 62.9 % of wgmma: arXiv:2402.13499. TF32 is half as fast.
_TENSOR_SHARE = {"HGMMA": 1.0, "HMMA": 0.629, "HGMMA TF32": 0.5, "HMMA TF32": 0.3145}

# ---- what the kernels compute

_ITEM_BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
_TF32_PRODUCTS = 3  # for one in float32, see attention's PRECISION
_EXPONENTIALS = {"_statistics_kernel": 1, "_loss_kernel": 2, "_gradient_kernel": 1}
_PRODUCTS = {"_forward_kernel": 2, "_d_query_kernel": 3, "_d_key_kernel": 4}  # of D multiply-adds a pair


def triton_work(kernel: str, arguments: Mapping[str, Any]) -> Work | None:
    """The work of a Triton kernel, given its arguments' types or values; None if it has no large loop."""
    if kernel in _PRODUCTS:
        exact = arguments["q_ptr"] == "*fp32"
        head_size = arguments["D0"] + arguments["D1"]
        return Work(1, multiply_adds=_PRODUCTS[kernel] * head_size * (_TF32_PRODUCTS if exact else 1))
    if kernel in _EXPONENTIALS:
        stores = kernel != "_statistics_kernel" and arguments.get("GRADIENT", True)
        passes = _EXPONENTIALS[kernel] if stores else 1
        return Work(passes, item_bytes=_ITEM_BYTES[arguments["logits_ptr"]], stores=stores)
    return None


# ---- the targets' sizes


@dataclass(frozen=True)
class Target:
    """A size of the benchmarks.

    Attributes:
        place: family, case and name of the Triton kernel that is built for it.
        elements, bytes: of the whole input; each byte counts once, also if it is read again from L2.
        multiply_adds: that the kernel's products need.
    """

    place: tuple[str, str, str]
    size: str
    elements: float
    bytes: float
    multiply_adds: float = 0.0


def _rows(num_cols: int) -> list[Target]:
    num_rows, item_bytes = 4096, 2
    elements = num_rows * num_cols
    size, label = f"{num_rows} x {num_cols}", f"V {num_cols} bfloat16"
    return [
        Target(("loss", f"{case}, {label}", kernel), size, elements, item_bytes * moved * elements)
        for kernel, case, moved in (
            ("_statistics_kernel", "statistics", 1),
            ("_loss_kernel", "loss, clip", 2),
            ("_gradient_kernel", "gradient", 2),
        )
    ]


def _attention(size: str, lengths: Sequence[int], heads: int, kv_heads: int, head_size: int) -> list[Target]:
    causal = kv_heads < heads
    pairs = heads * sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    case = f"packed_attention long D={head_size} {'causal' if causal else 'full'} torch.bfloat16"
    vectors = 2 * sum(lengths) * head_size  # bytes of one head's vectors
    moved = {
        "_forward_kernel": 2 * heads + 2 * kv_heads,  # q, out; k, v
        "_d_query_kernel": 4 * heads + 2 * kv_heads,  # q, out, dout, dq; k, v
        "_d_key_kernel": 4 * heads + 2 * kv_heads,  # q, dout, dk, dv; k, v
    }
    return [
        Target(
            ("attention", case, kernel), size, pairs, vectors * moved[kernel], pairs * products * head_size
        )
        for kernel, products in _PRODUCTS.items()
    ]


TARGETS = (
    *_rows(152064),
    *_rows(151674),
    *_attention("causal 4 x 4096", (4096,) * 4, 28, 4, 128),
    *_attention("vision whole images", (2664, *(2916,) * 5), 16, 16, 80),
)


def bounds(target: Target, spent: Pace) -> dict[str, float]:
    """Milliseconds by what could take them; the largest is the estimate."""
    tensor = sum(number / _TENSOR_SHARE[kind] for kind, number in spent.multiply_adds.items())
    seconds = {
        "issue slots": spent.instructions * target.elements / ISSUE_SLOTS,
        "exponentials": spent.exponentials * target.elements / MUFU,
        "tensor cores": tensor * target.elements / TENSOR_CORES,
        "bytes": target.bytes / BANDWIDTH,
    }
    return {what: 1e3 * time for what, time in seconds.items()}


ALIGNS = "<<>>>><>>>"  # of the columns of `table`


def table(found: Iterable[tuple[str, Target, Pace]]) -> list[tuple[str, ...]]:
    """A heading, and a line for each kernel, its target and its pace."""
    lines: list[tuple[str, ...]] = [
        (
            *("on an H200, at least", "size", "instructions", "exponentials", "bytes", "multiply-adds"),
            *("bound by", "ms", "floor ms", "share"),
        )
    ]
    for name, target, spent in found:
        times = bounds(target, spent)
        bound = max(times, key=lambda what: times[what])
        floor = 1e3 * max(target.bytes / BANDWIDTH, target.multiply_adds / TENSOR_CORES)
        numbers = (spent.instructions, spent.exponentials, spent.loaded + spent.stored)
        products = f"{sum(spent.multiply_adds.values()):.0f}" if spent.multiply_adds else "-"
        milliseconds = (f"{times[bound]:.3f}", f"{floor:.3f}", f"{floor / times[bound]:.0%}")
        counts = (f"{number:.2f}" for number in numbers)
        lines.append((name, target.size, *counts, products, bound, *milliseconds))
    return lines
