"""A decoding step as CUDA graphs: one launch, where launching each kernel takes longer than running it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class CudaGraphs:
    """Calls functions of hashable arguments; repeated calls with the same ones replay a graph.

    A function works on tensors that stay where they are, and launches the same work for the same arguments.
    Its first call runs as usual, on a side stream: that is the warm-up that a capture needs.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., None], *args: Hashable) -> None:
        key = (function.__name__, *args)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(*args)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graphs[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[key], pool=self.pool, stream=self.stream):
            function(*args)  # recorded, not run


def run_eagerly(function: Callable[..., None], *args: Hashable) -> None:
    """Call a function without a graph, as `CudaGraphs` does with one."""
    function(*args)
