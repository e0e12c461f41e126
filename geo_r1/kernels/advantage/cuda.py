"""Group-relative advantages by the CUDA kernel of csrc/group_advantage.cu."""

import torch

from geo_r1.kernels.extension import launch


def group_advantage(out, reward_N, cu_group, valid_N, cu_completion, baseline, scale, eps, correction):
    """Fill `out` [R], not empty, from checked inputs."""
    launch(
        "group_advantage",
        reward_N,
        dtype=reward_N.dtype,
        out=out,
        reward=reward_N,
        valid=valid_N,
        cu_group=cu_group,
        cu_completion=cu_completion,
        wide_group=cu_group.dtype == torch.int64,
        wide_completion=cu_completion is not None and cu_completion.dtype == torch.int64,
        num_groups=cu_group.numel() - 1,
        num_members=reward_N.numel(),
        num_rows=out.numel(),
        stride_reward=reward_N.stride(0),
        stride_valid=0 if valid_N is None else valid_N.stride(0),
        leave_one_out=baseline == "leave_one_out",
        scale=scale,
        eps=eps,
        correction=correction,
    )
