"""The layout of a packed batch: which token belongs to which prompt and completion.

A batch is one row of T tokens without padding: each group's prompt once, then its completions.

    [ prompt 0 | c 0.0 | c 0.1 | ... | prompt 1 | c 1.0 | ... ]

A *segment* is a prompt or a completion. Token i sees token j when j <= i, both are in the same group, and j
is in the prompt or in i's own completion. A vision tower's windows are prompts with no completions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from geo_r1.kernels.layout.made import Made, tensors_in
from geo_r1.kernels.layout.tiles import TILE_ROWS, tile_tables

T = TypeVar("T")


@dataclass(frozen=True, eq=False)  # as with tensors, two layouts are equal only if they are the same object
class PackedLayout:
    """The boundaries of a packed batch, on the device for kernels and on the host for schedules.

    Make one with `from_lengths`. The tensors are int32, in tokens.

    Attributes:
        prompt_len: tokens of each group's prompt, B numbers.
        completion_len: for each group, the tokens of each of its completions; zero is legal.
        cu_group: [B + 1] where each group starts; ends at T.
        prefix_len: [B] tokens of each group's prompt.
        cu_segment: [S + 1] where each segment starts; ends at T.
        segment_parent: [S] the segment that holds the prompt of this completion; -1 for a prompt.
        num_tokens: T, tokens in the batch.
        max_segment_len: tokens of the longest prompt or completion.
        has_completions: whether any group has one.
    """

    prompt_len: tuple[int, ...]
    completion_len: tuple[tuple[int, ...], ...]
    cu_group: Tensor
    prefix_len: Tensor
    cu_segment: Tensor
    segment_parent: Tensor
    # Counted once, so that compiled code is guarded by these numbers, not by the length of every segment.
    num_tokens: int = field(init=False, repr=False)
    max_segment_len: int = field(init=False, repr=False)
    has_completions: bool = field(init=False, repr=False)
    _num_tiles: dict[int, int] = field(init=False, repr=False)
    _kept: dict[Any, tuple[Any, Made | None]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [*self.prompt_len, *itertools.chain.from_iterable(self.completion_len)]
        object.__setattr__(self, "num_tokens", sum(lengths))
        object.__setattr__(self, "max_segment_len", max(lengths, default=0))
        object.__setattr__(self, "has_completions", any(self.completion_len))
        # Many segments often have the same length.
        counts = Counter(lengths)
        num_tiles = {rows: sum(n * -(-length // rows) for length, n in counts.items()) for rows in TILE_ROWS}
        object.__setattr__(self, "_num_tiles", num_tiles)

    @classmethod
    def from_lengths(
        cls,
        prompt_len: Sequence[int],
        completion_len: Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedLayout:
        """Lay out groups one after another.

        Args:
            prompt_len: tokens of each prompt, B integers >= 0, numpy's included.
            completion_len: B sequences with the tokens of each completion; None means no completions.
            device: of the boundaries.

        Returns:
            The layout.

        Raises:
            ValueError: lengths are negative or not integers, the two arguments differ in length, or the
                number of tokens does not fit int32.
        """
        prompts, completions = check_lengths(
            prompt_len, [()] * len(prompt_len) if completion_len is None else completion_len
        )
        cu_group, cu_segment, parent = [0], [0], list[int]()
        for prompt, lengths in zip(prompts, completions, strict=True):
            parent += [-1] + [len(parent)] * len(lengths)
            cu_segment += itertools.accumulate(lengths, initial=cu_segment[-1] + prompt)
            cu_group.append(cu_segment[-1])
        if cu_group[-1] >= 2**31:
            raise ValueError(f"{cu_group[-1]} tokens do not fit int32 boundaries; plan smaller batches")
        boundaries = (
            torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
            for values in (cu_group, prompts, cu_segment, parent)
        )
        return cls(prompts, completions, *boundaries)

    @property
    def device(self) -> torch.device:
        return self.cu_group.device

    def kept(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, tensors in nested tuples, made on first use; any stream may use it.

        `torch.compile` can trace it. Use a layout once before capturing a CUDA graph with it: tensors made
        during a capture hold nothing until the replay.
        """
        if key in self._kept:
            value, made = self._kept[key]
            if made is not None and not torch.compiler.is_compiling():
                made.wait()
            return value
        value = make()
        # a tracer's tensors must not outlive it
        if all(type(x) is type(self.cu_group) for x in tensors_in(value)):
            made = None if torch.compiler.is_compiling() else Made.by_current_stream(value)
            self._kept[key] = value, made
        return value

    def tiles(self, rows: int) -> tuple[Tensor, Tensor]:
        """Query tiles and key tiles of at most `rows` tokens, one of TILE_ROWS: see `tile_tables`."""
        boundaries = (self.cu_group, self.prefix_len, self.cu_segment, self.segment_parent)
        return self.kept(rows, lambda: tile_tables(*boundaries, rows, self._num_tiles[rows]))

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int, int], ...]:
        """(start, length, prefix start, prefix length) of each segment in tokens, on the host."""
        rows, start = [], 0
        for prompt, lengths in zip(self.prompt_len, self.completion_len, strict=True):
            rows.append((start, prompt, start, 0))
            prefix, start = start, start + prompt
            for length in lengths:
                rows.append((start, length, prefix, prompt))
                start += length
        return tuple(rows)

    @property
    def shape_buckets(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """Segments grouped by shape: (prefix length, query rows [n, L], key rows [n, P + L]), int64.

        Empty segments are in no bucket. Every token is in the query rows of exactly one bucket.
        """
        return self.kept("shape_buckets", self._shape_buckets)

    def _shape_buckets(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for start, length, prefix, prefix_len in self.segments:
            if length:
                places.setdefault((length, prefix_len), []).append((start, prefix))
        buckets = []
        for (length, prefix_len), starts in places.items():
            first = torch.tensor(starts)
            q_row = first[:, :1] + torch.arange(length)
            kv_row = torch.cat([first[:, 1:] + torch.arange(prefix_len), q_row], 1)
            buckets.append((prefix_len, q_row.to(self.device), kv_row.to(self.device)))
        return tuple(buckets)

    @property
    def bucket_order(self) -> Tensor:
        """[T] int64, each token's place in the concatenated query rows of `shape_buckets`."""
        return self.kept("bucket_order", self._bucket_order)

    def _bucket_order(self) -> Tensor:
        rows = [q_row.flatten() for _, q_row, _ in self.shape_buckets]
        return torch.cat(rows).argsort() if rows else torch.zeros(0, dtype=torch.int64, device=self.device)

    @property
    def predictor_row(self) -> Tensor:
        """[R] int64, the token whose hidden state predicts each completion token.

        A completion's first token is predicted by its prompt's last one.

        Raises:
            ValueError: a group has completion tokens but an empty prompt, so nothing predicts the first.
        """
        return self.kept("predictor_row", self._predictor_row)

    def _predictor_row(self) -> Tensor:
        is_prompt = (i == 0 for lengths in self.completion_len for i in range(1 + len(lengths)))
        kept = [row for row, prompt in zip(self.segments, is_prompt, strict=True) if row[1] and not prompt]
        for start, _, _, prefix_len in kept:
            if not prefix_len:
                raise ValueError(f"the completion at token {start} has no prompt to predict its first token")
        start_N, length_N, prefix_N, prefix_len_N = torch.tensor(kept, dtype=torch.int64).view(-1, 4).T
        first_N = length_N.cumsum(0) - length_N  # each completion's first row
        num_rows = sum(length for _, length, _, _ in kept)
        row_R = torch.arange(num_rows) + (start_N - 1 - first_N).repeat_interleave(
            length_N, output_size=num_rows
        )
        row_R[first_N] = prefix_N + prefix_len_N - 1
        return row_R.to(self.device, non_blocking=True)


def check_lengths(
    prompt_len: Sequence[int], completion_len: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The lengths as Python integers, whose sums cannot overflow."""
    if len(prompt_len) != len(completion_len):
        raise ValueError(f"{len(prompt_len)} prompts but {len(completion_len)} groups of completions")
    flat = [*prompt_len, *itertools.chain.from_iterable(completion_len)]
    if set(map(type, flat)) <= {int} and min(flat, default=0) >= 0:  # fast for thousands of lengths
        return tuple(prompt_len), tuple(map(tuple, completion_len))
    for group, (prompt, lengths) in enumerate(zip(prompt_len, completion_len, strict=True)):
        for length in (prompt, *lengths):
            if not isinstance(length, Integral) or isinstance(length, bool) or length < 0:
                raise ValueError(f"group {group}: a length must be an integer >= 0, got {length!r}")
    return tuple(map(int, prompt_len)), tuple(tuple(map(int, lengths)) for lengths in completion_len)
