"""The native sampler: it computes a prompt and its images once, for all completions of the group.

Completions that have ended make room for those that wait. A prompt is prefilled, by training's attention,
when there is room for one of its completions, and held until the last of them has ended.

Every completion draws from its own random stream, named by its prompt's stream and its index. So its tokens
do not depend on the prompts beside it, the number of ranks, or the order of work, except that products of
other shapes round differently: a draw that close to a boundary may turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geo_r1.models import EncodedPrompt, PackedVLM
from geo_r1.rollout.native.cache import CacheSize, GroupCache, compact
from geo_r1.rollout.native.decoder import Decoder
from geo_r1.rollout.native.graphs import CudaGraphs, run_eagerly
from geo_r1.rollout.sampling import Completion, SamplingConfig

SPARE_LANES = (
    1.5  # prompts held per prompt that the rows suffice for: a group's stragglers leave rows to the next
)


@torch.no_grad()
def generate(
    vlm: PackedVLM,
    prompts: Sequence[EncodedPrompt],
    num_completions: int,
    *,
    sampling: SamplingConfig,
    eos_token_id: int | Collection[int],
    streams: Sequence[str],
    max_tokens: int = 65536,
    cuda_graphs: bool = False,
) -> list[list[Completion]]:
    """Sample `num_completions` completions of each prompt.

    Args:
        prompts: encoded prompts.
        eos_token_id: the token, or tokens, that end a completion.
        streams: names of the prompts' random streams, such as "seed/position"; the same name draws the same.
        max_tokens: cached tokens at a time: prompts once, each as long as the longest, and completions at
            full length. If not all fit, some wait until others have ended; the result is the same.
        cuda_graphs: decode by CUDA graphs. Off by default: they have not run on a GPU yet.

    Returns:
        For each prompt, its completions. Vision tokens never occur in them.

    Raises:
        ValueError: a prompt with one completion does not fit `max_tokens`; or `cuda_graphs` without a GPU.
    """
    if cuda_graphs and vlm.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a model on a GPU, this one is on the {vlm.device.type}")
    for prompt in prompts:
        prompt.check_budget(sampling.max_new_tokens, max_tokens, "max_tokens")
    ends = [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)
    results: dict[tuple[int, int], Completion] = {}
    training = vlm.model.training
    vlm.model.eval()
    try:
        with vlm.autocast():  # around all steps, so that weights are cast once
            for size, groups in _runs(vlm, prompts, num_completions, sampling.max_new_tokens, max_tokens):
                decoder = Decoder(vlm, sampling, ends, GroupCache(size, vlm.device, fixed=cuda_graphs))
                launch = CudaGraphs() if cuda_graphs else run_eagerly
                results |= _Run(decoder, launch, prompts, streams, deque(groups), num_completions).complete()
    finally:
        vlm.model.train(training)
    return [[results[group, i] for i in range(num_completions)] for group in range(len(prompts))]


def _runs(
    vlm: PackedVLM, prompts: Sequence[EncodedPrompt], num_completions: int, row_len: int, max_tokens: int
) -> Iterator[tuple[CacheSize, list[int]]]:
    """Cache sizes, and the prompts that share each cache: all prompts if they fit at once.

    Otherwise no prompt shares a cache with one over twice as long, and the longest go first: short prompts
    do not wait in lanes made for a long one.
    """
    config = vlm.model.config.text_config

    def held(num_prompts: int, rows: int) -> int:
        return min(num_prompts, rows, math.ceil(SPARE_LANES * rows / num_completions))

    left = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i))
    while left and num_completions:
        longest, count = len(prompts[left[0]].token_ids), len(left)
        if count * (longest + num_completions * row_len) > max_tokens:
            count = sum(2 * len(prompts[i].token_ids) >= longest for i in left)
        rows = lanes = 1
        while rows < count * num_completions and (
            held(count, rows + 1) * longest + (rows + 1) * row_len <= max_tokens
        ):
            rows += 1
            lanes = held(count, rows)
        seats = min(num_completions, rows)
        heads = config.num_key_value_heads
        yield CacheSize(rows, row_len, lanes, longest, seats, config.num_hidden_layers, heads), left[:count]
        left = left[count:]


@dataclass(eq=False)
class _Group:
    """A prompt in the cache: its completions that have not begun, and how many are in progress."""

    index: int
    waiting: deque[int]
    hidden: Tensor = field(init=False)  # [C] the prompt's last hidden state
    live: int = 0


@dataclass(eq=False)
class _Row:
    """A completion in progress, and how many of its tokens were drawn."""

    group: _Group
    index: int
    said: int = 0


@dataclass(eq=False)
class _Run:
    """Samples all completions of some prompts through one cache."""

    decoder: Decoder
    launch: Callable[..., None]
    prompts: Sequence[EncodedPrompt]
    streams: Sequence[str]
    queue: deque[int]  # indices of prompts that have not begun
    num_completions: int
    held: list[_Group] = field(default_factory=list)  # in the order of the cache's lanes
    rows: list[_Row] = field(default_factory=list)  # in the order of the cache's rows
    results: dict[tuple[int, int], Completion] = field(default_factory=dict)

    @property
    def cache(self) -> GroupCache:
        return self.decoder.cache

    def complete(self) -> dict[tuple[int, int], Completion]:
        """All completions, by prompt and index."""
        num_results = len(self.queue) * self.num_completions
        while True:
            changed = self._admit()
            self.launch(self.decoder.draw, self.cache.rows_read(len(self.rows)))
            changed |= self._collect()
            if len(self.results) == num_results:
                return self.results
            if not self.rows:
                continue
            if changed:
                lane = {group: i for i, group in enumerate(self.held)}
                self.cache.seat([lane[row.group] for row in self.rows])
            self.launch(self.decoder.run, self.cache.extent([row.said for row in self.rows]))

    def _admit(self) -> bool:
        """Begin completions that wait, if there is room; True if any began."""
        size = self.cache.size
        opened: list[_Group] = []
        entering: list[_Row] = []
        waiting = [group for group in self.held if group.waiting]
        while len(self.rows) + len(entering) < size.rows:
            if not waiting:
                if not self.queue or len(self.held) + len(opened) == size.lanes:
                    break
                waiting.append(_Group(self.queue.popleft(), deque(range(self.num_completions))))
                opened += waiting
            group = waiting[0]
            entering.append(_Row(group, group.waiting.popleft()))
            group.live += 1
            if not group.waiting:
                waiting.pop(0)
        if opened:
            hidden = self.decoder.prefill([self.prompts[group.index] for group in opened])
            for group, group.hidden in zip(opened, hidden, strict=True):
                self.held.append(group)
        if entering:
            self.decoder.enter(
                len(self.rows),
                torch.stack([row.group.hidden for row in entering]),
                [self.prompts[row.group.index].next_position for row in entering],
                [f"{self.streams[row.group.index]}/{row.index}" for row in entering],
            )
            self.rows += entering
        return bool(entering)

    def _collect(self) -> bool:
        """Take out completions that the last token ended or cut off; True if there were any."""
        row_len = self.cache.size.row_len
        ended = self.decoder.ended[: len(self.rows)].tolist()  # the one wait of a step
        for row in self.rows:
            row.said += 1
        gone = [i for i, row in enumerate(self.rows) if ended[i] or row.said == row_len]
        if not gone:
            return False
        for i, token_ids, logp in zip(gone, *self.decoder.read(gone), strict=True):
            row = self.rows[i]
            row.group.live -= 1
            completion = Completion(token_ids[: row.said], logp[: row.said], ended[i])
            self.results[row.group.index, row.index] = completion
        longest = max(row.said for row in self.rows)
        if moves := compact(self.rows, gone):
            self.decoder.move_rows(moves, longest)
        if closed := [i for i, group in enumerate(self.held) if not group.live and not group.waiting]:
            self.cache.close(compact(self.held, closed), len(self.held))
        return True
