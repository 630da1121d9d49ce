"""The most memory that was held at once: of the accelerator where one is used, else of the process."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


class PeakMemory:
    """Peaks of nested spans; the peak of an inner span also counts for those around it.

    On CUDA it is what torch has allocated there. Elsewhere it is the resident memory of the whole process, libraries
    included, which is what an operating system counts when memory runs out.

    Args:
        device: where the training is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: list[int] = []

    def enter(self) -> None:
        """Begin a span."""
        self._credit()
        self._peaks.append(0)
        _reset(self.device)

    def leave(self) -> int:
        """End the span that began last; its peak in bytes."""
        self._credit()
        peak = self._peaks.pop()
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], peak)
        return peak

    def _credit(self) -> None:
        """Note the peak so far, which :func:`_reset` is about to forget."""
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], held_at_most(self.device))


def held_at_most(device: torch.device) -> int:
    """The peak in bytes since the last reset; since the process began where that cannot be reset (outside Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows keeps no such account for a process of its own.
        return 0
    import sys

    # In bytes on macOS, in units of 1024 bytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux alone can do so, and not in every sandbox; the peak is then that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
