"""Which implementation of an op runs: one table, one way to choose."""

import torch

# Op -> implementations that can run here, the default first.
_AVAILABLE: dict[str, tuple[str, ...]] = {
    "group_advantage": ("reference",),
    "grpo_loss": ("reference",),
    "linear_grpo_loss": ("reference",),
    "linear_logprob": ("reference",),
    "linear_cross_entropy": ("reference",),
    "packed_attention": ("reference",),
}
_KNOWN = ("reference", "triton", "cuda", "flash")


def available_impls() -> dict[str, tuple[str, ...]]:
    """List, for each op, the implementations that can run on this machine, the default first.

    Returns:
        A new dict from op name to names accepted by that op's `impl=`.
    """
    return dict(_AVAILABLE)


def resolve_impl(op: str, impl: str | None, device: torch.device) -> str:
    """Turn the `impl=` a user gave into the implementation that runs.

    Args:
        op: name of the op, a key of `available_impls()`.
        impl: None for the default, or one name.
        device: where the op's inputs live.

    Returns:
        The implementation's name.

    Raises:
        ValueError: no such op, no such implementation, or it cannot run here. Nothing falls back silently.
    """
    if op not in _AVAILABLE:
        raise ValueError(f"no op {op!r}; ops are {', '.join(_AVAILABLE)}")
    available = _AVAILABLE[op]
    if impl is None:
        return available[0]
    if impl not in available:
        problem = "cannot run here" if impl in _KNOWN else "is not known"
        raise ValueError(
            f"{op}: impl={impl!r} {problem} (device {device}); available: {', '.join(available)}, "
            "or None for the default"
        )
    return impl
