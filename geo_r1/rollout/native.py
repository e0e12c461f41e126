"""Sampling in process: a prompt and its pictures are computed once, for all completions of its group.

Every completion draws from a random stream of its own, named by its prompt's stream and its index: what it
says does not depend on which prompts share its batch, on the number of ranks, or on the order of work, up to
the rounding of products of other shapes: a draw that falls within it of a boundary may turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geo_r1.kernels import packed_attention
from geo_r1.kernels.layout import PackedLayout, plan_batches
from geo_r1.models import EncodedPrompt, PackedVLM, pack
from geo_r1.rollout.cache import GroupCache


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        max_new_tokens: a completion that reaches it is cut off there.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise ValueError(
                "sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1, got "
                f"{self.temperature}, {self.top_p}, {self.top_k} and {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Completion:
    """What one completion says.

    Attributes:
        token_ids: its tokens, the end token included when it ended by itself.
        logp: natural log-probability of each token under the distribution it was drawn from.
        ended: False when it was cut off at `max_new_tokens`.
    """

    token_ids: list[int]
    logp: list[float]
    ended: bool


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
) -> list[list[Completion]]:
    """Sample `num_completions` completions of each prompt.

    Args:
        prompts: encoded prompts.
        eos_token_id: the token, or tokens, that end a completion.
        streams: names of the prompts' random streams, such as "seed/position"; the same name draws the same.
        max_tokens: cached tokens (prompts once, completions at full length) held at a time; more prompts
            than fit are sampled one batch after another, with the same result.

    Returns:
        For each prompt, its completions. Vision tokens never occur in them.

    Raises:
        ValueError: one prompt with one completion does not fit `max_tokens`.
    """
    lengths = [[sampling.max_new_tokens] * num_completions for _ in prompts]
    plan = plan_batches([len(p.token_ids) for p in prompts], lengths, max_tokens)
    results: list[list[Completion | None]] = [[None] * num_completions for _ in prompts]
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    training = vlm.model.training
    vlm.model.eval()
    try:
        with vlm.autocast():  # around all steps, so that weights are cast once
            for batch in plan.batches:
                _generate_batch(vlm, prompts, batch, sampling, ends, streams, results)
    finally:
        vlm.model.train(training)
    return results  # type: ignore[return-value]  # every slot is filled: the plan holds each completion once


def _generate_batch(
    vlm: PackedVLM,
    prompts: Sequence[EncodedPrompt],
    batch: Sequence[tuple[int, Sequence[int]]],
    sampling: SamplingConfig,
    ends: set[int],
    streams: Sequence[str],
    results: list[list[Completion | None]],
) -> None:
    # Groups of one prompt length stand next to each other, so that their attention is one product.
    batch = sorted(batch, key=lambda piece: (len(prompts[piece[0]].token_ids), piece[0]))
    group_prompts = [prompts[group] for group, _ in batch]
    owner = [(slot, group, index) for slot, (group, indices) in enumerate(batch) for index in indices]
    cache = GroupCache([len(p.token_ids) for p in group_prompts], [slot for slot, _, _ in owner])
    slots = torch.tensor([slot for slot, _, _ in owner], device=vlm.device)
    hidden = _prefill(vlm, group_prompts, cache)[slots]
    uniform = torch.from_numpy(
        np.stack([_uniform(f"{streams[g]}/{i}", sampling.max_new_tokens) for _, g, i in owner])
    ).to(vlm.device)
    position = torch.tensor([group_prompts[slot].next_position for slot, _, _ in owner], device=vlm.device)
    forbidden = torch.tensor(vlm.vision_token_ids, device=vlm.device)
    embed, head = vlm.model.get_input_embeddings(), vlm.lm_head.to(vlm.compute_dtype).T

    said: list[tuple[list[int], list[float]]] = [([], []) for _ in owner]
    active = list(range(len(owner)))
    for step in range(sampling.max_new_tokens):
        logits = (hidden @ head).float().index_fill_(1, forbidden, -math.inf)
        token, logp = draw(logits, uniform[:, step], sampling)
        kept = []
        for row, (token_id, value) in enumerate(zip(token.tolist(), logp.tolist(), strict=True)):
            tokens, logps = said[active[row]]
            tokens.append(token_id)
            logps.append(value)
            if token_id in ends or step + 1 == sampling.max_new_tokens:
                _, group, index = owner[active[row]]
                results[group][index] = Completion(tokens, logps, token_id in ends)
            else:
                kept.append(row)
        if not kept:
            return
        if len(kept) < len(active):
            rows = torch.tensor(kept, device=vlm.device)
            token, uniform, position = token[rows], uniform[rows], position[rows]
            active = [active[row] for row in kept]
            cache.keep(kept)
        hidden = vlm.run_text(embed(token), (position + step).expand(3, -1), cache.attend)
        cache.advance()


def _prefill(vlm: PackedVLM, prompts: Sequence[EncodedPrompt], cache: GroupCache) -> Tensor:
    """Run the prompts once, keep their keys and values, return each one's last hidden state [B, C]."""
    batch = pack(prompts, [[] for _ in prompts], vlm.device)
    layout: PackedLayout = batch.layout

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache.fill(layer, k, v)
        return packed_attention(q, k, v, layout, scale=scale)

    return vlm.hidden_states(batch, attend)[layout.cu_group[1:].long() - 1]


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function.

    Args:
        logits: [n, V] float32.
        uniform: [n] float64 in [0, 1), one number a row.

    Returns:
        Tokens [n] int64 and their log-probability [n] under the distribution after temperature, top-k and
        top-p (0 for temperature 0).
    """
    if sampling.temperature == 0:
        return logits.argmax(1), torch.zeros(len(logits), device=logits.device)
    logp = (logits / sampling.temperature).log_softmax(1)
    if sampling.top_k and sampling.top_k < logp.shape[1]:
        smallest = logp.topk(sampling.top_k, 1).values[:, -1:]
        logp = logp.masked_fill(logp < smallest, -math.inf).log_softmax(1)
    if sampling.top_p < 1:
        ordered, order = logp.sort(1, descending=True)
        before = ordered.exp().cumsum(1) - ordered.exp()
        kept = torch.zeros_like(logp, dtype=torch.bool).scatter_(1, order, before < sampling.top_p)
        logp = logp.masked_fill(~kept, -math.inf).log_softmax(1)
    cumulative = logp.double().exp().cumsum(1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logp.shape[1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


def _uniform(name: str, count: int) -> np.ndarray:
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)
