"""How long a function takes and how much memory, on a GPU and on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MAX_HOLD_MS = 20.0  # the stream is not held back for longer: a step that enqueues for a second hides nothing

Tensors = tuple[Tensor, ...]
Prepare = Callable[[], object]  # what a repetition needs first, not timed


def nothing() -> None:
    """For a function that finds its inputs as it left them."""


def device_lost() -> bool:
    """Whether an error has left the GPU unusable for this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class CudaMeter:
    """Times by events with a cold L2; a repetition is only read once its round is over."""

    device_type = "cuda"

    def __init__(self, device: torch.device, hold: bool = True) -> None:
        self.device, self.hold = device, hold
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)
        self.cycles_per_ms = self._cycles_per_ms()

    def _cycles_per_ms(self) -> float:
        """Of an awake GPU: an idle one counts several times slower, hence the fastest of some long sleeps."""
        cycles = 10_000_000
        times = []
        for _ in range(5):
            start, end = self._event(), self._event()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            times.append(self.read((start, end)))
        return cycles / min(times)

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def warm_up(self, function: Callable[[], Tensors], prepare: Prepare = nothing) -> tuple[float, float]:
        """Milliseconds for the host to enqueue the work, and for the device to do it."""
        prepare()
        function()
        prepare()
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        function()
        host_ms = (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize(self.device)
        return host_ms, self.read(self.repeat(function, host_ms, prepare))

    def repeat(self, function: Callable[[], Tensors], host_ms: float, prepare: Prepare = nothing) -> Any:
        """Enqueue one repetition; `read` waits for it."""
        start, end = self._event(), self._event()
        prepare()
        self.flush.zero_()
        if self.hold:
            torch.cuda._sleep(int(min(1.5 * host_ms, MAX_HOLD_MS) * self.cycles_per_ms))
        start.record()
        function()
        end.record()
        return start, end

    def read(self, events: Any) -> float:
        start, end = events
        end.synchronize()
        return start.elapsed_time(end)

    def run_for_peak(self, function: Callable[[], Tensors]) -> tuple[Tensors, int]:
        """Results, and bytes allocated at the peak, above what was there before and what is returned."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = function()
        torch.cuda.synchronize(self.device)
        return results, torch.cuda.max_memory_allocated(self.device) - before - bytes_of(results)


class CpuMeter:
    """Times by the wall clock; memory is what torch's own allocator was asked for."""

    device_type = "cpu"

    def warm_up(self, function: Callable[[], Tensors], prepare: Prepare = nothing) -> tuple[float, float]:
        ms = self.repeat(function, 0.0, prepare)
        return ms, ms

    def repeat(self, function: Callable[[], Tensors], host_ms: float, prepare: Prepare = nothing) -> float:
        prepare()
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e3

    def read(self, ms: float) -> float:
        return ms

    def run_for_peak(self, function: Callable[[], Tensors]) -> tuple[Tensors, int]:
        # acc_events: torch 2.11 warns where it is not set
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
            results = function()
        live = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return results, peak - bytes_of(results)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
