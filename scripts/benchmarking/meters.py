"""Seconds and bytes, measured the same way on every device."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def now(device: torch.device) -> float:
    """Wall-clock seconds once the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds a call takes, and what it returns."""
    start = now(device)
    result = call()
    return now(device) - start, result


class Stopwatch:
    """A function that counts how long its calls take, on a GPU without waiting for them."""

    def __init__(self, function: Callable[..., Any], device: torch.device):
        self.function, self.device = function, device
        self.marks: list[tuple[Any, Any]] = []

    def __call__(self, *arguments: Any) -> Any:
        begin = self._mark()
        result = self.function(*arguments)
        self.marks.append((begin, self._mark()))
        return result

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in self.marks)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self.marks) / 1000


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """The most bytes of tensors that are alive at a time during a call, beyond those that were alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return peak_bytes_on_cpu(call)


def peak_bytes_on_cpu(call: Callable[[], Any]) -> int:
    """From the profiler's record of what torch's allocator gave and took back, temporaries within kernels included."""
    with without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


@contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing reaches the process's standard error: torch's profiler writes there when it starts and stops."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
