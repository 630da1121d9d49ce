"""What a model costs: parameters, bytes and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from stillhouse.errors import UserError


def parameters(module: nn.Module) -> int:
    """Number of parameters; tied ones count once.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())


def model_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory; tied ones count once.

    >>> model_bytes(nn.Linear(3, 2).to(torch.float16))
    16
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(module.parameters(), module.buffers()))


def latency(call: Callable[[Any], Any], example: Any, *, repeats: int = 30, warmup: int = 5) -> float:
    """Median seconds of ``call(example)`` without gradients, by the wall clock.

    The device is waited for before and after each call, so that the time is that of the work and not of its launch.
    Single-sample latency is that of a batch of one; throughput is the batch size over the latency of a batch.

    Args:
        call: a model, or a function of the example that runs one; it also decides on train or eval mode.
        example: what it is called with: a tensor or a batch, of one sample or many, on the model's device.
        repeats: timed calls.
        warmup: calls before those.

    Raises:
        UserError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise UserError(f"A latency needs at least one timed call, not {repeats}.")
    seconds = []
    with torch.no_grad():  # not inference_mode: what a model caches here must still serve in training
        for repeat in range(warmup + repeats):
            _wait(example)
            start = time.perf_counter()
            call(example)
            _wait(example)
            if repeat >= warmup:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait(example: Any) -> None:
    """Wait for the accelerators that hold a tensor of the example."""
    values = example.values() if isinstance(example, dict) else (example,)
    for device in {value.device for value in values if isinstance(value, torch.Tensor)}:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
