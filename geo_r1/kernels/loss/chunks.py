"""Walks through the loss rows in chunks, whose logits live in one bounded scratch buffer.

Three products per chunk: logits = hidden lm_head^T, dhidden = dlogits lm_head, dlm_head += dlogits^T hidden.
Between them `TorchRows` or `KernelRows` turns the logits into statistics and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geo_r1.kernels.loss import reference
from geo_r1.kernels.loss.config import GRPOLossConfig
from geo_r1.kernels.loss.reference import LossRows, RowLoss
from geo_r1.kernels.loss.rows import in_kernels, row_kernels

# Bytes of all live temporaries of a chunk, except for a float32 head's copy in a narrower dtype.
# Accelerators: at V = 152064 in bfloat16 this is 3,751 rows, so arithmetic bounds the products and most
# micro-batches are one chunk (not measured). CPU: the fastest of 4, 16, 64 and 256 MiB at R = 384, C = 128,
# V = 50021 on one AMD EPYC core, in float32 and in bfloat16.
SCRATCH_BYTES = 1088 << 20
SCRATCH_BYTES_CPU = 64 << 20

# Rows and columns of the largest tile of cuBLAS's 16-bit products on sm_90; an SM computes one at a time.
TILE = 128, 256

# Up to this many chunks, the head's gradient is summed in its own dtype: each sum rounds once, as products
# do. With more, roundings would add up, so the sum is kept in a float32 buffer of the head's size.
MAX_NARROW_SUMS = 4


def chunk_rows(num_rows: int, most: int, hidden_size: int, num_sms: int) -> int:
    """Rows a chunk: as few chunks as `most` rows allow, and dhidden [rows, C] in the fewest waves of tiles.

    A wave is a tile on every SM; the last wave of each product is rarely full. Nothing here was measured.
    """
    num_chunks = max(1, -(-num_rows // most))
    height, width = TILE
    columns = -(-hidden_size // width)

    def waves(rows: int) -> int:
        full, rest = divmod(num_rows, rows)
        tiles = [-(-count // height) * columns for count in (rows, rest)]
        return full * -(-tiles[0] // num_sms) + -(-tiles[1] // num_sms)

    even = max(1, -(-num_rows // num_chunks))
    whole = range(-(-even // height) * height, most + 1, height)  # whole tiles
    return min(whole, key=lambda rows: (waves(rows), rows), default=even) if num_chunks > 1 else even


class ChunkWalk:
    """Products and their sums; `rows` turns a chunk's logits into statistics and gradients.

    Args:
        hidden_RC: [R, C] in the dtype of the products.
        lm_head_VC: [V, C] in that dtype or float32, which its gradient has too.
        impl: "reference", "triton" or "cuda", for the work on the rows.
        scratch_bytes: bound on the temporaries of a chunk, which has at least one row; 0 takes the device's.
    """

    def __init__(
        self,
        hidden_RC: Tensor,
        lm_head_VC: Tensor,
        impl: str,
        scratch_bytes: int = 0,
        *,
        needs_hidden: bool = False,
        needs_head: bool = False,
    ) -> None:
        self.hidden_RC, dtype = hidden_RC, hidden_RC.dtype
        self.head_VC = lm_head_VC.to(dtype)
        self.needs_any = needs_hidden or needs_head
        (num_rows, hidden_size), vocab_size = hidden_RC.shape, lm_head_VC.shape[0]
        on_gpu = hidden_RC.device.type == "cuda"
        scratch = scratch_bytes or (SCRATCH_BYTES if on_gpu else SCRATCH_BYTES_CPU)
        rows_class = TorchRows if impl == "reference" else KernelRows
        row_bytes = rows_class.row_bytes(vocab_size, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        # The products sum the head's gradient themselves: in their dtype, or on a GPU in float32 as well.
        # Elsewhere it is summed in float32 block by block.
        num_chunks = -(-num_rows // max(1, scratch // row_bytes))
        self.direct = lm_head_VC.dtype == dtype and (dtype == wide or num_chunks <= MAX_NARROW_SUMS)
        self.sums_wide = on_gpu and not self.direct
        block_bytes = 0 if self.direct or self.sums_wide or not needs_head else scratch // 8
        most = max(1, (scratch - block_bytes) // row_bytes)
        num_sms = torch.cuda.get_device_properties(hidden_RC.device).multi_processor_count if on_gpu else 1
        self.num_chunk_rows = chunk_rows(num_rows, most, hidden_size, num_sms)
        self.rows = rows_class(hidden_RC, self.num_chunk_rows, vocab_size, impl)
        self.d_hidden_RC = hidden_RC.new_empty(hidden_RC.shape if needs_hidden else 0)
        self.d_head_VC = hidden_RC.new_empty(
            lm_head_VC.shape if needs_head else 0, dtype=dtype if self.direct else wide
        )
        self.summed = False  # True once d_head holds a sum: the first chunk writes it, the others add
        self.head_dtype = lm_head_VC.dtype
        self.needs_hidden, self.needs_head = needs_hidden, needs_head
        if block_bytes:
            num_block_rows = max(1, min(vocab_size, block_bytes // (hidden_size * dtype.itemsize)))
            self.block_vC = hidden_RC.new_empty(num_block_rows, hidden_size)

    def chunks(self) -> Iterator[slice]:
        """Slices of rows; none if there are no rows."""
        num_rows = self.hidden_RC.shape[0]
        for start in range(0, num_rows, self.num_chunk_rows):
            yield slice(start, min(start + self.num_chunk_rows, num_rows))

    def logits(self, rows: slice) -> Tensor:
        """The first product, in the scratch."""
        logits_rV = self.rows.scratch_rV[: rows.stop - rows.start]
        return torch.mm(self.hidden_RC[rows], self.head_VC.t(), out=logits_rV)

    def add_gradients(self, rows: slice, d_logits_rV: Tensor) -> None:
        """Compute the other two products, if they are wanted."""
        if self.needs_hidden:
            torch.mm(d_logits_rV, self.head_VC, out=self.d_hidden_RC[rows])
        if not self.needs_head:
            return
        first, self.summed = not self.summed, True
        if self.direct and first:
            torch.mm(d_logits_rV.t(), self.hidden_RC[rows], out=self.d_head_VC)
            return
        if self.direct:
            self.d_head_VC.addmm_(d_logits_rV.t(), self.hidden_RC[rows])
            return
        if self.sums_wide:
            wide, out = self.d_head_VC.dtype, self.d_head_VC
            if first:
                torch.mm(d_logits_rV.t(), self.hidden_RC[rows], out_dtype=wide, out=out)
            else:
                torch.addmm(out, d_logits_rV.t(), self.hidden_RC[rows], out_dtype=wide, out=out)
            return
        for start in range(0, self.d_head_VC.shape[0], self.block_vC.shape[0]):
            head_vC = self.d_head_VC[start : start + self.block_vC.shape[0]]
            block_vC = self.block_vC[: head_vC.shape[0]]
            torch.mm(d_logits_rV[:, start : start + head_vC.shape[0]].t(), self.hidden_RC[rows], out=block_vC)
            head_vC.copy_(block_vC) if first else head_vC.add_(block_vC)

    def results(self) -> tuple[Tensor, Tensor]:
        """Gradients of hidden states and head, in their dtypes; empty if not wanted."""
        if not self.summed:  # no rows at all
            self.d_head_VC.zero_()
        return self.d_hidden_RC, self.d_head_VC.to(self.head_dtype)


class TorchRows:
    """A chunk's rows in plain torch, in place: two wide buffers, and one for products in a narrower dtype."""

    def __init__(self, like: Tensor, num_rows: int, vocab_size: int, impl: str) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.exp_rV = like.new_empty(num_rows, vocab_size, dtype=wide)
        self.logit_rV = like.new_empty(num_rows, vocab_size, dtype=wide)
        self.narrow = like.dtype != wide
        self.scratch_rV = like.new_empty(num_rows, vocab_size) if self.narrow else self.logit_rV

    @staticmethod
    def row_bytes(vocab_size: int, dtype: torch.dtype) -> int:
        """Bytes of scratch per row."""
        wide = torch.promote_types(dtype, torch.float32)
        return vocab_size * (2 * wide.itemsize + (dtype.itemsize if dtype != wide else 0))

    def statistics(self, logits_rV: Tensor, target_r: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logp and entropy; the buffers then hold the inputs of `gradient`."""
        num_rows = len(target_r)
        self.logit, self.exp = self.logit_rV[:num_rows], self.exp_rV[:num_rows]
        if self.narrow:
            self.logit.copy_(logits_rV)
        if (
            logits_rV.dtype == torch.float16
        ):  # a product that overflowed is -inf, and times its probability of 0 it would be NaN
            self.logit.clamp_(min=torch.finfo(torch.float32).min / 2)
        self.target_r, self.temperature = target_r, temperature
        if temperature != 1:
            self.logit.div_(temperature)
        self.logit.sub_(self.logit.amax(-1, keepdim=True))
        drawn_r = self.logit.gather(1, target_r[:, None]).squeeze(1)
        torch.exp(self.logit, out=self.exp)
        self.sum_r = self.exp.sum(-1)
        # From here on the logits' buffer holds exp(z) z, for the entropy's sum and its gradient.
        mean_r = self.logit.mul_(self.exp).sum(-1) / self.sum_r
        self.lse_r = self.sum_r.log()
        self.entropy_r = self.lse_r - mean_r
        return drawn_r - self.lse_r, self.entropy_r

    def gradient(self, d_logp_r: Tensor | None, d_entropy_r: Tensor | None) -> Tensor:
        """dlogits in the products' dtype. Call once after `statistics`, whose buffers it overwrites."""
        if d_logp_r is None:
            d_logp_r = torch.zeros_like(self.sum_r)
        d_logp_r = d_logp_r / self.temperature
        coef_r = -d_logp_r
        if d_entropy_r is not None:  # -dH p (log p + H) = -dH / sum (exp(z) z + exp(z) (H - lse))
            d_entropy_r = d_entropy_r / self.temperature
            coef_r = coef_r - d_entropy_r * (self.entropy_r - self.lse_r)
        d_logit_rV = self.exp.mul_((coef_r / self.sum_r)[:, None])  # exp(z) = p sum becomes dlogits, in place
        if d_entropy_r is not None:
            d_logit_rV.addcmul_(self.logit, (-d_entropy_r / self.sum_r)[:, None])
        d_logit_rV.scatter_add_(1, self.target_r[:, None], d_logp_r[:, None])
        return self.scratch_rV[: len(d_logit_rV)].copy_(d_logit_rV) if self.narrow else d_logit_rV

    def loss(
        self, logits_rV: Tensor, target_r: Tensor, rows_r: LossRows, config: GRPOLossConfig, gradient: bool
    ) -> tuple[RowLoss, Tensor, Tensor, Tensor | None]:
        """A chunk's loss that depends on each row alone: terms, logp, entropy, and dlogits if `gradient`."""
        return _loss_between(self, logits_rV, target_r, rows_r, config, gradient)


def _loss_between(
    rows: TorchRows | KernelRows,
    logits_rV: Tensor,
    target_r: Tensor,
    rows_r: LossRows,
    config: GRPOLossConfig,
    gradient: bool,
) -> tuple[RowLoss, Tensor, Tensor, Tensor | None]:
    """The loss in plain torch, between statistics and gradient."""
    logp_r, entropy_r = rows.statistics(logits_rV, target_r, config.temperature)
    terms = reference.grpo_row_loss(logp_r, entropy_r, rows_r, config)
    if not gradient:
        return terms, logp_r, entropy_r, None
    d_entropy_r = terms.d_entropy_R if config.entropy_coef != 0 else None
    return terms, logp_r, entropy_r, rows.gradient(terms.d_logp_R, d_entropy_r)


class KernelRows:
    """A chunk's rows with kernels: one buffer, whose logits become their gradient in place.

    Each of its rows begins at a multiple of ALIGNMENT, whatever the size of the vocabulary.
    """

    ALIGNMENT = 64  # bytes: with strides of multiples of 16 numbers Triton loads 16 bytes at once

    def __init__(self, like: Tensor, num_rows: int, vocab_size: int, impl: str) -> None:
        self.kernels = row_kernels(impl)
        stride_r = self.row_bytes(vocab_size, like.dtype) // like.element_size()
        self.scratch_rV = like.new_empty(num_rows, stride_r)[:, :vocab_size]

    @classmethod
    def row_bytes(cls, vocab_size: int, dtype: torch.dtype) -> int:
        """Bytes of scratch per row."""
        return -(-vocab_size * dtype.itemsize // cls.ALIGNMENT) * cls.ALIGNMENT

    def statistics(self, logits_rV: Tensor, target_r: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logp and entropy; keeps the inputs of `gradient`."""
        logp_r, entropy_r, lse_r = self.kernels.row_statistics(logits_rV, target_r, temperature)
        self.rows = (logits_rV, target_r, lse_r, entropy_r)
        self.temperature = temperature
        return logp_r, entropy_r

    def gradient(self, d_logp_r: Tensor | None, d_entropy_r: Tensor | None) -> Tensor:
        """dlogits, in place; call it once after the chunk's `statistics`."""
        if d_logp_r is None:
            d_logp_r = torch.zeros_like(self.rows[2])
        logits_rV = self.rows[0]
        return self.kernels.logit_gradient(
            *self.rows, d_logp_r, d_entropy_r, self.temperature, out_RV=logits_rV
        )

    def loss(
        self, logits_rV: Tensor, target_r: Tensor, rows_r: LossRows, config: GRPOLossConfig, gradient: bool
    ) -> tuple[RowLoss, Tensor, Tensor, Tensor | None]:
        """Like `TorchRows.loss`, with dlogits in place."""
        if not in_kernels(config, rows_r):
            return _loss_between(self, logits_rV, target_r, rows_r, config, gradient)
        d_logits_rV = logits_rV if gradient else None
        terms, logp_r, entropy_r, _ = self.kernels.grpo_row_loss(
            logits_rV, target_r, rows_r, config, d_logits_rV
        )
        return terms, logp_r, entropy_r, d_logits_rV
