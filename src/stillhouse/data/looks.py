"""A look in place of a pass: what a forecast reads of a split that is too large to be read whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Look:
    """How much of each split is read, and what the rest would have taken.

    Attributes:
        most: samples of a split that are read, evenly spaced; a smaller split is read whole.
        clock: what time is read from.
        left_out: seconds that the samples which were not read would have taken, whoever handles a batch included.
    """

    most: int
    clock: Callable[[], float] = time.perf_counter
    left_out: float = 0.0

    def count(self, took: list[float], sizes: list[int], whole: int) -> None:
        """Add what the rest of a pass would have taken; its first batch, which may have warmed something up, counts least."""
        usual = slice(1, None) if len(sizes) > 1 else slice(None)
        self.left_out += sum(took[usual]) / sum(sizes[usual]) * (whole - sum(sizes))


_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)


def look() -> Look | None:
    """The look that is being taken, if any."""
    return _LOOK.get()


@contextmanager
def looking(taken: Look) -> Iterator[Look]:
    """Within the block :meth:`Split.in_order <stillhouse.data.Split.in_order>` gives evenly spaced samples of large splits."""
    token = _LOOK.set(taken)
    try:
        yield taken
    finally:
        _LOOK.reset(token)
