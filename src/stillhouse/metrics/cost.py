"""What a model costs to run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def latency(call: Callable[[Any], Any], example: Any, *, repeats: int = 30, warmup: int = 5) -> float:
    """Median time of ``call(example)`` without gradients, in seconds.

    Args:
        call: what to time, on the CPU.
        example: its argument.
        repeats: timed calls.
        warmup: calls before them.
    """
    times = []
    with torch.no_grad():
        for number in range(warmup + repeats):
            start = time.perf_counter()
            call(example)
            if number >= warmup:
                times.append(time.perf_counter() - start)
    return statistics.median(times)
