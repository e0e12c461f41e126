"""A step of sampling on the device: drawn tokens go through the text layers, then the next are drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from geo_r1.kernels import packed_attention
from geo_r1.models import EncodedPrompt, PackedVLM, pack
from geo_r1.models.packed import to_device
from geo_r1.rollout.native.cache import Extent, GroupCache
from geo_r1.rollout.sampling import SamplingConfig


class Decoder:
    """The state of a step, on the device; rows in use stand first, as in the cache."""

    def __init__(
        self, vlm: PackedVLM, sampling: SamplingConfig, ends: Sequence[int], cache: GroupCache
    ) -> None:
        self.vlm, self.sampling, self.cache = vlm, sampling, cache
        self.embed, self.head = vlm.model.get_input_embeddings(), vlm.lm_head.to(vlm.compute_dtype).T
        rows, row_len = cache.size.rows, cache.size.row_len
        device, exact = vlm.device, torch.promote_types(vlm.compute_dtype, torch.float32)
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.forbidden = torch.tensor(vlm.vision_token_ids, device=device)
        self.hidden = torch.zeros(rows, self.head.shape[0], dtype=vlm.compute_dtype, device=device)
        self.uniform = torch.zeros(rows, row_len, dtype=torch.float64, device=device)
        self.token_ids = torch.zeros(rows, row_len, dtype=torch.int64, device=device)
        self.logp = torch.zeros(rows, row_len, dtype=exact, device=device)
        self.start = torch.zeros(rows, dtype=torch.int64, device=device)  # position of the first token
        self.step = torch.zeros_like(self.start)  # tokens drawn, up to the row's last place
        self.token = torch.zeros_like(self.start)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def prefill(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Run prompts once, into the cache's next lanes; returns each one's last hidden state [B, C]."""
        batch = pack(prompts, [[] for _ in prompts], self.vlm.device)
        self.cache.open(batch.layout.prompt_len)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            self.cache.fill(layer, k, v)
            return packed_attention(q, k, v, batch.layout, scale=scale)

        return self.vlm.hidden_states(batch, attend)[batch.layout.cu_group[1:].long() - 1]

    def enter(self, first: int, hidden: Tensor, start: Sequence[int], names: Sequence[str]) -> None:
        """Begin completions in the rows from `first` on."""
        rows = slice(first, first + len(names))
        uniform = np.stack([_uniform(name, self.cache.size.row_len) for name in names])
        self.hidden[rows] = hidden
        self.uniform[rows] = to_device(torch.from_numpy(uniform), self.vlm.device)
        self.start[rows] = to_device(torch.tensor(start), self.vlm.device)
        self.step[rows] = 0

    def draw(self, rows: int) -> None:
        """Draw the next token of the first rows, and note whether it ends them."""
        step = self.step[:rows, None]
        logits = (self.hidden[:rows] @ self.head).to(self.logp.dtype)
        logits.index_fill_(1, self.forbidden, -math.inf)
        token, logp = draw(logits, self.uniform[:rows].gather(1, step)[:, 0], self.sampling)
        self.token[:rows] = token
        self.token_ids[:rows].scatter_(1, step, token[:, None])
        self.logp[:rows].scatter_(1, step, logp[:, None])
        self.ended[:rows] = (token[:, None] == self.ends).any(1)

    def run(self, extent: Extent) -> None:
        """Run the drawn tokens through the text layers."""
        rows = slice(extent.rows)
        step = self.step[rows]
        self.cache.begin(extent, step)
        position = (self.start[rows] + step).expand(3, -1)
        self.hidden[rows] = self.vlm.run_text(self.embed(self.token[rows]), position, self.cache.attend)
        # With fixed shapes unused rows are run as well; they stay within their bounds.
        self.step[rows] = (step + 1).clamp_(max=self.cache.size.row_len - 1)

    def read(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of these rows, at full length."""
        index = to_device(torch.tensor(rows), self.vlm.device)
        return self.token_ids[index].tolist(), self.logp[index].tolist()

    def move_rows(self, moves: Sequence[tuple[int, int]], own: int) -> None:
        """Move rows, of at most `own` tokens in the cache, to other places: (from, to) of each."""
        source, target = to_device(torch.tensor(moves), self.vlm.device).T
        for x in (self.uniform, self.token_ids, self.logp, self.start, self.step, self.token):
            x[target] = x[source]
        self.cache.move_rows(source, target, own)


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function.

    Args:
        logits: [n, V] float32 or float64.
        uniform: [n] float64 in [0, 1), one number a row.

    Returns:
        Tokens [n] int64 and their log-probability [n] under the distribution after temperature, top-k and
        top-p (0 for temperature 0).
    """
    if sampling.temperature == 0:
        return logits.argmax(1), logits.new_zeros(len(logits))
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
