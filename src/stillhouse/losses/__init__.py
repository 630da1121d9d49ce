"""Losses: pure functions of tensors, usable alone in any training loop.

What the methods share most is at the top; the rest is in its module.
"""

from __future__ import annotations

from stillhouse.losses.divergences import (
    DIVERGENCES,
    annealed_temperature,
    cross_entropy,
    js,
    kl,
    reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from stillhouse.losses.transport import pairwise_l1, row_error, select_positions, sinkhorn, sinkhorn_distance

__all__ = [
    "DIVERGENCES",
    "annealed_temperature",
    "cross_entropy",
    "js",
    "kl",
    "pairwise_l1",
    "reverse_kl",
    "row_error",
    "select_positions",
    "sinkhorn",
    "sinkhorn_distance",
    "soft_cross_entropy",
    "total_variation",
]
