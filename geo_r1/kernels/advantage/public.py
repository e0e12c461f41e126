"""Group-relative advantages over ragged groups.

    advantage[i] = (reward[i] - baseline_i) / scale_i

Source: GRPO, arXiv:2402.03300; leave-one-out baseline, RLOO, arXiv:2402.14740; undivided, Dr. GRPO,
arXiv:2503.20783.
"""

import importlib
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from geo_r1.kernels.advantage.reference import reference_advantage
from geo_r1.kernels.impls import resolve_impl


@torch.no_grad()
def group_advantage(
    reward_N: Tensor,
    cu_group: Tensor,
    *,
    valid_N: Tensor | None = None,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    correction: int = 1,
    cu_completion: Tensor | None = None,
    num_rows: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Score each completion against the others of its group.

        advantage[i] = (reward[i] - mean_g) / (std_g + eps)

    A group whose valid rewards are all equal, or that has one valid member, gets exactly zero. A non-finite
    reward makes the valid members of its group NaN (with `scale="batch"`, those of every group whose rewards
    differ): raising an error would wait for the device.

    Args:
        reward_N: [N] floating, task units; completions of a group are adjacent.
        cu_group: [G + 1] int32 or int64, group boundaries; starts at 0, ends at N. Empty groups are legal.
        valid_N: [N] bool; members that are False are left out of the statistics and get 0. None: all valid.
        baseline: "mean" of the group's valid members, or "leave_one_out", the mean of the others.
        scale: divide by the standard deviation of the "group", of the whole "batch"'s valid rewards, or by
            nothing ("none").
        eps: task units, added to the standard deviation; keeps nearly equal rewards finite.
        correction: 1 for the sample standard deviation (Bessel's correction), 0 for the population's.
        cu_completion: [N + 1] int32 or int64, where each completion's loss rows start; starts at 0, ends at
            R. Repeats each completion's advantage for all of its rows. None: one value per completion.
        num_rows: R, required with `cu_completion` and not allowed without; so nothing waits for the device.
        impl: implementation, see `available_impls()`.

    Returns:
        [N], or [R] with `cu_completion`; float32 (float64 for float64 rewards), no unit, no gradient.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; or boundaries on the CPU do not start at 0,
            decrease, or do not end at N or R.

    Source: GRPO, arXiv:2402.03300.
    """
    _check(reward_N, cu_group, valid_N, baseline, scale, eps, correction, cu_completion, num_rows)
    chosen = resolve_impl("group_advantage", impl, reward_N.device, _refused(reward_N.dtype))
    if chosen != "reference":
        rows = reward_N.numel() if num_rows is None else num_rows
        options = (baseline, scale, eps, correction, chosen)
        return _kernel_op(reward_N, cu_group, valid_N, cu_completion, rows, *options)
    advantage_N = reference_advantage(reward_N, cu_group, valid_N, baseline, scale, eps, correction)
    if cu_completion is None:
        return advantage_N
    return advantage_N.repeat_interleave(cu_completion.diff(), output_size=num_rows)


def _refused(dtype: torch.dtype) -> dict[str, str]:
    taken = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {} if dtype in taken else dict.fromkeys(("triton", "cuda"), f"{dtype} rewards")


@torch.library.custom_op(
    "geo_r1::group_advantage",
    mutates_args=(),
    schema="(Tensor reward_N, Tensor cu_group, Tensor? valid_N, Tensor? cu_completion, SymInt num_rows, "
    "str baseline, str scale, float eps, int correction, str impl) -> Tensor",
)
def _kernel_op(reward_N, cu_group, valid_N, cu_completion, num_rows, *options_and_impl):
    *options, impl = options_and_impl
    out = _new_result(reward_N, num_rows)
    if num_rows and cu_group.numel() > 1:
        kernels = importlib.import_module(f"geo_r1.kernels.advantage.{impl}")
        cu_completion = None if cu_completion is None else cu_completion.contiguous()
        kernels.group_advantage(out, reward_N, cu_group.contiguous(), valid_N, cu_completion, *options)
    return out


@_kernel_op.register_fake
def _(reward_N, cu_group, valid_N, cu_completion, num_rows, *_):
    return _new_result(reward_N, num_rows)


def _new_result(reward_N: Tensor, num_rows: int) -> Tensor:
    return reward_N.new_empty(num_rows, dtype=torch.promote_types(reward_N.dtype, torch.float32))


def _check(
    reward_N: Tensor,
    cu_group: Tensor,
    valid_N: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    correction: int,
    cu_completion: Tensor | None,
    num_rows: int | None,
) -> None:
    if reward_N.dim() != 1 or not reward_N.is_floating_point():
        raise ValueError(f"reward_N: expected [N] floating, got {list(reward_N.shape)} {reward_N.dtype}")
    if cu_group.dim() != 1 or cu_group.numel() == 0 or cu_group.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_group: expected [G + 1] int32 or int64, got {list(cu_group.shape)} {cu_group.dtype}"
        )
    if valid_N is not None and (valid_N.shape != reward_N.shape or valid_N.dtype != torch.bool):
        raise ValueError(
            f"valid_N: expected {list(reward_N.shape)} bool, got {list(valid_N.shape)} {valid_N.dtype}"
        )
    if (cu_completion is None) != (num_rows is None):
        given, missing = ("cu_completion", "num_rows") if num_rows is None else ("num_rows", "cu_completion")
        raise ValueError(f"{missing}: expected beside {given}, got None; give both or neither")
    if cu_completion is not None and (
        cu_completion.shape != (reward_N.numel() + 1,)
        or cu_completion.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"cu_completion: expected [{reward_N.numel() + 1}] int32 or int64, "
            f"got {list(cu_completion.shape)} {cu_completion.dtype}"
        )
    if num_rows is not None and num_rows < 0:
        raise ValueError(f"num_rows: expected at least 0, got {num_rows}")
    for name, tensor in (("cu_group", cu_group), ("valid_N", valid_N), ("cu_completion", cu_completion)):
        if tensor is not None and tensor.device != reward_N.device:
            raise ValueError(f"{name}: expected on {reward_N.device} like reward_N, got {tensor.device}")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: expected 'mean' or 'leave_one_out', got {baseline!r}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if correction not in (0, 1):
        raise ValueError(f"correction: expected 0 or 1, got {correction}")
    # Reading values would wait for a GPU, and a traced graph has none.
    if cu_group.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_boundaries("cu_group", "group", cu_group, "N", reward_N.numel())
        if cu_completion is not None and num_rows is not None:
            _check_boundaries("cu_completion", "completion", cu_completion, "num_rows", num_rows)


def _check_boundaries(name: str, part: str, boundary: Tensor, end_name: str, end: int) -> None:
    boundaries = boundary.tolist()
    if boundaries[0] != 0 or boundaries[-1] != end:
        raise ValueError(
            f"{name}: expected to start at 0 and end at {end_name} = {end}, "
            f"got {boundaries[0]} and {boundaries[-1]}"
        )
    for i, (start, stop) in enumerate(pairwise(boundaries)):
        if stop < start:
            raise ValueError(f"{name}: {part} {i} ends at {stop}, before its start at {start}")
