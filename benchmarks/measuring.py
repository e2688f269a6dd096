"""Time, peak memory, the machine's own rate of matrix products, and what the machine is."""

import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_alphaedit


SQUARE = 2048  # edge of the square product that gives the machine's rate; from here on it doesn't grow on CPUs


@dataclass
class Stopwatch:
    """Seconds and peak memory (bytes) of named phases; a phase that runs again adds its seconds.

    Memory is the largest resident size of the process (Linux), or the largest allocation on the accelerator, while
    the phase ran; model and data included. It is missing where the system can't tell.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        gc.collect()
        _reset_peak(self.device)
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        peak = _peak(self.device)
        if peak is not None:
            self.peak[phase] = max(peak, self.peak.get(phase, 0))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")  # sets the high-water mark to the present size, see proc_pid_clear_refs(5)


def _peak(device: torch.device) -> int | None:
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else None


@torch.no_grad()
def matrix_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = SQUARE, repeats: int = 5) -> float:
    """Operations per second (two per multiply-add) of the fastest of some square products of this dtype.

    The fastest, since anything else that runs on the machine can only slow it down.
    """
    device = torch.device(device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right  # the first product sets up its kernel
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, processor and threads: what a figure depends on."""
    device = torch.device(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "hf_alphaedit": hf_alphaedit.__version__,
    }
