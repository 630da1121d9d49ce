"""Scores of tiny training sets that labels and augmentation cannot lift: those of DD-Ranking (arXiv 2505.13300)."""

from __future__ import annotations

import math


def label_robust_score(improvement: float, gap: float, *, weight: float = 0.5) -> float:
    """How much a set itself is worth, apart from its labels; in [0, 1] (LRS, section 3 of the paper).

    ``alpha = w IOR - (1 - w) HLR``, brought to [0, 1] by ``(e^alpha - e^-1) / (e - e^-1)``. A set that neither beats random
    images nor loses anything to the whole data has about 0.27.

    Args:
        improvement: accuracy of networks trained on the set minus that on random images with the same labels and
            augmentation (IOR), in [-1, 1].
        gap: accuracy on the whole real data minus that on the set with hard labels (HLR), in [-1, 1].
        weight: of the improvement.
    """
    return _unit(weight * improvement - (1 - weight) * gap)


def augmentation_robust_score(augmented: float, plain: float, *, weight: float = 0.5) -> float:
    """How much a set itself is worth, apart from augmentation; in [0, 1] (ARS, section 3 of the paper).

    Args:
        augmented: accuracy on the set minus that on random images, both trained with augmentation, in [-1, 1].
        plain: the same, both without.
        weight: of the first.
    """
    return _unit(weight * augmented + (1 - weight) * plain)


def _unit(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))
