"""Differences between repetitions that belong together, such as runs of two methods with the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and how far it can be trusted.

    Attributes:
        mean: of the differences.
        std: their sample standard deviation; None for a single pair.
        interval: the 95 % confidence interval of the mean (Student's t, one degree of freedom less than there are pairs);
            None for a single pair.
    """

    mean: float
    std: float | None
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0, so that the difference is told from noise."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(differences: Sequence[float]) -> Difference:
    """The mean of paired differences with its interval.

    >>> found = paired_difference([0.2, 0.05, 0.25])
    >>> [round(end, 4) for end in found.interval], found.clear
    ([-0.0919, 0.4252], False)
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, None, None)
    from scipy.special import stdtrit  # Whoever measures anything else need not wait for it.

    std = statistics.stdev(differences)
    half = float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count)
    return Difference(mean, std, (mean - half, mean + half))
