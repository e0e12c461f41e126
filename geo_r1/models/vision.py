"""Make a vision tower's arguments besides pixels on the host, so that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import vision_utils

from geo_r1.kernels import PackedLayout
from geo_r1.models.packed import to_device


class TowerLayouts:
    """The attention layout for each boundary tensor that a layer of the tower may get.

    It is an object, not a list: compiled layers look into lists and recompile when these change.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, PackedLayout]]) -> None:
        self._pairs = pairs

    def of(self, boundaries: Tensor) -> PackedLayout:
        """The layout that belongs to this very tensor."""
        return next(layout for known, layout in self._pairs if known is boundaries)


def tower_inputs(visual: Any, grids: Sequence[tuple[int, int, int]], device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' vision towers besides the pixels.

    Args:
        visual: the tower, of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        grids: (frames, rows, columns) in patches, one per image.
        device: the pixels' device.

    Returns:
        The indices that the tower would make itself, on the device, and `vision_layouts` for the boundaries
        of images, and of windows if it has them.
    """
    config = visual.config
    grid = torch.tensor(grids)
    images = vision_utils.get_vision_cu_seqlens(grid)
    tensors = {
        "cu_seqlens": images,
        "position_ids": vision_utils.get_vision_position_ids(grid, config.spatial_merge_size),
    }
    boundaries = {"cu_seqlens": images}
    longest = {"max_seqlen": int(images.diff().max())}
    if hasattr(config, "window_size"):
        tensors["window_index"], windows = vision_utils.get_vision_window_index(
            grid, config.spatial_merge_size, config.window_size, config.patch_size
        )
        tensors["cu_window_seqlens"] = boundaries["cu_window_seqlens"] = windows
        longest["max_window_seqlen"] = int(windows.diff().max())
    if hasattr(visual, "pos_embed"):
        tensors["interp_indices"], tensors["interp_weights"] = (
            vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                visual.num_grid_per_side,
                visual.interpolation_mode,
                visual.interpolation_align_corners,
                config.spatial_merge_size,
            )
        )
    tensors = {name: to_device(tensor, device) for name, tensor in tensors.items()}
    layouts = TowerLayouts(
        [
            (tensors[name], PackedLayout.from_lengths(cu.diff().tolist(), device=device))
            for name, cu in boundaries.items()
        ]
    )
    return {"grid_thw": grid, **longest, **tensors, "vision_layouts": layouts}
