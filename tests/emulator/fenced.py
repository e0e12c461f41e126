"""Tensors whose end an emulated kernel cannot pass."""

from __future__ import annotations

import ctypes
import mmap

import torch

NO_ACCESS = 0  # PROT_NONE, which Python's module does not name


def fenced(x: torch.Tensor, alignment: int = 16) -> torch.Tensor:
    """Copy a tensor to memory that ends at a page which faults: a launch that touches it raises.

    Args:
        x: any shape and dtype, not empty; the copy is contiguous.
        alignment: bytes that divide the copy's address. The bytes that this leaves between the copy and the
            page are 0xff: NaN, or -1.
    """
    size = -(-x.numel() * x.element_size() // alignment) * alignment
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    memory.write(b"\xff" * end)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=end - size).view(x.shape)
    page = ctypes.c_void_p(copy.data_ptr() + size)
    if ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) != 0:
        raise OSError("mprotect failed")
    return copy.copy_(x)
