"""The tiles of a packed batch that the attention kernels walk, most work first.

A tile is up to `rows` neighbouring tokens of one segment, so it has one prefix and one range of its own keys.
Completions follow their prompt directly, so the queries that see a tile of keys are one range too, and one
loop sums their gradients without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens per tile in the launch tables: 16 and 32 for float32, 64 for a vision tower's windows, else 128.
TILE_ROWS = (16, 32, 64, 128)
# If no segment is longer than this, tiles are whole segments.
SHORT = 64
HEAD_SIZES = (16, 32, 64, 80, 96, 128)  # attention kernels are built for these


def tile_tables(
    cu_group: Tensor,
    prefix_len: Tensor,
    cu_segment: Tensor,
    segment_parent: Tensor,
    rows: int,
    num_tiles: int,
) -> tuple[Tensor, Tensor]:
    """Cut every segment into tiles on the boundaries' device, without waiting for it.

    Args:
        cu_group, prefix_len, cu_segment, segment_parent: boundaries, see `PackedLayout`.
        rows: the most tokens in a tile, one of TILE_ROWS.
        num_tiles: N, which the host knows from the lengths.

    Returns:
        query_tiles: [N, 5] int32: first query, start and end of its segment, start and end of the prefix
            (empty for a prompt).
        key_tiles: [N, 4] int32: first key, end of its segment, start and end of the queries that see it if
            attention is not causal; if it is, they start at the first key.

        Rows are sorted by their work in causal attention, the most first.
    """
    start_S, end_S = cu_segment[:-1], cu_segment[1:]
    is_prompt_S = segment_parent < 0
    group_S = is_prompt_S.cumsum(0) - 1
    prefix_S = cu_group[group_S]
    prefix_end_S = prefix_S + prefix_len[group_S].masked_fill(is_prompt_S, 0)
    query_end_S = torch.where(is_prompt_S, cu_group[group_S + 1], end_S)

    tiles_S = (end_S - start_S + rows - 1) // rows
    segment_N = torch.repeat_interleave(tiles_S, output_size=num_tiles)
    tile_N = torch.arange(num_tiles, device=start_S.device) - (tiles_S.cumsum(0) - tiles_S)[segment_N]
    first_N = start_S[segment_N] + rows * tile_N
    start_N, end_N, prefix_N, prefix_end_N, query_end_N = (
        x[segment_N] for x in (start_S, end_S, prefix_S, prefix_end_S, query_end_S)
    )
    query_tiles = torch.stack([first_N, start_N, end_N, prefix_N, prefix_end_N], 1)
    key_tiles = torch.stack([first_N, end_N, start_N, query_end_N], 1)
    query_order = (first_N - start_N + prefix_end_N - prefix_N).argsort(descending=True, stable=True)
    key_order = (query_end_N - first_N).argsort(descending=True, stable=True)
    return query_tiles[query_order].int(), key_tiles[key_order].int()
